"""What a source model looks like, as data."""
