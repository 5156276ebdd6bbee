"""Mixtures of experts: how they are routed, stored and refused."""

from __future__ import annotations

import math
import weakref

import pytest
import torch

from tests.convert.examples import randn
from tests.convert.models import (
    asked,
    checkpoint_with_a_common_direction,
    difference,
    load,
    load_tensors,
    logits,
    read_config,
    rewritten,
    some_ids,
)
from tests.factory import tiny_checkpoint
from transmla.arch.experts import Expert
from transmla.convert.fit.routing import RouterInputs
from transmla.convert.plan import plan_conversion
from transmla.convert.run import convert
from transmla.convert.source_layers import read_layer
from transmla.errors import UnsupportedModelError, UsageError

SIZES = {"kv_lora_rank": 44, "qk_rope_head_dim": 16}


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe"])
def source(request, tmp_path_factory):
    return checkpoint_with_a_common_direction(tmp_path_factory.mktemp(request.param), family=request.param)


def softmax_weights(scores: torch.Tensor, top_k: int) -> dict[int, float]:
    chosen = scores.argsort(descending=True)[:top_k].tolist()
    total = sum(math.exp(scores[expert]) for expert in chosen)
    return {expert: math.exp(scores[expert]) / total for expert in chosen}


def sigmoid_weights(scores: torch.Tensor, top_k: int) -> dict[int, float]:
    chosen = scores.argsort(descending=True)[:top_k].tolist()
    total = sum(1 / (1 + math.exp(-scores[expert])) for expert in chosen)
    return {expert: 1 / (1 + math.exp(-scores[expert])) / total for expert in chosen}


def router_inputs(seed: int, *, tokens: int = 400, hidden: int = 12) -> torch.Tensor:
    inputs = randn(tokens, hidden, seed=seed).float()
    inputs[:, :3] = 2 + 0.3 * inputs[:, :3]
    return inputs


@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_sigmoids_weigh_the_experts_as_a_softmax_does(dtype, off):
    router = randn(7, 12, seed=1).to(dtype)
    seen = RouterInputs(12, torch.device("cpu"))
    seen.add(router_inputs(2)[None], heldout=False)
    seen.add(router_inputs(3)[None], heldout=True)
    stored, error = seen.sigmoid_router(router, top_k=2, dtype=dtype)
    assert stored.dtype == dtype
    assert error < off
    naive = 0.0
    for token in router_inputs(4).double():
        wanted = softmax_weights(router.double() @ token, 2)
        found = sigmoid_weights(stored.double() @ token, 2)
        if dtype == torch.float32:
            assert found.keys() == wanted.keys()
            assert all(abs(found[expert] - wanted[expert]) < off for expert in wanted)
        unchanged = sigmoid_weights(router.double() @ token, 2)
        naive = max(naive, *(abs(unchanged[expert] - wanted[expert]) for expert in wanted))
    assert naive > 0.2  # what it would be otherwise


def test_a_router_that_nothing_can_lower_is_reported():
    seen = RouterInputs(12, torch.device("cpu"))
    for seed, heldout in ((2, False), (3, True)):
        seen.add(randn(1, 400, 12, seed=seed).float(), heldout=heldout)
    _, error = seen.sigmoid_router(randn(7, 12, seed=1).float(), top_k=2, dtype=torch.float32)
    assert error > 0.05


@pytest.mark.parametrize("choices", [{}, {"heal_steps": 5}, {"method": "rorope"}])
def test_both_layouts_give_the_same_bytes(source, calibration_text, tmp_path, choices):
    family = read_config(source)["model_type"]
    packed = checkpoint_with_a_common_direction(tmp_path / "packed", family=family, packed=True)
    found = []
    for name, folder in (("single", source), ("both", packed)):
        report = convert(asked(folder, tmp_path / name, calibration_text, **SIZES, **choices))
        assert all(layer.routing_error < 1e-5 for layer in report.layers)  # measured 3e-6
        found.append(load_tensors(tmp_path / name, dtype=None))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("packed", [False, True])
