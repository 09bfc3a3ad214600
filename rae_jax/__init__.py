"""RAE and l-DAE in JAX: representation autoencoders, DiT-DH and latent denoising."""

__version__ = "0.1.0"
