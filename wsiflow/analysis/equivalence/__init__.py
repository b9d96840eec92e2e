"""Equivalence of two runs: how far their heatmaps and detections agree."""
