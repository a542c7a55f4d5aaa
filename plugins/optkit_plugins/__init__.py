"""The techniques that come with optkit: one module each, found by entry point like everyone else's."""
