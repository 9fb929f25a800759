"""walt_jax: MAGVIT-v2's causal video tokenizer and W.A.L.T's windowed latent video diffusion in JAX/Flax."""

__version__ = "0.1.0"
