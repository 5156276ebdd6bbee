"""Checkpoints that hold more, or hold it otherwise, than the class that computes them."""

from __future__ import annotations

import json

from safetensors.torch import load_file, save_file

from tests.convert.examples import randn
from tests.convert.models import asked, difference, load, load_tensors, logits, read_config, rewritten, some_ids
from tests.factory import tiny_checkpoint
from transmla.convert.plan import plan_conversion
from transmla.convert.run import convert


def test_what_predicts_further_tokens_is_left_over_and_said(tmp_path):
    source = tiny_checkpoint(tmp_path / "source", family="qwen2")
    model = load(source)
    config = {**read_config(source), "model_type": "mimo", "architectures": ["MiMoForCausalLM"]}
    config |= {
        "num_nextn_predict_layers": 1,
        "auto_map": {"AutoConfig": "configuration_mimo.MiMoConfig"},
        "use_mrope": True,
    }
    (source / "config.json").write_text(json.dumps(config))
    tensors = load_file(source / "model.safetensors")
    further = {f"model.mtp_layers.0.{name}.weight": randn(3, seed=0).float() for name in ("input_proj", "a_norm")}
    tables = {"model.layers.0.self_attn.rotary_emb.inv_freq": randn(8, seed=1).float()}
    save_file(tensors | further | tables, source / "model.safetensors", metadata={"format": "pt"})

    report = convert(asked(source, tmp_path / "out", exact=True))
    assert report.plan.family == "MiMo"
    assert report.plan.unread == ("use_mrope",)
    assert report.plan.left_over == ("model.mtp_layers.0.a_norm.weight", "model.mtp_layers.0.input_proj.weight")
    assert not any("mtp" in name for name in load_tensors(tmp_path / "out"))
    ids = some_ids()
    assert difference(logits(load(tmp_path / "out"), ids), logits(model, ids)) < 1e-4


def test_weights_that_are_rounded_because_the_embedding_is_narrower_are_told(tmp_path):
    def halve(name, tensor):
        return tensor.bfloat16() if "layers.1" not in name else tensor

    source = rewritten(tiny_checkpoint(tmp_path / "source"), halve)
    told = plan_conversion(asked(source, tmp_path / "out", exact=True)).summary.warnings
    assert len(told) == 1
    assert told[0].startswith("9 tensors are stored in float32, model.layers.1.")
    kept = plan_conversion(asked(source, tmp_path / "out", exact=True, dtype="float32"))
    assert kept.summary.warnings == ()
