"""How long a context of the result may be: what the source's positions reach, and what holds only within a bound.

The target has one grid of frequencies and attends to every token before. A source that changes its frequencies on the
way, or looks back on a window, is the same only in contexts where that never happens.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PretrainedConfig

from transmla.arch.unread import declared_keys
from transmla.errors import CheckpointError, UnsupportedModelError, UsageError


@dataclass(frozen=True)
class Bound:
    """Contexts of at most ``tokens`` tokens are computed as if ``found`` were not there.

    Attributes:
        tokens: length of the longest such context.
        found: what config.json says, as in "sliding_window = 4096".
        reason: completes the sentence "… cannot be converted: ".
    """

    tokens: int
    found: str
    reason: str


def longest_context(config: PretrainedConfig) -> int:
    """Return how many tokens a context of the result may have at most."""
    return min([_reach(config), *(bound.tokens for bound in _bounds(config))])


def choose_context(config: PretrainedConfig, title: str, asked: int | None) -> int:
    """Return the longest context of the result, in tokens.

    Args:
        config: of the source, whose RoPE has been found to be usable.
        title: name of its family.
        asked: the context that is asked for; the source's own by default.

    Raises:
        UsageError: more than the source's positions reach.
        UnsupportedModelError: within such a context the source does what the target cannot.
        CheckpointError: keys that contradict each other.
    """
    own, reach = config.max_position_embeddings, _reach(config)
    # One advice, and one that holds: the tightest bound.
    longest = longest_context(config)
    if asked is not None and asked > reach:
        further = f", and its RoPE reaches {reach}" if reach > own else ""
        within = f": pass {longest} at most" if longest != own else ""
        raise UsageError(f"--max-position-embeddings {asked} is more than the model's {own}{further}{within}.")
    context = own if asked is None else asked
    if context > longest:
        bound = min(_bounds(config), key=lambda bound: bound.tokens)
        raise UnsupportedModelError(
            f"This {title} model cannot be converted for contexts of {context} tokens: {bound.reason} "
            f"(config.json: {bound.found}). For contexts within, pass --max-position-embeddings {longest}."
        )
    return context


def _reach(config: PretrainedConfig) -> int:
    """Return how many tokens the positions of a model reach; its own context, but for two types of scaled RoPE.

    ``linear`` and ``yarn`` have the same frequencies at every length, and ``factor`` says how far: models are published
    with the context that they were trained on, and cards say to raise it (Vicuna-16k, Qwen2.5 with YaRN). Where it has
    been raised already (DeepSeek-Coder has ``linear``), nothing in config.json says so, and the frequencies are right
    all the same.

    ``llama3`` has the same frequencies at every length, too, but its models are published with the context that they
    reach, and ``factor`` times the original one is another number (Llama 3.2: 262,144, and 131,072 is what it reaches).
    ``dynamic`` changes its frequencies with every token beyond ``max_position_embeddings``, and ``longrope`` changes
    them once, before: no grid holds either further.
    """
    own, parameters = int(config.max_position_embeddings), config.rope_parameters
    factor, original = (parameters.get(key) for key in ("factor", "original_max_position_embeddings"))
    if parameters["rope_type"] not in ("linear", "yarn") or not isinstance(factor, int | float):
        return own
    # Transformers fills in the original context of YaRN.
    scaled = factor * (original if isinstance(original, int) else own)
    return max(own, int(scaled)) if scaled < math.inf else own


def _bounds(config: PretrainedConfig) -> Iterator[Bound]:
    if window := _window(config):
        key, tokens = window
        yield Bound(tokens, f"{key} = {tokens}", f"DeepSeek-V3 has no {_WINDOWS[key]}")
    parameters = config.rope_parameters
    if parameters["rope_type"] == "longrope":
        key = "original_max_position_embeddings"
        short = _tokens(key, parameters[key])
        yield Bound(short, "rope_type = 'longrope'", f"its RoPE changes its frequencies beyond {short} tokens")


_WINDOWS = {"sliding_window": "sliding-window attention", "attention_chunk_size": "attention within chunks"}


def _window(config: PretrainedConfig) -> tuple[str, int] | None:
    """Return how many tokens a layer looks back on, itself among them, and the key that says so; None if on all.

    A context of just as many is seen whole: transformers masks what is ``sliding_window`` or more tokens back.
    """
    kinds = getattr(config, "layer_types", None)
    if unknown := {*(kinds or ())} - {"full_attention", "sliding_attention"}:
        raise UnsupportedModelError(
            f"This model cannot be converted: DeepSeek-V3 has no layers of the type {min(unknown)!r} "
            "(config.json: layer_types)."
        )
    if "sliding_attention" in (kinds or ()):
        window = getattr(config, "sliding_window", None)
        if window is None:
            raise CheckpointError(
                "config.json contradicts itself: layer_types has sliding_attention, and there is no sliding_window, or "
                "use_sliding_window is off; Transformers cannot run such a model. Where no layer has a window, remove "
                "layer_types."
            )
        return "sliding_window", _tokens("sliding_window", window)
    keys = tuple(_WINDOWS)
    if kinds is not None:
        # A class without types of layers masks by its window all the same.
        keys = ("sliding_window",) if declared_keys(config) & {*keys, "layer_types"} == {"sliding_window"} else ()
    # Even of a class that knows of no window, as Llama's: the cache that transformers makes for it keeps no more than
    # one, or than a chunk, so that such a model decodes otherwise than it reads.
    windows = ((key, value) for key in keys if (value := getattr(config, key, None)) is not None)
    return next(((key, _tokens(key, value)) for key, value in windows), None)


def _tokens(key: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"config.json: {key} must be a number of tokens, found {value!r}.")
    return value
