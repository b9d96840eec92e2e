"""What there is to test on: manifests, slides, their colours, annotations and synthetic data."""
