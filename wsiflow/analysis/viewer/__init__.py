"""The viewer: runs on their slides themselves, in a browser, served on this machine alone."""
