"""Adaptation methods: where they sit, what they compute, how they are saved, how they are folded into the base.

Knows linears by their contract (`models/linear.py`); knows nothing of data, of losses or of how answers are made.
"""
