"""W.A.L.T's denoiser: a transformer over latent tokens whose blocks differ in one thing, the attention window."""
