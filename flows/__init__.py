"""Prefect flows and the command line: composition only, no arithmetic and no file access."""
