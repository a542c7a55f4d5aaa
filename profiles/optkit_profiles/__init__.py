"""One TOML a machine."""
