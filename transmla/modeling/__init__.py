"""What Transformers' latent attention leaves out: decoding on the latent itself."""

from transmla.modeling.absorption import absorb, expand, has_latent_attention

__all__ = ["absorb", "expand", "has_latent_attention"]
