"""Exports of a run for statisticians and regulators."""
