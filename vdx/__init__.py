"""vdx: video diffusion in JAX, TPU first."""

__version__ = "0.1.0"
