"""Files of a run as other programs read them: a file for each format, over what `findings` reads of a run."""
