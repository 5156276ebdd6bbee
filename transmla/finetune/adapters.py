"""Low-rank changes of the attention's projections (LoRA, arXiv:2106.09685), by peft."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from transmla.deepseek.names import LATENT_NORMS, PROJECTIONS
from transmla.errors import UsageError

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
    """Add adapters to a model in place; return the names of what is trained: them, and latent norms that are fitted."""
    from peft import LoraConfig, inject_adapter_in_model

    there = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=[name for name in PROJECTIONS if name in there])
    model.requires_grad_(False)
    inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        if name.endswith(tuple(f"{norm}.weight" for norm in LATENT_NORMS.values())):
            parameter.requires_grad_(True)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def merge_adapters(state: Mapping[str, Tensor], trained: Collection[str], *, scale: float) -> dict[str, Tensor]:
    """Return what is trained, under the names that it has without adapters: W + scale · B A, and the others."""
    merged = {name: state[name] for name in trained if not name.endswith((_DOWN, _UP))}
    for name, up in state.items():
        if not name.endswith(_UP):
            continue
        module = name.removesuffix(_UP)
        base = state[f"{module}{_BASE}weight"].float()
        merged[f"{module}.weight"] = base + scale * (up.float() @ state[f"{module}{_DOWN}"].float()).to(base.device)
        if (bias := state.get(f"{module}{_BASE}bias")) is not None:
            merged[f"{module}.bias"] = bias
    return merged
