"""Weights that do not stand for themselves are refused by their headers, whatever the config says of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.convert.sources import refusal
from tests.factory import tiny_checkpoint
from tests.published.checkpoints import write_holes
from transmla.checkpoint.safetensors import SINGLE_FILE
from transmla.config import InspectRequest
from transmla.convert.inspection import inspect


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("quantized") / "llama")


SCALES = {"model.layers.0.self_attn.q_proj.weight_scale": ("F32", ())}
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("beside", [{}, SCALES])
@pytest.mark.parametrize(
    "spelling",
    [*(f"F8_{kind}" for kind in ("E4M3", "E5M2", "E8M0", "E4M3FNUZ", "E5M2FNUZ")), "F4", "F6_E2M3", "I8", "U8", "U32"],
)
def test_weights_that_are_no_floats_are_refused_whatever_the_config_says(llama, tmp_path, spelling, beside):
    folder = shutil.copytree(llama, tmp_path / "source")
    tensors = {name: ("F32", tuple(tensor.shape)) for name, tensor in load_file(folder / SINGLE_FILE).items()}
    write_holes(folder / SINGLE_FILE, tensors | {Q: (spelling, tensors[Q][1])} | beside)
    found = refusal(folder)
    assert f"The weights are quantised: {Q} is stored as {spelling}" in found
    assert ("weight_scale beside it" in found) is bool(beside)
    assert "hf_quant_config.json" not in found
    (folder / "hf_quant_config.json").write_text("{}")
    assert "hf_quant_config.json beside it" in refusal(folder)


@pytest.mark.parametrize(
    ("name", "spelling", "shape"),
    [("embed_tokens", "I8", (401, 48)), ("norm", "F8_E5M2", (48,)), ("layers.1.mlp.down_proj", "U8", (48, 10))],
)
def test_every_tensor_that_is_read_counts(llama, tmp_path, name, spelling, shape):
    folder = shutil.copytree(llama, tmp_path / "source")
    tensors = {name: ("BF16", tuple(tensor.shape)) for name, tensor in load_file(folder / SINGLE_FILE).items()}
    write_holes(folder / SINGLE_FILE, tensors | {f"model.{name}.weight": (spelling, shape)})
    assert f"model.{name}.weight is stored as {spelling}" in refusal(folder)


@pytest.mark.parametrize(
    "instead",
    [
        {"qweight": ("I32", (6, 96)), "qzeros": ("I32", (1, 12)), "scales": ("F16", (1, 96))},
        {"weight_packed": ("I32", (96, 6)), "weight_scale": ("BF16", (96, 1)), "weight_shape": ("I64", (2,))},
        {"weight": ("U8", (96, 24)), "weight_scale": ("F8_E4M3", (96, 3)), "weight_scale_2": ("F32", ())},
        {"weight": ("U8", (2304, 1)), "weight.absmax": ("F32", (72,)), "weight.quant_map": ("F32", (16,))},
        {"weight": ("U32", (96, 6)), "scales": ("BF16", (96, 1)), "biases": ("BF16", (96, 1))},
        {"W_q": ("U8", (48, 48)), "meta": ("F32", ())},
        {"codes": ("I16", (96, 6, 1)), "codebooks": ("F16", (1, 256, 1, 8)), "scales": ("F16", (96, 1, 1, 1))},
        # As wide as floats, and yet to be multiplied.
        {"weight": ("BF16", (96, 48)), "weight_scale": ("BF16", (96, 1))},
        {"weight": ("BF16", (96, 48)), "weight.scale": ("BF16", (96, 1))},
        {"weight": ("BF16", (96, 48)), "pre_quant_scale": ("BF16", (48,)), "input_scale": ("F32", ())},
        {"weight": ("BF16", (96, 48)), "ZeroPoint_and_scale": ("BF16", (48,))},
    ],
    ids=[
        *("GPTQ", "compressed-tensors", "NVFP4", "bitsandbytes", "MLX", "HQQ", "AQLM", "not yet multiplied"),
        *("scale of a weight", "smoothed", "a name of its own"),
    ],
)
def test_the_layouts_of_quantisers_are_known_without_a_word_in_the_config(llama, tmp_path, instead):
    folder = shutil.copytree(llama, tmp_path / "source")
    tensors = {name: ("BF16", tuple(tensor.shape)) for name, tensor in load_file(folder / SINGLE_FILE).items()}
    del tensors[Q]
    write_holes(
        folder / SINGLE_FILE, tensors | {Q.removesuffix("weight") + name: what for name, what in instead.items()}
    )
    (folder / "quantize_config.json").write_text("{}")
    found = refusal(folder)
    assert "The weights are quantised" in found
    assert "quantize_config.json" in found
    assert "is absent" not in found


@pytest.mark.parametrize("scale", ["k_proj.k_scale", "v_proj.output_scale", "q_proj.input_scale", "k_scale"])
def test_scales_of_what_goes_through_leave_the_weights_what_they_are(llama, tmp_path, scale):
    folder = shutil.copytree(llama, tmp_path / "source")
    tensors = {name: ("F32", tuple(tensor.shape)) for name, tensor in load_file(folder / SINGLE_FILE).items()}
    name = f"model.layers.0.self_attn.{scale}"
    write_holes(folder / SINGLE_FILE, tensors | {name: ("F32", ())})
    assert inspect(InspectRequest(model=str(folder))).left_over == (name,)


def test_an_unknown_type_ends_in_a_sentence(llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "source")
    header = json.dumps({"w": {"dtype": "F3", "shape": [8], "data_offsets": [0, 3]}}).encode()
    (folder / SINGLE_FILE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(3))
    assert "Tensor w in model.safetensors is stored as F3" in refusal(folder)


def test_such_a_head_is_judged_like_every_other_tensor(llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "source")
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: ("BF16", tuple(tensor.shape)) for name, tensor in load_file(folder / SINGLE_FILE).items()}
    write_holes(folder / SINGLE_FILE, tensors | {"lm_head.weight": ("I8", (401, 48))})
    assert "lm_head.weight is stored as I8" in refusal(folder)
    write_holes(folder / SINGLE_FILE, tensors | {"lm_head.weight": ("BF16", (400, 48))})
    assert "Tensor lm_head.weight has the shape [400, 48]" in refusal(folder)


@pytest.mark.parametrize(
    "instead",
    [
        {"_weight_qdata": ("I8", (48, 48)), "_weight_scale": ("F32", (48, 1))},  # torchao
        {"weight._data": ("I8", (48, 48)), "weight._scale": ("F32", (48, 1))},  # quanto
        {"trellis": ("I16", (3, 3, 64)), "suh": ("F16", (48,))},  # EXL3
        {"q_weight": ("I32", (12, 48)), "q_scale": ("I32", (1, 6))},  # EXL2
    ],
)
def test_what_stands_in_the_place_of_a_weight_is_named(llama, tmp_path, instead):
    folder = shutil.copytree(llama, tmp_path / "source")
    tensors = {name: ("F32", tuple(tensor.shape)) for name, tensor in load_file(folder / SINGLE_FILE).items()}
    del tensors[Q]
    module = Q.removesuffix("weight")
    write_holes(folder / SINGLE_FILE, tensors | {module + name: value for name, value in instead.items()})
    found = refusal(folder)
    assert found.startswith(f"The weights are quantised: {module}")


def test_a_quantised_head_is_quantised_and_not_absent(llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "source")
    tensors = {name: ("F32", tuple(tensor.shape)) for name, tensor in load_file(folder / SINGLE_FILE).items()}
    del tensors["lm_head.weight"]
    write_holes(
        folder / SINGLE_FILE, tensors | {"lm_head.qweight": ("I32", (6, 401)), "lm_head.scales": ("F16", (1, 401))}
    )
    assert refusal(folder).startswith("The weights are quantised")
