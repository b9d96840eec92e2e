"""What finished runs tell together: settings compared, maps compared, and what reviewers are handed."""
