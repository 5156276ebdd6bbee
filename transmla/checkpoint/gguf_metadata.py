"""What a GGUF file says that the reader of Transformers passes over, though the model computes with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transmla.errors import CheckpointError

# Keys after the architecture's name, and the values with which they change nothing.
_PASSED_OVER = {
    "rope.scaling.type": ("none", ""),
    "rope.scaling.factor": (1.0,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scale_linear": (1.0,),
    "attention.causal": (True,),
    "attention.scale": (),
    "attention.clamp_kqv": (0.0,),
    "attention.temperature_scale": (),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (1.0,),
    "embedding_scale": (1.0,),
    "residual_scale": (1.0,),
}
# Frequencies of RoPE that the file holds as tensors: Llama 3's and LongRoPE's.
_FREQUENCIES = ("rope_freqs.", "rope_factors_")
_INSTEAD = "convert the safetensors checkpoint of this model"


def check_metadata(path: Path) -> int:
    """Refuse a GGUF file that would be read as another model; return how many tensors of biases it holds.

    Raises:
        CheckpointError: it cannot be read; an adapter or an embedder; or what would be passed over.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field for name, field in reader.fields.items() if len(field.data) == 1}
        values: dict[str, Any] = {name: field.contents() for name, field in fields.items()}
        tensors = [str(tensor.name) for tensor in reader.tensors]
    except Exception as error:  # the reader fails in as many ways as there are malformed files
        raise CheckpointError(f"transformers cannot read {path}: {' '.join(str(error).split())[:300]}") from error
    if values.get("general.type") == "adapter":
        raise CheckpointError(f"{path} is an adapter to another model: merge the two, and {_INSTEAD}.")
    architecture = values.get("general.architecture")
    if pooling := values.get(f"{architecture}.pooling_type"):
        raise CheckpointError(
            f"{path} is of an embedder or a reranker ({architecture}.pooling_type = {pooling}), and DeepSeek-V3 puts "
            "out logits of the next token alone."
        )
    found = [
        f"says {architecture}.{key} = {value}"
        for key, neutral in _PASSED_OVER.items()
        if (value := values.get(f"{architecture}.{key}")) is not None and value not in neutral
    ]
    found += [f"holds {name}, the frequencies of a scaled RoPE" for name in tensors if name.startswith(_FREQUENCIES)]
    if found:
        raise CheckpointError(
            f"{path} {found[0]}, which Transformers does not read from GGUF files, so that another model would come "
            f"out: {_INSTEAD}."
        )
    return sum(name.endswith(".bias") for name in tensors)
