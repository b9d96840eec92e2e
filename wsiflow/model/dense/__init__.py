"""Dense inference: networks run over whole regions instead of window by window."""
