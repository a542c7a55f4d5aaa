"""What produced every figure that the documents give, and the raw results."""
