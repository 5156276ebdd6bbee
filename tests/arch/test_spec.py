import json
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from tests.factory import FAMILIES as CONFIGS
from tests.factory import SIZES, tiny_checkpoint
from transmla.arch.families import FAMILIES
from transmla.arch.spec import describe, load_config
from transmla.errors import CheckpointError, TransMLAError, UnsupportedModelError

ROPE = {
    "default": {"rope_theta": 500000.0},
    "whole number": {"rope_theta": 10000},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 64,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1 + index / 8 for index in range(8)],
    "long_factor": [4.0 + index for index in range(8)],
    "original_max_position_embeddings": 64,
}
# Phi-3 has no head_dim of its own; "su" is what its first checkpoints call LongRoPE.
LONG_PHI3 = {
    "head_dim": 8,
    "rope_parameters": {**LONG, "rope_type": "su", "short_factor": [1, 1.2, 1.5, 3], "long_factor": [4, 5, 6, 7]},
    "original_max_position_embeddings": 64,
}


@pytest.fixture
def written(tmp_path):
    """Describe what a ``config.json`` with these keys says; a key whose value is ``...`` is left out."""

    def read(family="llama", context=None, **keys):
        _, fields = CONFIGS[family]
        content = {"model_type": family, "hidden_act": "silu", **SIZES, **fields, **keys}
        content = {key: value for key, value in content.items() if value is not ...}
        (tmp_path / "config.json").write_text(json.dumps(content))
        return describe(load_config(tmp_path), max_position_embeddings=context)

    return read


@pytest.mark.parametrize("family", CONFIGS)
def test_a_checkpoint_is_described(tmp_path, family):
    # Ministral always has a window; for the others this says nothing new.
    spec = describe(load_config(tiny_checkpoint(tmp_path, family=family)), max_position_embeddings=512)
    assert spec.family is FAMILIES[family]
    assert spec.model_type == family
    sizes = {**SIZES, **CONFIGS[family][1]}
    for key in SIZES.keys() & vars(spec).keys():
        assert getattr(spec, key) == sizes[key]
    assert (spec.rope_type, spec.rope_theta) == ("default", 10000.0)
    assert spec.num_pairs == 8
    assert spec.num_key_value_groups == 3
    assert spec.key_size == 32
    assert spec.cache_numbers == 64
    assert spec.layer_prefix(7) == "model.layers.7."


@pytest.mark.parametrize("family", CONFIGS)
def test_a_head_dim_that_is_not_given_is_computed(written, family):
    if family.startswith("qwen3"):  # has a size of its own, whatever the others
        assert written(family, head_dim=...).head_dim == (128 if family == "qwen3" else 8)
        return
    assert written(family, context=512, head_dim=...).head_dim == 8
    assert written(family, context=512, head_dim=None).head_dim == 8


@pytest.mark.parametrize(
    ("family", "keys", "biases"),
    [
        ("llama", {}, ""),
        ("llama", {"attention_bias": True}, "qkvo"),
        ("mistral", {}, ""),
        ("qwen2", {}, "qkv"),
        ("qwen3", {}, ""),
        ("qwen3", {"attention_bias": True}, "qkvo"),
    ],
)
def test_which_projections_have_biases(written, family, keys, biases):
    spec = written(family, **keys)
    assert spec.biases == {f"{kind}_proj" for kind in biases}


def test_without_key_value_heads_there_are_as_many_as_heads(written):
    assert written(num_key_value_heads=...).num_key_value_heads == 6


@pytest.mark.parametrize(
    ("family", "rope"),
    # Phi-3 knows plain RoPE and LongRoPE only.
    [(family, rope) for family in CONFIGS for rope in ROPE if family != "phi3" or rope in ("default", "whole number")],
)
def test_frequencies_are_the_stock_models_bit_for_bit(tmp_path, family, rope):
    tiny_checkpoint(tmp_path, family=family, rope_parameters=ROPE[rope])
    spec = describe(load_config(tmp_path), max_position_embeddings=512)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(spec.frequencies, model.model.rotary_emb.inv_freq)
    assert spec.rope_theta == ROPE[rope]["rope_theta"]
    assert spec.rope_type == ROPE[rope].get("rope_type", "default")
    assert spec.logit_scale == model.model.rotary_emb.attention_scaling**2
    assert (spec.logit_scale == 1) is (rope != "yarn")