def test_one_expert_is_in_memory_at_a_time(calibration_text, tmp_path, monkeypatch, packed):
    source = checkpoint_with_a_common_direction(tmp_path / "source", family="mixtral", packed=packed)
    alive: list[weakref.ref] = []
    most = []
    read = Expert.__init__

    def watched(self, index, gate, up, down):
        # A copy on its way to the device has the index of the one that it copies.
        alive[:] = [ref for ref in alive if ref() is not None and ref().index != index]
        most.append(len(alive))
        alive.append(weakref.ref(self))
        read(self, index, gate, up, down)

    monkeypatch.setattr(Expert, "__init__", watched)
    plan = plan_conversion(asked(source, tmp_path / "out", calibration_text, **SIZES))
    assert not any("experts" in name for name in read_layer(plan, 0))
    convert(asked(source, tmp_path / "out", calibration_text, **SIZES))
    # Read once a layer, and cast once for both streams in all layers but the last.
    experts = plan.spec.mixture.num_experts
    assert len(most) == experts * (2 + 1)
    assert max(most) == 0


def test_without_lower_routers_it_would_be_another_model(calibration_text, tmp_path):
    source = checkpoint_with_a_common_direction(tmp_path / "source", family="mixtral")
    convert(asked(source, tmp_path / "out", calibration_text, exact=True))
    wanted = logits(load(source), some_ids())
    assert difference(logits(load(tmp_path / "out"), some_ids()), wanted) < 1e-4
    plain = load_tensors(source, dtype=None)

    def as_it_was(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return plain[name.replace("mlp", "block_sparse_moe")] if name.endswith("mlp.gate.weight") else tensor

    assert difference(logits(load(rewritten(tmp_path / "out", as_it_was)), some_ids()), wanted) > 0.1


def test_in_bfloat16_few_tokens_meet_other_experts(calibration_text, tmp_path):
    """A rounded router chooses otherwise where two experts are nearly as good."""
    source = checkpoint_with_a_common_direction(tmp_path / "source", family="mixtral", dtype=torch.bfloat16)
    convert(asked(source, tmp_path / "out", calibration_text, exact=True))
    found, wanted = (logits(load(folder), some_ids()) for folder in (tmp_path / "out", source))
    off = (found - wanted).abs().amax(-1) / wanted.std()
    assert (off > 0.1).float().mean() < 0.05


def test_engines_that_insist_get_a_shared_expert_of_zeros(calibration_text, tmp_path):
    source = checkpoint_with_a_common_direction(tmp_path / "source", family="mixtral")
    plain = plan_conversion(asked(source, tmp_path / "plain", calibration_text, **SIZES))
    assert plain.summary.engines == ("transformers",)
    report = convert(asked(source, tmp_path / "out", calibration_text, engine="llama.cpp", **SIZES))
    assert {"transformers", "llama.cpp", "mlx"} <= set(report.plan.engines)
    assert read_config(tmp_path / "out")["n_shared_experts"] == 1
    shared = [tensor for name, tensor in load_tensors(tmp_path / "out").items() if "shared_experts" in name]
    assert len(shared) == 2 * 3
    assert all(tensor.numel() and not tensor.any() for tensor in shared)
    convert(asked(source, tmp_path / "without", calibration_text, **SIZES))
    found = logits(load(tmp_path / "out"), some_ids())
    assert difference(found, logits(load(tmp_path / "without"), some_ids())) < 1e-5


@pytest.mark.parametrize("choices", [{"exact": True}, {"calibration": "none", **SIZES}])
def test_the_routing_needs_a_text(tmp_path, choices):
    source = tiny_checkpoint(tmp_path / "source", family="mixtral")
    with pytest.raises(UsageError, match="routing of the experts needs a text"):
        plan_conversion(asked(source, tmp_path / "out", **choices))


@pytest.mark.parametrize(
    ("family", "override", "message"),
    [
        ("qwen3_moe", {"norm_topk_prob": False}, "share among all of them.*norm_topk_prob = False"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "dense layers between mixtures"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "dense layers between mixtures"),
    ],
)
def test_what_no_router_of_the_target_does_is_refused(tmp_path, family, override, message):
    source = tiny_checkpoint(tmp_path / "source", family=family, **override)
    with pytest.raises(UnsupportedModelError, match=message):
        plan_conversion(asked(source, tmp_path / "out", "text.txt", **SIZES))


def test_a_mixture_of_one_expert_is_refused(tmp_path):
    source = tiny_checkpoint(tmp_path / "one", family="mixtral", num_local_experts=1, num_experts_per_tok=1)
    with pytest.raises(UnsupportedModelError, match=r"two experts or more.*num_local_experts = 1"):
        plan_conversion(asked(source, tmp_path / "out", exact=True, calibration=("none",)))
