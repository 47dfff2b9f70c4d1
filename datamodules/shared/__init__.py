"""What the datamodules of all modalities share."""
