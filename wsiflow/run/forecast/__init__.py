"""Forecast of a run: its tasks, bytes and time, before it is started."""
