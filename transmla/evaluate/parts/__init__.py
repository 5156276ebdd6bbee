"""The parts of an evaluation, one file each."""
