"""A tiny model, its conversion, and a text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.factory import tiny_checkpoint
from transmla.arch.skeleton import empty_matrices_are_fine

SIZES = ("--kv-lora-rank", "24", "--qk-rope-head-dim", "8")
FEW = ("--num-windows", "8", "--num-heldout-windows", "2", "--window", "32")
# Sixteen sequences are held out, and every step sees four others.
SHORT = (
    "--window 32 --num-eval-windows 16 --per-device-train-batch-size 4 --logging-steps 2 --learning-rate 1e-3 -q "
    # What these do is tested in test_repeats.py and test_loss.py; the others are about the divergence on the text.
    "--repeats 0 --hard-label-share 0"
)


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory, cli: Callable, calibration_text: Path) -> tuple[Path, Path]:
    """A tiny Llama and its conversion to a third of the cache."""
    root = tmp_path_factory.mktemp("finetune")
    source = tiny_checkpoint(root / "source", shards=2)
    result = cli("convert", source, root / "mla", *SIZES, *FEW, "--calibration", calibration_text, "-q")
    assert result.exit_code == 0, result.stderr
    return source, root / "mla"


@pytest.fixture(scope="session")
def converted(pair: tuple[Path, Path]) -> Path:
    return pair[1]


@pytest.fixture
def train(cli: Callable, calibration_text: Path) -> Callable:
    """Run ``transmla finetune`` on the text, and check that it worked."""

    def train(checkpoint: Path, output: Path, flags: str = "", *more: object) -> Path:
        result = cli(
            "finetune", checkpoint, output, "--dataset", calibration_text, *SHORT.split(), *flags.split(), *more
        )
        assert result.exit_code == 0, result.stderr
        return output

    return train


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def loads(folder: Path) -> bool:
    """Whether stock transformers loads a folder with all its weights."""
    with empty_matrices_are_fine():
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    with torch.no_grad():
        finite = model(torch.arange(2, 12)[None]).logits.isfinite().all()
    return type(model).__name__ == "DeepseekV3ForCausalLM" and not any(info.values()) and bool(finite)
