"""Aids for testing kernels on machines without a GPU."""
