"""Weight files in and out: one file per format. Knows tensors and names, not what a model does with them."""
