"""Rows of a matrix in fp8, each with a scale of its own."""
