"""Networks run over whole regions instead of window by window."""