def test_frequencies_of_an_older_config_are_the_same(written):
    llama3 = dict(ROPE["llama3"])
    new = written(rope_parameters=llama3)
    old = written(rope_parameters=..., rope_theta=llama3.pop("rope_theta"), rope_scaling=llama3)
    assert torch.equal(new.frequencies, old.frequencies)
    assert not torch.equal(new.frequencies, written().frequencies)


@pytest.mark.parametrize(
    ("family", "keys", "message"),
    [
        ("mistral", {"attention_bias": True}, "This Mistral .*its attention has no biases .*attention_bias = True"),
        ("llama", {"is_causal": False}, "This Llama .*attend to those after them, too, .*is_causal = False"),
        ("qwen2", {"is_causal": None}, "This Qwen2 .*attend to those after them, too, .*is_causal = None"),
        (
            "qwen3",
            {"per_layer_config": {"1": {"rms_norm_eps": 0.1}}},
            "Qwen3 .*its layers differ.*per_layer_config",
        ),
        ("mistral", {"per_layer_config": {"1": {"head_dim": 8}}}, "This Mistral .*its layers differ.*per_layer_config"),
        ("mixtral", {"transformers_weights": "a.safetensors"}, "another name .*transformers_weights = 'a.safetensors'"),
        ("llama", {"return_dict": False}, "own classes fail .*return_dict = False"),
        ("phi3", {"kv_sharing_modes": ["store", "reuse"]}, "layers share a cache.*kv_sharing_modes = "),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "several kinds.*has 'full_attention'"),
        ("llama", {"mlp_bias": True}, "no biases in its MLP .*mlp_bias = True"),
        ("llama", {"hidden_act": "gelu"}, "silu only .*hidden_act = 'gelu'"),
        (
            "llama",
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128], "more": "x" * 99}},
            r"full-precision checkpoint .*quantization_config = \{'quant_method': 'fp8', .{1,40}\.\.\.\)",
        ),
        ("llama", {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}, "RoPE type 'proportional'"),
        ("llama", {"rope_parameters": {"rope_type": ["linear"]}}, r"RoPE type \['linear'\]"),
        ("llama", {"partial_rotary_factor": 0.5}, "only in part .*partial_rotary_factor = 0.5"),
        ("mistral", {"partial_rotary_factor": "half"}, "only in part .*partial_rotary_factor = 'half'"),
        ("llama", {"model_type": "t5"}, "'t5' in .*config.json is not supported; supported: llama, mimo, ministral"),
        ("llama", {"model_type": "gpt_oss"}, "This gpt_oss model cannot be converted: its softmax has a learnt sink"),
        ("llama", {"model_type": "bloom"}, "ALiBi in the place of RoPE"),
        ("llama", {"model_type": ...}, "model_type None"),
        ("llama", {"model_type": ["llama"]}, r"model_type \['llama'\]"),
        # transformers reads this one as another family.
        ("mistral", {"layer_types": ["sliding_attention"] * 2, "sliding_window": 99}, "This Ministral .*_window = 99"),
    ],
)
def test_what_the_target_cannot_hold_is_refused(written, family, keys, message):
    with pytest.raises(UnsupportedModelError, match=message):
        written(family, **keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"head_dim": 3}, "even head_dim, found 3"),
        ({"head_dim": 15}, "even (rotary dimension|head_dim).*15"),
        ({"num_key_value_heads": 4}, "6 attention heads cannot be shared out among 4 key/value heads"),
        ({"num_attention_heads": 7}, "not a multiple of the number of attention heads"),
        ({"num_attention_heads": 0}, "not a valid llama config"),
        ({"hidden_size": -48}, "hidden_size must be a number from 1 to 16,777,216, found -48"),
        ({"intermediate_size": 0}, "intermediate_size must be a number from 1 to 16,777,216, found 0"),
        ({"num_hidden_layers": -2}, "num_hidden_layers must be a number from 1 to 16,777,216, found -2"),
        ({"num_attention_heads": -6}, "num_attention_heads must be a number from 1 to 16,777,216, found -6"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be a number from 1 to 16,777,216, found 0"),
        ({"head_dim": -16}, "head_dim must be a number from 1 to 16,777,216, found -16"),
        ({"vocab_size": 0}, "vocab_size must be a number from 1 to 16,777,216, found 0"),
        ({"max_position_embeddings": 0}, "max_position_embeddings must be a number from 1 to 16,777,216, found 0"),
        ({"hidden_size": "48"}, "config.json is not a valid llama config: .*'hidden_size' expected int"),
        ({"hidden_size": 48.0}, "config.json is not a valid llama config: .*'hidden_size' expected int"),
        ({"attention_bias": "yes"}, "config.json is not a valid llama config: .*'attention_bias' expected bool"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps must be a positive number, found 0.0"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps must be a positive number, found nan"),
        ({"rms_norm_eps": math.inf}, "rms_norm_eps must be a positive number, found inf"),
        ({"rope_parameters": 7}, "config.json is not a valid llama config"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_parameters cannot be used: could not convert .*'x'"),
        ({"rope_parameters": {"rope_theta": 0}}, r"must give positive frequencies, found \[1.0, inf"),
        ({"rope_parameters": {"rope_theta": -5.0}}, r"must give positive frequencies, found \[1.0, nan"),
        ({"rope_parameters": {**ROPE["linear"], "factor": 0}}, r"must give positive frequencies, found \[inf"),
        ({"rope_parameters": {**ROPE["linear"], "factor": -1}}, r"must give positive frequencies, found \[-1"),
        ({"rope_parameters": {**ROPE["yarn"], "attention_factor": "x"}}, "rope_parameters cannot be used: could not"),
        ({"rope_parameters": {"rope_type": "linear"}}, "config.json is not a valid llama config: .*factor"),
        ({"rope_parameters": {**ROPE["llama3"], "low_freq_factor": 0}}, "cannot be used: division by zero"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused(written, keys, message):
    with pytest.raises(CheckpointError, match=message):
        written(**keys)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"", CheckpointError, "config.json cannot be read as JSON"),
        (b"{'model_type': 'llama'}", CheckpointError, "config.json cannot be read as JSON"),
        (b'{"model_type": "\xff"}', CheckpointError, "config.json cannot be read as JSON: .*utf-8"),
        (b"[" * 100_000, CheckpointError, "config.json cannot be read as JSON: .*recursion"),
        (b'["llama"]', UnsupportedModelError, "model_type None"),
        (b"null", UnsupportedModelError, "model_type None"),
    ],
)
def test_what_is_no_json_object_is_refused(tmp_path, content, error, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(error, match=message):
        load_config(tmp_path)


@pytest.mark.parametrize("keys", [{"quantization_config": "none"}, {"dtype": "auto"}, {"dtype": "torch.bfloat16"}])
def test_the_key_that_transformers_fails_on_is_named(tmp_path, keys):
    tiny_checkpoint(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    [(key, value)] = keys.items()
    with pytest.raises(
        CheckpointError, match=rf"is not a valid llama config: .* \(config\.json: {key} = '{value}'\)\."
    ):
        load_config(tmp_path)


def test_an_absent_config_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read as JSON: .*No such file"):
        load_config(tmp_path)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 99) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from([*ROPE["llama3"], *LONG, "x"]), inner),
    max_leaves=4,
)
READ = [
    *SIZES,
    *("hidden_act", "attention_bias", "mlp_bias", "sliding_window", "quantization_config", "layer_types", "model_type"),
    *("rope_scaling", "rope_theta", "partial_rotary_factor", "attention_chunk_size", "is_causal", "per_layer_config"),
    *("use_sliding_window", "max_window_layers", "original_max_position_embeddings", "unheard_of"),
]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(family=st.sampled_from(sorted(CONFIGS)), junk=st.dictionaries(st.sampled_from(READ), JUNK, max_size=2))
def test_whatever_a_config_holds_it_is_described_or_refused_in_a_sentence(written, family, junk):
    try:
        spec = written(family, **junk)
    except TransMLAError:
        return
    assert spec.frequencies.shape == (spec.head_dim // 2,)
    assert spec.num_key_value_groups * spec.num_key_value_heads == spec.num_attention_heads
