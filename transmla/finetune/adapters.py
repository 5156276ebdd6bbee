"""Low-rank changes of the attention's projections (LoRA, arXiv:2106.09685), by peft."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from transmla.errors import UsageError

_PROJECTIONS = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
_DOWN, _UP, _BASE = ".lora_A.default.weight", ".lora_B.default.weight", ".base_layer."


def check_peft() -> None:
    """Refuse, before anything is loaded, what needs peft.

    Raises:
        UsageError: it is missing.
    """
    try:
        import peft  # noqa: F401
    except ImportError:
        raise UsageError("--train lora needs peft: pip install 'transmla[lora]', or train something else.") from None


def add_adapters(model: nn.Module, *, rank: int, alpha: int) -> list[str]:
    """Add adapters to a model in place, and return the names of their weights; all others are frozen."""
    from peft import LoraConfig, inject_adapter_in_model

    there = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=[name for name in _PROJECTIONS if name in there])
    model.requires_grad_(False)
    inject_adapter_in_model(config, model)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def merge_adapters(state: Mapping[str, Tensor], *, scale: float) -> dict[str, Tensor]:
    """Return the changed weights under the names that they have without adapters: W + scale · B A."""
    merged: dict[str, Tensor] = {}
    for name, up in state.items():
        if not name.endswith(_UP):
            continue
        module = name.removesuffix(_UP)
        base = state[f"{module}{_BASE}weight"].float()
        merged[f"{module}.weight"] = base + scale * (up.float() @ state[f"{module}{_DOWN}"].float()).to(base.device)
        if (bias := state.get(f"{module}{_BASE}bias")) is not None:
            merged[f"{module}.bias"] = bias
    return merged
