"""What each engine asks of a DeepSeek-V3 checkpoint, as data, and whether sizes fit it.

Only what the engines' released code requires is here; what a test or a run has shown is in docs/results/engines.md. How
it shapes the format: docs/concepts/checkpoint-format.md, "What engines require".
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from transmla.config import ConvertRequest, EngineName, Profile
from transmla.config.refusal import HALF, Refusal
from transmla.deepseek.sizes import MLASizes
from transmla.deepseek.target_spec import TargetSpec


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


def dictating(engines: Sequence[EngineName]) -> list[EngineName]:
    """Return the engines that take caches of a few sizes only."""
    return [name for name in engines if ENGINES[name].caches]


def fit_engine(sizes: MLASizes, spec: TargetSpec, name: EngineName, *, profile: Profile, exact: bool) -> MLASizes:
    """Pad what an engine lets be padded.

    Raises:
        Refusal: the engine cannot load the result; why, and the nearest sizes it can.
    """
    engine = ENGINES[name]
    if profile not in engine.profiles:
        raise Refusal(f"{engine.title} does not compute --profile {profile}", {"profile": engine.profiles[0]})
    if exact and not engine.free_grid:
        raise Refusal(
            f"{engine.title} cannot give every rotary slot a frequency of its own, as --exact must",
            {**HALF, "exact": False},
            *({"engine": (other,)} for other in ENGINES if ENGINES[other].free_grid),
        )
    if spec.biased and not engine.biases:
        if "o_proj" in spec.biases:
            raise Refusal(
                f"{engine.title} has no place for a bias on the output of attention, and it cannot be folded into "
                "the weights either"
            )
        raise Refusal(
            f"{engine.title} has no place for the biases of {', '.join(sorted(spec.biases))}", {"biases": "merge"}
        )
    if engine.max_layers is not None and spec.num_hidden_layers > engine.max_layers:
        raise Refusal(
            f"{engine.title} misreads a model of more than {engine.max_layers} layers; "
            f"this one has {spec.num_hidden_layers}"
        )
    if engine.caches and (sizes.kv_lora_rank, sizes.qk_rope_head_dim) not in engine.caches:
        nearest = sorted(engine.caches, key=lambda pair: abs(sum(pair) - sizes.cache_numbers))
        raise Refusal(
            f"{engine.title} does not take {sizes.kv_lora_rank} + {sizes.qk_rope_head_dim}",
            *({"kv_lora_rank": rank, "qk_rope_head_dim": rope} for rank, rope in nearest[:2]),
        )
    if spec.mixture and engine.shared_expert:
        sizes = replace(sizes, n_shared_experts=1)
    return _pad_heads(sizes, engine)


def engines_for(sizes: MLASizes, spec: TargetSpec, request: ConvertRequest) -> list[EngineName]:
    """Return the engines that load a checkpoint of exactly these sizes."""
    names = []
    for name, engine in ENGINES.items():
        if spec.keep_scaling and spec.rope_type not in engine.scaled_ropes:
            continue
        try:
            if fit_engine(sizes, spec, name, profile=request.profile, exact=request.exact) == sizes:
                names.append(name)
        except Refusal:
            continue
    return names


def _pad_heads(sizes: MLASizes, engine: Engine) -> MLASizes:
    if not engine.heads:
        return sizes
    for nope, rope, value in engine.heads:
        if rope == sizes.qk_rope_head_dim and nope >= sizes.qk_nope_head_dim and value >= sizes.v_head_dim:
            return replace(sizes, qk_nope_head_dim=nope, v_head_dim=value)
    raise Refusal(
        f"{engine.title} has no kernel for heads of {sizes.qk_nope_head_dim} + {sizes.qk_rope_head_dim} and values of "
        f"{sizes.v_head_dim}; it takes at most {' / '.join(map(str, engine.heads[-1]))} (nope / rope / value)"
    )
