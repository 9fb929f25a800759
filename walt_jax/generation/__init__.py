"""Prompts in, video out."""
