"""What each engine asks of a DeepSeek-V3 checkpoint, as data.

Only what the engines' released code requires is here; what a test or a run has shown is said in the README. How it
shapes the format: docs/concepts/checkpoint-format.md, "What engines require".
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from transmla.config import EngineName, Profile


@dataclass(frozen=True)
class Engine:
    """One engine's rules.

    Attributes:
        title: name for people.
        profiles: which neutralisation of the latent norm it computes correctly.
        caches: accepted (kv_lora_rank, qk_rope_head_dim); empty for any.
        heads: accepted (qk_nope_head_dim, qk_rope_head_dim, v_head_dim), smallest first; empty for any.
            Head sizes cost no cache, so they are padded with zeros up to an accepted size.
        free_grid: whether every rotary slot can have a frequency of its own, as exact mode needs.
        scaled_ropes: types of RoPE, other than the plain one, of which it computes the frequencies as the source does.
        biases: whether it loads biases on queries, keys and values (``attention_bias``).
        max_layers: a model with more layers is misread.
        shared_expert: whether a mixture of experts must have one that every token uses; zeros will do.
    """

    title: str
    profiles: tuple[Profile, ...]
    caches: tuple[tuple[int, int], ...] = ()
    heads: tuple[tuple[int, int, int], ...] = ()
    free_grid: bool = False
    scaled_ropes: tuple[str, ...] = ()
    biases: bool = False
    max_layers: int | None = None
    shared_expert: bool = True


ENGINES: Mapping[EngineName, Engine] = MappingProxyType(
    {
        # The latent norm's eps is hard-coded to 1e-6: the portable profile is the only one.
        "transformers": Engine(
            "transformers",
            profiles=("portable",),
            free_grid=True,
            scaled_ropes=("linear", "llama3"),
            biases=True,
            shared_expert=False,
        ),
        "vllm": Engine(
            "vLLM (CUDA)",
            profiles=("portable", "quantizable"),
            caches=((256, 64), (448, 64), (512, 64)),
            heads=((64, 64, 128), (128, 64, 128), (192, 64, 256)),
        ),
        "vllm-cpu": Engine("vLLM (CPU)", profiles=("portable", "quantizable"), caches=((512, 64),)),
        # Read, not run: its fast attention backends are written for DeepSeek's own shape.
        "sglang": Engine("SGLang", profiles=("portable", "quantizable"), caches=((512, 64),), heads=((128, 64, 128),)),
        "llama.cpp": Engine("llama.cpp", profiles=("portable", "quantizable")),
        # Drops every tensor named model.layers.61*, DeepSeek's own extra prediction layer.
        "mlx": Engine("MLX", profiles=("portable",), scaled_ropes=("linear", "llama3"), biases=True, max_layers=61),
    }
)
