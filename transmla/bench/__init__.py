"""Speed and memory of a source and its conversions, measured in turns."""
