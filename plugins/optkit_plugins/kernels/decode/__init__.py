"""The decode loop: one compiled step a bucket of rows and columns, kept as a CUDA graph."""
