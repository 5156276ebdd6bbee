"""What a model folder holds where it is not the weights of a whole model, and what people can do about it."""

from __future__ import annotations

import json
from pathlib import Path

from transmla.checkpoint.safetensors import INDEX_FILE, SINGLE_FILE
from transmla.errors import CheckpointError, UnsupportedModelError

ADAPTER_CONFIG = "adapter_config.json"
# What makes another model of a decoder than one that predicts the next token; completes "… is ".
_OTHER_PURPOSES = {
    "value_head.safetensors": "a reward model, whose head lies beside the weights",
    "value_head.bin": "a reward model, whose head lies beside the weights",
    "modules.json": "an embedder of sentence-transformers",
}
#: What says that a folder is more, or less, than its config.json: fetched with it from the hub.
TELLING_FILES = (
    ADAPTER_CONFIG,
    "hf_quant_config.json",
    "quantize_config.json",
    "quant_config.json",
    "quantization_config.json",
    "modules.json",
)

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_PICKLES_ARE_REFUSED = (
    "Pickled ones (.bin, .pt, .pth) can run code when they are loaded and are refused; load the model once where you "
    "trust it and write it with save_pretrained."
)
# Weights of the same model in the layouts of other programs.
_FOREIGN = (
    ("consolidated*.safetensors", "in the layout of its maker's own program"),
    ("*.gguf", "of llama.cpp"),
    ("tf_model*.h5", "of TensorFlow"),
    ("flax_model*.msgpack", "of Flax"),
    ("*.onnx", "of ONNX"),
)


def check_no_adapter(name: str, folder: Path) -> None:
    """Refuse an adapter, alone or beside weights: Transformers would load it with them, and compute another model.

    Raises:
        CheckpointError: there is one; what to do with it.
    """
    found = sorted(path.name for path in (folder / ADAPTER_CONFIG, *folder.glob("adapter_model*")) if path.is_file())
    if not found:
        return
    merge = "merge the two with peft (merge_and_unload, then save_pretrained) and convert what comes out"
    # Of a model on the hub that has a config, the weights may not be here yet.
    alone = any(name != ADAPTER_CONFIG for name in found) and not _has_weights(folder)
    if (folder / "config.json").is_file() and not alone:
        raise CheckpointError(
            f"{name} holds an adapter ({', '.join(found)}) beside its weights, which a conversion would leave out: "
            f"{merge}; where the weights hold it already, remove these files."
        )
    base = _base_of(folder)
    raise CheckpointError(
        f"{name} is an adapter ({', '.join(found)}) to another model{f', {base}' if base else ''}, and not a model of "
        f"its own: {merge}."
    )


def check_no_other_purpose(name: str, folder: Path) -> None:
    """Refuse a folder whose files say that the model is used for something else than its logits.

    Raises:
        UnsupportedModelError: the file, and what it says.
    """
    for file, purpose in _OTHER_PURPOSES.items():
        if (folder / file).is_file():
            raise UnsupportedModelError(
                f"{name} is {purpose} ({file}): a conversion would keep the decoder alone. Where that is what you "
                "want, remove the file."
            )


def no_weights(name: str, folder: Path) -> str:
    """Say that ``folder`` lacks weights that can be read, what it holds instead, and how to get them."""
    if any(path for pattern in _PICKLES for path in folder.glob(pattern)):
        return no_safetensors(name)
    for pattern, whose in _FOREIGN:
        if found := sorted(path.name for path in folder.glob(pattern)):
            # One that can be read all the same.
            way = (
                f"choose it with --gguf-file {found[0]}"
                if pattern == "*.gguf"
                else "take the model as Transformers stores it"
            )
            return (
                f"{name} has no weights that Transformers reads: {SINGLE_FILE} or {INDEX_FILE} is needed. It holds "
                f"{found[0]}, weights {whose}: {way}."
            )
    if found := sorted(path.name for path in folder.glob("*.safetensors")):
        return (
            f"{name} has no weights that Transformers reads by itself: {SINGLE_FILE} or {INDEX_FILE} is needed, and it "
            f"holds {found[0]}; rename a single file, or write the index that belongs to several."
        )
    return f"{name} has no weights: {SINGLE_FILE} or {INDEX_FILE} is needed."


def no_safetensors(name: str) -> str:
    """Say that ``name`` lacks weights that are safe to read, and how to get them."""
    return f"{name} has no safetensors weights. {_PICKLES_ARE_REFUSED}"


def telling_files(folder: Path) -> tuple[str, ...]:
    """Return which files say that the weights are quantised."""
    return tuple(name for name in TELLING_FILES if "quant" in name and (folder / name).is_file())


def _has_weights(folder: Path) -> bool:
    return (folder / SINGLE_FILE).is_file() or (folder / INDEX_FILE).is_file() or any(folder.glob("*.gguf"))


def _base_of(folder: Path) -> str:
    try:
        content = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return ""
    base = content.get("base_model_name_or_path") if isinstance(content, dict) else None
    return base[:200] if isinstance(base, str) else ""
