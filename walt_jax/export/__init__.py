"""Trained models in forms that others read, and reading them back: a file for each format."""
