"""Squared ReLU times a scalar gate."""
