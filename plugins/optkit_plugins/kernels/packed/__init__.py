"""Weights of 4 and 8 bits: their layout, the kernels that multiply with them, and the linear layer that holds them."""
