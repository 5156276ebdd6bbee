"""The conversion in words: sizes, plan, one layer, the target's format, the run, the card."""
