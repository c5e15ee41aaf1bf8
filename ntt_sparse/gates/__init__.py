"""Learnable channel gates: what is multiplied to channels, and how they are closed."""
