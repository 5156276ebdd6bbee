"""Rows for models that are not converted: one place each, and a sentence that a person can read."""

import re

import pytest

from transmla.arch import refused
from transmla.arch.families import FAMILIES
from transmla.arch.refused import LATER, REFUSED, check_not_refused, find_refusal
from transmla.errors import UnsupportedModelError


def said(**config):
    with pytest.raises(UnsupportedModelError) as caught:
        check_not_refused(config)
    return str(caught.value)


def test_no_model_type_has_two_rows():
    assert not set(REFUSED) & set(LATER)
    assert not (set(REFUSED) | set(LATER)) & set(FAMILIES)
    # A variant changes what a table says; it is not the only word on a model type.
    assert {variant.model_type for variant in refused._VARIANTS} <= set(REFUSED) | set(LATER)


@pytest.mark.parametrize("model_type", [*REFUSED, *LATER])
def test_every_row_makes_a_sentence(model_type):
    found = said(model_type=model_type, hidden_size=4096)
    verdict = "is not converted yet" if model_type in LATER else "cannot be converted"
    assert re.fullmatch(rf"This {re.escape(model_type)} model {verdict}: [^\n{{}}]+\.", found)
    assert ("could be held" in found or "can be folded" in found) is (model_type in LATER)


@pytest.mark.parametrize("model_type", ["glm_moe_dsa", "minicpm3", "llama", "a type of tomorrow", None, 7])
def test_any_config_with_a_latent_rank_has_latent_attention(model_type):
    assert "it has latent attention already (config.json: kv_lora_rank = 512)" in said(
        model_type=model_type, kv_lora_rank=512
    )
    assert find_refusal({"model_type": "llama", "kv_lora_rank": None}) is None


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "baichuan", "hidden_size": 4096}, "could be held"),
        ({"model_type": "baichuan", "hidden_size": 5120}, "ALiBi"),
        ({"model_type": "chatglm"}, "half of each head"),
        ({"model_type": "chatglm", "position_encoding_2d": True}, "two dimensions"),
        ({"model_type": "deepseek", "norm_topk_prob": False}, "share among all of them"),
        ({"model_type": "deepseek", "norm_topk_prob": True}, "could be held"),
        ({"model_type": "ministral3", "rope_parameters": {"llama_4_scaling_beta": 0.1}}, "there it could be held"),
        ({"model_type": "ministral3", "rope_parameters": {"llama_4_scaling_beta": 0}}, "always 1"),
        ({"model_type": "ministral3"}, "a query scale by position"),
        ({"model_type": "qwen"}, "use_logn_attn"),
        ({"model_type": "qwen", "use_logn_attn": False, "use_dynamic_ntk": False}, "could be held"),
        ({"model_type": "granitemoehybrid", "layer_types": ["mamba", "attention"]}, "no attention"),
        ({"model_type": "granitemoehybrid", "layer_types": ["attention"], "num_local_experts": 0}, "can be folded"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "an encoder with a decoder"),
    ],
)
def test_a_row_may_depend_on_the_config(config, words):
    assert words in said(**config)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "besides (config.json: quantization_config, fp8)"),
        ({"compression_config": {"format": "x"}}, "besides (config.json: compression_config, few bits)"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "besides (config.json: quantization, 4 bits)"),
    ],
)
def test_what_else_is_in_the_way_is_told_too(keys, words):
    assert words in said(model_type="granite", **keys)


@pytest.mark.parametrize("config", [{}, {"model_type": "novel"}, {"model_type": "llama"}, {"model_type": ["llama"]}])
def test_what_no_row_is_against_passes(config):
    check_not_refused(config)
