"""Attention of the Perceiver Resampler."""
