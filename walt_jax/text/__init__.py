"""Captions to token embeddings: a sentencepiece vocabulary and T5's encoder."""
