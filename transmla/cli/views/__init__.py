"""Records as tables for people, within 80 columns."""
