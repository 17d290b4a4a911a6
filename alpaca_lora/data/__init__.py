"""Files -> batches of tokens. Knows no model. Nothing is imported here, so that options and formats do not pay for
torch.
"""
