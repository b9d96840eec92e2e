"""How far the maps of two runs agree."""
