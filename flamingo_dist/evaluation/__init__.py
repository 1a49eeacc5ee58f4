"""Evaluation: the grounding probe and close-ended scoring of candidates."""
