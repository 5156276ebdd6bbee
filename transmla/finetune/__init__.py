"""Training of a converted model, by default to say what its source says."""
