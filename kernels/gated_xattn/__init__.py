"""Image-causal gated cross-attention."""
