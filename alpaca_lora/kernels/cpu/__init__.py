"""Ops in C, compiled by the machine's own compiler when they are first needed; each has a twin in plain torch."""
