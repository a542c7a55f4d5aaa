"""Weights that wait in host memory, and a KV cache in few bits."""
