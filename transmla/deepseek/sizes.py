"""The sizes of a latent attention, in DeepSeek's names."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MLASizes:
    """Sizes of the latent attention, in DeepSeek's names, and how many experts of zeros all tokens share."""

    kv_lora_rank: int
    qk_rope_head_dim: int
    qk_nope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    n_shared_experts: int = 0

    @property
    def cache_numbers(self) -> int:
        """Numbers cached per token and layer: latent and rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def qk_head_dim(self) -> int:
        """Size of one query head; the engine scales logits by its inverse square root."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim
