"""Answering: requests in, tokens and text out. Knows no training."""
