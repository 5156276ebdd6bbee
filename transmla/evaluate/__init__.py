"""How good converted models are, compared with their source."""
