"""The teacher, what it says of a batch, and a student that computes the loss."""
