"""What a model will need and how fast it can be on a device, before any work is done."""
