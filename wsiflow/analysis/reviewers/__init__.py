"""What statisticians and regulators are handed of a run."""
