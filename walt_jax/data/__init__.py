"""Captioned clips: sources, decoding, and the Grain pipeline that feeds training. NumPy only."""
