"""Weights that are not what they seem: numbers of few bits that are multiplied by scales when they are used.

A config that says so is refused by the table of families. Many say nothing: ModelOpt writes hf_quant_config.json, old
GPTQ and AWQ write quantize_config.json or quant_config.json, and some nothing at all. The headers always tell.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from transmla.checkpoint.safetensors import FLOATS, TensorHeader
from transmla.errors import CheckpointError

# Parts of such names that are telling in any spelling, inside a module whose weight is read; scales of the cache and of
# what goes through leave the weight what it is.
_TELLING = ("scale", "zero_point", "zeros", "quant", "absmax", "codebook")
_HARMLESS = ("k_scale", "v_scale", "kv_scale", "q_scale", "input_scale", "output_scale")
# Last parts of the names of what stands beside a quantised weight, or in its place; the most telling first.
_SIGNS = (
    *("qweight", "weight_packed", "weight_scale", "weight_scale_inv", "weight_scale_2", "weight_scales"),
    *("scales", "qzeros", "g_idx", "weight_global_scale", "weight_zero_point"),  # GPTQ, AWQ, MLX, compressed-tensors
    *("absmax", "quant_map", "nested_absmax", "SCB", "weight_format"),  # bitsandbytes
    *("bitsandbytes__nf4", "bitsandbytes__fp4"),
    *("codes", "codebooks", "W_q", "Qidxs", "bitmask", "compressed"),  # AQLM, HQQ, QuIP#, sparse ones
    *("gate_up_proj_blocks", "down_proj_blocks", "gate_up_proj_scales", "down_proj_scales"),  # MXFP4
)


def check_unquantized(
    headers: Mapping[str, TensorHeader], expected: Iterable[str], telling_files: Sequence[str] = ()
) -> None:
    """Make sure that every weight stands for itself.

    Args:
        headers: of all stored tensors.
        expected: names of those that are read.
        telling_files: files beside the weights that say how they were quantised.

    Raises:
        CheckpointError: a tensor that is no float of 16 bits or more, or a scale; what shows it.
    """
    expected = list(expected)
    packed = next((name for name in expected if name in headers and headers[name].stored_as not in FLOATS), None)
    packed = packed or _instead(headers, expected)
    signs: dict[str, str] = {}
    for name in headers:
        signs.setdefault(name.rpartition(".")[2], name)
    shown = [signs[kind] for kind in _SIGNS if kind in signs] or _scales(headers, expected)
    shown = shown[:3]
    if packed is None and not shown:
        return
    found = f"{packed} is stored as {headers[packed].stored_as}" if packed else f"they hold {shown.pop(0)}"
    beside = ", ".join([*shown, *telling_files])
    raise CheckpointError(
        f"The weights are quantised: {found}{beside and f', with {beside} beside it'}; floats of 16 bits or more that "
        "stand for themselves are needed: convert the full-precision checkpoint that this one was made from."
    )


def _scales(headers: Iterable[str], expected: Iterable[str]) -> list[str]:
    """Return what stands beside a weight and changes what it means, by its name, in whatever format."""
    read, found = set(expected), dict[str, str]()
    for name in headers:
        module, _, kind = name.rpartition(".")
        beside = name not in read and (module in read or f"{module}.weight" in read)
        if beside and kind not in _HARMLESS and any(part in kind.casefold() for part in _TELLING):
            found.setdefault(kind, name)
    return list(found.values())


def _instead(headers: Mapping[str, TensorHeader], expected: Iterable[str]) -> str | None:
    """Return a tensor that is no float and stands in a module whose weight is absent, whatever its name."""
    absent = {name.rpartition(".")[0] for name in expected if name not in headers}
    for name, header in headers.items():
        parts = name.split(".")
        modules = {".".join(parts[:count]) for count in range(1, len(parts))}
        if header.stored_as not in FLOATS and modules & absent:
            return name
    return None
