"""The recipes that come with the package."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from transmla.config import FinetuneRequest

CONFIGS = Path(__file__).parents[2] / "configs" / "finetune"
RECIPES = sorted(path.name for path in CONFIGS.glob("*.yaml"))
ACCELERATE = CONFIGS.with_name("accelerate")


def test_there_is_one_for_each_way_to_train():
    found = [FinetuneRequest.build(recipe=CONFIGS / name, flags=arguments()).train for name in RECIPES]
    assert sorted(found) == ["all", "attention", "lora"]


def arguments(**flags):
    return {"checkpoint": "mla", "output_dir": Path("out"), "dataset": ["text.txt"], "max_steps": 3, **flags}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_as_it_is(train, converted, tmp_path, name):
    """But for sizes that a tiny model does not have; flags win over it."""
    output = train(
        converted, tmp_path / "out", "--max-steps 2 --gradient-accumulation-steps 2", "--config", CONFIGS / name
    )
    assert (output / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "path", [ACCELERATE / f"{name}.yaml" for name in ("fsdp", "single_gpu", "zero3")], ids=lambda path: path.stem
)
def test_accelerate_takes_its_configs(path):
    config = load_config_from_file(str(path))
    assert config.mixed_precision == "bf16"
    assert config.num_processes >= 1
