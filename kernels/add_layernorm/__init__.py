"""Residual addition followed by a LayerNorm, in one pass."""
