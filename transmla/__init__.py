"""Turn grouped-query attention checkpoints into native Multi-head Latent Attention checkpoints."""

__version__ = "0.1.0"
