"""What follows a frozen convolution: bias and GELU, or bias, gate, residual and GELU."""
