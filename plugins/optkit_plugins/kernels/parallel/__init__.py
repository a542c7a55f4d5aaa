"""Several GPUs: replicas, layers spread, and slices of linear layers with an exchange between processes."""
