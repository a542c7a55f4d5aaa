"""One TOML file a machine; ``optkit.profile`` reads them."""
