"""From documents to sequences of equal length, in an order."""
