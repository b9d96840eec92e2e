"""What settings of one sweep cost, and what they find."""
