"""Models too large for this machine, planned from their configs and headers."""

from __future__ import annotations

import pytest

from tests.convert.models import asked
from tests.support.holes import MODELS, make_holes
from transmla.convert import plan as plan_module


@pytest.fixture
def planned(tmp_path, monkeypatch):
    """Plan the conversion of a checkpoint of which there is the config alone, and headers before holes."""

    def plan(name, **choices):
        folder = tmp_path / "source"
        make_holes(folder, MODELS[name])
        monkeypatch.setattr(plan_module, "check_free_space", lambda *args: None)
        return plan_module.plan_conversion(asked(folder, tmp_path / "out", "text.txt", **choices))

    return plan


def test_a_llama_of_70_billion_parameters_fits_vllm_at_a_quarter_of_the_cache(planned):
    summary = planned("Llama 70B", kv_ratio=0.25, engine="vllm").summary
    assert (summary.kv_lora_rank, summary.qk_rope_head_dim) == (448, 64)
    assert summary.source_kv_bytes_per_token == 2 * 80 * 2 * 8 * 128
    assert summary.kv_bytes_per_token == 2 * 80 * 512
    assert {"transformers", "vllm", "llama.cpp"} <= set(summary.engines)
    assert 130e9 < summary.output_bytes < 160e9
    # One layer at work, not the model: 856 million parameters in float32, three times.
    assert summary.peak_memory_bytes < 60e9
    assert summary.num_shards > 20


def test_a_mixtral_of_8_times_22_billion_parameters_keeps_its_experts(planned):
    plan = planned("Mixtral 8x22B", kv_ratio=0.25)
    names = {tensor.name: tensor.shape for tensor in plan.layer_tensors(55)}
    assert names["model.layers.55.mlp.experts.7.gate_proj.weight"] == (16384, 6144)
    assert names["model.layers.55.mlp.experts.7.down_proj.weight"] == (6144, 16384)
    assert sum(1 for name in names if ".experts." in name) == 3 * 8
    assert (plan.config["n_routed_experts"], plan.config["num_experts_per_tok"]) == (8, 2)
    assert 270e9 < plan.summary.output_bytes < 300e9
    assert plan.summary.engines == ("transformers",)
