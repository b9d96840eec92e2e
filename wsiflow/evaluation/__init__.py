"""What scores are worth: lesions found, slides told apart, and how sure that is."""
