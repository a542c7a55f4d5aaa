"""Attention of a compiled engine: transformers' interface, and kernels for steps that read true lengths only."""
