"""MAGVIT-v2's causal video tokenizer: pixels to latents and back. A latent frame never sees a later pixel frame."""
