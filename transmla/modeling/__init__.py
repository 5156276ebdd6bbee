"""Latent attention in loaded models: decoding on the latent itself, which stock transformers leaves out."""

from transmla.modeling.absorption import absorb, expand

__all__ = ["absorb", "expand"]
