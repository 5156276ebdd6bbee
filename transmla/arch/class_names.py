"""The names of stored tensors, as the class has them: a base model's lack a prefix, and wrapping modules add one."""

import re
from collections.abc import Iterable

from transmla.arch.families import Family
from transmla.errors import CheckpointError

# Parts of names that wrapping modules leave; completes "… is what ".
_WRAPPINGS = {
    "_orig_mod": "torch.compile leaves: save the module inside (model._orig_mod)",
    "module": "DataParallel and DeepSpeed leave: save the module inside (model.module)",
    "_fsdp_wrapped_module": "FSDP leaves: gather and save the full state dict",
    "_checkpoint_wrapped_module": "activation checkpointing leaves: save the module inside",
    **dict.fromkeys(
        ("base_layer", "lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"),
        "an adapter leaves that was not merged: merge it with peft (merge_and_unload) and save the result",
    ),
}
# Inside the decoder, first parts of the names of what a base model holds.
_BASE = ("layers", "embed_tokens", "norm", "rotary_emb")


def class_names(names: Iterable[str], family: Family) -> dict[str, str]:
    """Return what the causal language model calls each stored tensor.

    Stock transformers adds the prefix that a base model lacks, and so does this; other prefixes it does not read, but
    makes random weights in their place.

    Raises:
        CheckpointError: names that are the model's with something before or between, or of another layout; the tensor.
    """
    stored = list(names)
    for name in stored:
        if wrapping := next((part for part in name.split(".") if part in _WRAPPINGS), None):
            raise CheckpointError(
                f"Tensor {name} has {wrapping}. in its name, which {_WRAPPINGS[wrapping]} with save_pretrained."
            )
    prefix, _, _ = family.layers.rpartition(".")
    if any(name.startswith((f"{family.layers}.", family.embedding)) for name in stored):
        if twice := sorted({f"{prefix}.{name}" for name in stored if name.split(".")[0] in _BASE}.intersection(stored)):
            raise CheckpointError(
                f"Tensor {twice[0]} is there twice, with and without the prefix {prefix}., and Transformers reads the "
                "one without: save the model anew with save_pretrained."
            )
        return {name: name for name in stored}
    base = family.embedding.removeprefix(f"{prefix}.")
    if base in stored:
        return {name: f"{prefix}.{name}" if name.split(".")[0] in _BASE else name for name in stored}
    raise CheckpointError(f"{_where(stored, base)}; {family.embedding} and {family.layers}.0. are needed.")


def _where(stored: list[str], base: str) -> str:
    if found := next((name for name in stored if name.endswith(f".{base}")), None):
        return f"Tensor {found} has the prefix {found.removesuffix(base)}"
    if found := next((name for name in stored if re.search(r"\b(layers|h|blocks)\.0\.", name)), None):
        return f"Tensor {found} is in a layout that Transformers does not read for this family"
    return f"The weights hold no tensor of a decoder, but {stored[0] if stored else 'nothing'}"
