"""Programs without a device to run them on: what they cost."""
