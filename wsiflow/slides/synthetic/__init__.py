"""Synthetic slides, whose lesions are known exactly."""
