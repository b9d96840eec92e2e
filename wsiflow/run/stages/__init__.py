"""The stages of a run, a file for each, and what several of them share."""
