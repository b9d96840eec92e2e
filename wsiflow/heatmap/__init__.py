"""Scores on the slide: maps, their files, the lesions on them and their features."""
