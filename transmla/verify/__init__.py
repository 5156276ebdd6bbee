"""Whether a checkpoint is whole, and computes what its source computes."""
