"""Code that the datamodules of all modalities share."""
