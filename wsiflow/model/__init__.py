"""Classifiers: cards, architectures, loading and the engines that run them; the one place that knows torch."""
