"""Whole models: converting, loading and comparing them."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, DynamicCache

from tests.convert.naive import latent_attention_matrix, model_logits, stored_attention
from tests.factory import tiny_checkpoint
from transmla.arch.skeleton import empty_matrices_are_fine
from transmla.checkpoint.journal import Journal
from transmla.config import ConvertRequest
from transmla.convert import layers as walk
from transmla.convert.run import convert

TOKENS = 320
CALIBRATION = {"num_windows": 12, "num_heldout_windows": 3, "window": 64, "batch_size": 5}


def load(folder: Path):
    """Load in float32 whatever the storage type, and make sure that nothing was missing or left over."""
    with empty_matrices_are_fine():
        model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def load_tensors(folder: Path, dtype: torch.dtype | None = torch.float64) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as shard:
            tensors |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    return {name: tensor if dtype is None else tensor.to(dtype) for name, tensor in tensors.items()}


def as_deepseek_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Name what is no attention as DeepSeek-V3 does: experts one by one, however they were stored, and none fused."""
    named = {}
    for name, tensor in tensors.items():
        if name.endswith("mlp.experts.gate_up_proj"):
            for index, (gate, up) in enumerate(zip(*tensor.chunk(2, dim=1), strict=True)):
                prefix = name.replace("gate_up_proj", str(index))
                named |= {f"{prefix}.gate_proj.weight": gate, f"{prefix}.up_proj.weight": up}
        elif name.endswith("mlp.experts.down_proj"):
            for index, down in enumerate(tensor):
                named[name.replace("down_proj", f"{index}.down_proj.weight")] = down
        elif name.endswith("mlp.gate_up_proj.weight"):
            for part, half in zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True):
                named[name.replace("gate_up_proj", part)] = half
        else:
            for mixtral, deepseek in (
                ("block_sparse_moe", "mlp"), (".w1.", ".gate_proj."), (".w3.", ".up_proj."), (".w2.", ".down_proj."),
            ):  # fmt: skip
                name = name.replace(mixtral, deepseek)
            named[name] = tensor
    return named


def rewritten(folder: Path, change) -> Path:
    """Change the weights of a checkpoint of one file."""
    tensors = load_tensors(folder, dtype=None)
    tensors = {name: change(name, tensor) for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def checkpoint_with_a_common_direction(folder: Path, **choices: Any) -> Path:
    """Give every token something in common, as training does: random models have no near-constant functional."""

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name == "model.embed_tokens.weight":
            tensor[:, :6] += 2
        return tensor

    return rewritten(tiny_checkpoint(folder, **choices), change)


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def some_ids(batch=2, tokens=TOKENS):
    return torch.randint(2, 389, (batch, tokens), generator=torch.Generator().manual_seed(5))


@torch.inference_mode()
def logits(model, ids):
    return model(ids).logits


@torch.inference_mode()
def decoded_logits(model, ids, steps: int):
    """Return the logits of the last tokens, decoded one by one with the cache that the model is given by default."""
    parameters = inspect.signature(type(model).forward).parameters
    name = "cache" if "cache" in parameters else "past_key_values"  # before transformers 5.24
    cache = {name: DynamicCache(config=model.config), "use_cache": True}
    model(ids[:, :-steps], **cache)
    return torch.cat([model(ids[:, [i]], **cache).logits for i in range(ids.shape[1] - steps, ids.shape[1])], dim=1)


def difference(found, expected) -> float:
    """Return the largest difference of two logits, in standard deviations of the logits."""
    return ((found - expected).abs().max() / expected.std()).item()


def greedy(model, *, use_cache: bool = True) -> list[int]:
    ids = some_ids(1, 20)
    with torch.inference_mode():
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, use_cache=use_cache,
            pad_token_id=0, eos_token_id=None,
        )[0].tolist()  # fmt: skip


def asked(source: Path, output: Path, calibration_text: Path | None = None, **choices: Any) -> ConvertRequest:
    fitted = {} if calibration_text is None else {"calibration": str(calibration_text), **CALIBRATION}
    return ConvertRequest(model=str(source), output_dir=output, **{**fitted, **choices})


def plain_grid(config: dict[str, Any]) -> torch.Tensor:
    size = config["qk_rope_head_dim"]
    return config["rope_theta"] ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)


def stored_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits of a converted checkpoint as the formulas say, with the eps its config names, in float64."""
    config, tensors = read_config(folder), load_tensors(folder)

    def attend(index: int, x: torch.Tensor) -> torch.Tensor:
        prefix = f"model.layers.{index}.self_attn."
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        return stored_attention(own, config, x, plain_grid(config))

    num_layers, eps = config["num_hidden_layers"], config["rms_norm_eps"]
    return model_logits(tensors, attend, ids, num_layers=num_layers, eps=eps)


def factor_logits(source: Path, layers: list, frequencies: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits of the source with its attention replaced by plain factors, in float64."""

    def attend(index: int, x: torch.Tensor) -> torch.Tensor:
        layer = layers[index]
        if layer.output_bias is None:
            return latent_attention_matrix(layer, x, frequencies)
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        return latent_attention_matrix(layer, x, frequencies) + layer.output_bias

    config, tensors = read_config(source), as_deepseek_names(load_tensors(source))
    num_layers, eps, top_k = config["num_hidden_layers"], config["rms_norm_eps"], config.get("num_experts_per_tok", 0)
    return model_logits(tensors, attend, ids, num_layers=num_layers, eps=eps, top_k=top_k)


def convert_and_keep(*args: Any, **choices: Any):
    """Convert and return the report and the plain factors of every layer, before they were folded."""
    factors = []
    fold = walk.to_deepseek

    def kept(layer, *args, **kwargs):
        factors.append(layer.map(torch.Tensor.double))
        return fold(layer, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walk, "to_deepseek", kept)
        report = convert(asked(*args, **choices))
    return report, factors


def contents(folder: Path) -> dict[str, bytes | dict]:
    """Return every file; the recipe and the report without the folder's own name and the time it took."""
    files = {}
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        if path.name == "transmla_report.json":
            content = json.loads(content)
            del content["seconds"], content["plan"]["output_dir"]
        elif path.name == "transmla_recipe.yaml":
            content = b"\n".join(line for line in content.splitlines() if not line.startswith(b"output_dir:"))
        files[path.name] = content
    return files


def interrupt_after(monkeypatch, layers: int, error: BaseException) -> None:
    """Fail between the work of one layer and the next, after ``layers`` have been noted."""
    append = Journal.append

    def interrupted(self, entry):
        append(self, entry)
        if len(self.entries) == layers:
            raise error

    monkeypatch.setattr(Journal, "append", interrupted)
