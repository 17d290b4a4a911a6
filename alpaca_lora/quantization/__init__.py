"""Weights in fewer bits: one file per scheme, the linear that holds them, and the plan of which layer gets which."""
