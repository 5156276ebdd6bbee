"""Keys of config.json that nothing reads: told, and nothing else is."""

from __future__ import annotations

import json

import pytest

from tests.factory import FAMILIES as CONFIGS
from tests.factory import SIZES, tiny_checkpoint
from transmla.arch.spec import describe, load_config


@pytest.fixture
def unread(tmp_path):
    def read(family="llama", **keys):
        _, fields = CONFIGS.get(family, CONFIGS["qwen2"])
        (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **SIZES, **fields, **keys}))
        return describe(load_config(tmp_path)).unread

    return read


@pytest.mark.parametrize("family", CONFIGS)
def test_of_what_transformers_writes_nothing_is_told(tmp_path, family):
    assert describe(load_config(tiny_checkpoint(tmp_path, family=family))).unread == frozenset()


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("llama", {"max_sequence_length": 16384, "tokenizer_class": "LlamaTokenizer", "pretraining_tp": 2}),
        ("llama", {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"}}),
        ("qwen2", {"use_mrope": False, "max_window_layers": 28, "_attn_implementation_autoset": True}),
        ("mimo", {"use_mrope": False, "num_nextn_predict_layers": 1, "attention_bias": True}),
        ("phi3", {"embd_pdrop": 0.1, "resid_pdrop": 0.1, "lm_head_bias": False, "partial_rotary_factor": 1.0}),
        ("qwen3_moe", {"router_aux_loss_coef": 0.1, "output_router_logits": False, "norm_topk_prob": True}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
        ("llama", {"temperature": 0.7, "torch_dtype": "bfloat16", "num_labels": 3, "unsloth_version": "2024.9"}),
    ],
)
def test_what_is_known_to_decide_nothing_is_not_told(unread, family, keys):
    assert not unread(family, **keys)


@pytest.mark.parametrize(
    ("family", "keys", "told"),
    [
        ("llama", {"logit_scale": 0.5, "embedding_multiplier": 12.0}, ("embedding_multiplier", "logit_scale")),
        ("qwen3_moe", {"dual_chunk_attention_config": {"chunk_size": 9}}, ("dual_chunk_attention_config",)),
        ("qwen3_moe", {"shared_expert_intermediate_size": 9}, ("shared_expert_intermediate_size",)),
        ("phi3", {"auto_map": {"AutoModel": "x.Y"}, "lm_head_bias": True}, ("lm_head_bias",)),
        ("mimo", {"use_mrope": True}, ("use_mrope",)),
        ("qwen2", {"rope_scaling": {"type": "default", "mrope_section": [1, 2]}}, ("rope_parameters.mrope_section",)),
        ("llama", {"rope_parameters": {"rope_type": "default", "factor": 4.0}}, ("rope_parameters.factor",)),
    ],
)
def test_what_nobody_reads_is_told(unread, family, keys, told):
    assert unread(family, **keys) == {*told}
