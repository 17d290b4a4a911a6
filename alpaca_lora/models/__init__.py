"""The decoder and what it is made of: layers, attention plans, families, loading. Knows no adapter and no training."""
