"""How long a context may be: windows against stock transformers, scaled RoPE, and advice that works."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from tests.arch.test_spec import LONG, LONG_PHI3, ROPE
from tests.convert.models import decoded_logits, logits
from tests.factory import FAMILIES as CONFIGS
from tests.factory import SIZES, tiny_checkpoint
from transmla.arch.spec import describe, load_config
from transmla.errors import CheckpointError, TransMLAError, UnsupportedModelError, UsageError

CONTEXT = SIZES["max_position_embeddings"]
FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.fixture
def settled(tmp_path):
    """Return the context that is settled for a config with these keys; a key whose value is ``...`` is left out."""

    def settle(family="llama", asked=None, **keys):
        content = {"model_type": family, **SIZES, **CONFIGS[family][1], **keys}
        (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))
        return describe(load_config(tmp_path), max_position_embeddings=asked).max_position_embeddings

    return settle


WINDOWS = {
    "mistral": {},
    "mixtral": {},
    "phi3": {},
    "ministral": {"layer_types": [SLIDING, FULL]},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1, "layer_types": None},
    "qwen3": {"use_sliding_window": True, "layer_types": [FULL, SLIDING]},
    "qwen3_moe": {"use_sliding_window": True},
    "llama": {},
}


def is_seen_whole(folder, family, keys, length):
    """Say whether stock transformers reads and decodes so many tokens as it does without a window."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(2, 2 + length).unsqueeze(0)
    wanted = logits(model, ids)[:, -1:]
    config = type(model.config).from_dict({**model.config.to_dict(), **keys})
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    found = (logits(model, ids)[:, -1:], decoded_logits(model, ids, 1))
    return all(torch.allclose(one, wanted, atol=1e-4) for one in found)


@pytest.mark.parametrize("family", WINDOWS)
def test_a_window_bites_from_the_first_token_that_it_does_not_hold(settled, tmp_path, family):
    keys = {**WINDOWS[family], "sliding_window": 9}
    plain = {"sliding_window": None, "use_sliding_window": False, "layer_types": [FULL, FULL]}
    if family == "ministral":  # has no mask without a window
        plain["sliding_window"] = CONTEXT
    if family not in ("ministral", "qwen2", "qwen3"):
        del plain["layer_types"]
    tiny_checkpoint(tmp_path / "source", family=family, **plain)
    assert is_seen_whole(tmp_path / "source", family, keys, 9)
    assert not is_seen_whole(tmp_path / "source", family, keys, 10)
    assert settled(family, asked=9, **keys) == 9
    with pytest.raises(UnsupportedModelError, match=r"contexts of 10 tokens: .*= 9.*embeddings 9\.$"):
        settled(family, asked=10, **keys)


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("mistral", {"sliding_window": CONTEXT}),  # Ministral-8B
        ("mistral", {"sliding_window": ...}),  # 4096 by default
        ("phi3", {"sliding_window": 262144}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 9}),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 9}),
        ("qwen2", {"use_sliding_window": True, "layer_types": [FULL, FULL], "sliding_window": 9}),
        ("qwen2", {"attention_chunk_size": 9}),
        ("qwen3_moe", {"use_sliding_window": False, "sliding_window": 9}),
        ("llama", {"layer_types": [FULL, FULL], "sliding_window": 9}),
        ("llama", {"attention_chunk_size": CONTEXT}),
    ],
)
def test_a_window_that_never_bites_is_none(settled, family, keys):
    assert settled(family, **keys) == CONTEXT
    with pytest.raises(UsageError, match=f"--max-position-embeddings 600 is more than the model's {CONTEXT}.$"):
        settled(family, asked=600, **keys)


@pytest.mark.parametrize(
    ("family", "keys", "message"),
    [
        ("mistral", {"sliding_window": 99}, "no sliding-window attention .*sliding_window = 99.*embeddings 99"),
        ("mistral", {"layer_types": [SLIDING, FULL], "sliding_window": 99}, "This Ministral .*sliding_window = 99"),
        ("mixtral", {"layer_types": [FULL, FULL], "sliding_window": 99}, "sliding_window = 99"),
        ("llama", {"sliding_window": 99}, "sliding_window = 99"),
        ("llama", {"attention_chunk_size": 99}, "no attention within chunks .*attention_chunk_size = 99"),
        ("llama", {"rope_parameters": LONG}, "beyond 64 tokens .*longrope.* pass --max-position-embeddings 64"),
        # Of two bounds the tighter one is told: the other would be no advice.
        ("phi3", {**LONG_PHI3, "sliding_window": 99}, "beyond 64 tokens .* pass --max-position-embeddings 64"),
        ("phi3", {**LONG_PHI3, "sliding_window": 33}, "sliding_window = 33.* pass --max-position-embeddings 33"),
        # What is final comes first.
        ("llama", {"sliding_window": 99, "partial_rotary_factor": 0.75}, "only in part"),
        ("llama", {"sliding_window": 99, "is_causal": False}, "is_causal"),
        ("llama", {"layer_types": [FULL, "chunked_attention"]}, "layers of the type 'chunked_attention'"),
    ],
)
def test_what_bounds_the_context_is_told_once_and_after_what_is_final(settled, family, keys, message):
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        settled(family, **keys)
    if "--max-position-embeddings" in str(caught.value):
        bound = int(re.search(r"embeddings (\d+)\.", str(caught.value)).group(1))
        assert settled(family, asked=bound, **keys) == bound
        assert settled(family, asked=bound - 9, **keys) == bound - 9
        with pytest.raises(UsageError, match=f"is more than the model's {CONTEXT}: pass {bound} at most"):
            settled(family, asked=CONTEXT + 1, **keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"sliding_window": 0}, "sliding_window must be a number of tokens, found 0"),
        ({"sliding_window": -1}, "sliding_window must be a number of tokens, found -1"),
        ({"sliding_window": "9"}, "sliding_window must be a number of tokens, found '9'"),
        ({"layer_types": [FULL, SLIDING]}, "layer_types has sliding_attention, and there is no sliding_window"),
        (
            {
                "rope_parameters": {
                    **LONG,
                    "original_max_position_embeddings": None,
                    "factor": 2.0,
                    "attention_factor": 1,
                }
            },
            "original_max_position_embeddings must be a number of tokens, found None",
        ),
    ],
)
def test_a_window_of_nothing_is_refused(settled, keys, message):
    with pytest.raises(CheckpointError, match=message):
        settled(**keys)


REACH = {
    # Vicuna-16k: the context that it was trained on, and a factor.
    "linear": (ROPE["linear"], 4 * CONTEXT),
    # Qwen2.5 with YaRN as its card says: the context is not raised in config.json.
    "yarn": ({**ROPE["yarn"], "factor": 4.0, "original_max_position_embeddings": CONTEXT}, 4 * CONTEXT),
    # As the same models are published when it is.
    "yarn, raised already": ({**ROPE["yarn"], "factor": 8.0}, CONTEXT),
    "yarn, by its own factor": ({**ROPE["yarn"], "factor": None}, CONTEXT),
    "yarn, without end": ({**ROPE["yarn"], "factor": 1e308, "beta_fast": 1e-6, "beta_slow": 1e-7}, CONTEXT),
    "default": (ROPE["default"], CONTEXT),
    "dynamic": (ROPE["dynamic"], CONTEXT),
    "llama3": (ROPE["llama3"], CONTEXT),
    "longrope": ({**LONG, "original_max_position_embeddings": CONTEXT}, CONTEXT),
}


@pytest.mark.parametrize("name", REACH)
def test_a_context_can_be_raised_to_what_the_scaled_positions_reach(settled, tmp_path, name):
    rope, reach = REACH[name]
    assert settled(rope_parameters=rope) == CONTEXT
    assert settled(rope_parameters=rope, asked=reach) == reach
    further = f", and its RoPE reaches {reach}: pass {reach} at most" if reach > CONTEXT else ""
    with pytest.raises(UsageError, match=rf"{reach + 1} is more than the model's {CONTEXT}{further}\.$"):
        settled(rope_parameters=rope, asked=reach + 1)
    if reach == CONTEXT:
        return
    with pytest.raises(UnsupportedModelError, match=r"contexts of 700 tokens: .*embeddings 600\.$"):
        settled(rope_parameters=rope, asked=700, sliding_window=600)

    spec = describe(load_config(tmp_path), max_position_embeddings=600)
    # Stock, with config.json as it is and with the context that the card says.
    for length in (CONTEXT, reach):
        tiny_checkpoint(tmp_path / str(length), rope_parameters=rope, max_position_embeddings=length)
        rotary = AutoModelForCausalLM.from_pretrained(tmp_path / str(length)).model.rotary_emb
        rotary(torch.zeros(1), torch.tensor([[reach - 1]]))
        assert torch.equal(rotary.inv_freq, spec.frequencies)
        assert spec.logit_scale == rotary.attention_scaling**2


def test_beyond_its_context_dynamic_rope_has_other_frequencies(tmp_path):
    """Which is why it cannot be raised."""
    tiny_checkpoint(tmp_path, rope_parameters=ROPE["dynamic"])
    frequencies = describe(load_config(tmp_path)).frequencies
    rotary = AutoModelForCausalLM.from_pretrained(tmp_path).model.rotary_emb
    rotary(torch.zeros(1), torch.tensor([[CONTEXT - 1]]))
    assert torch.equal(rotary.inv_freq, frequencies)
    rotary(torch.zeros(1), torch.tensor([[CONTEXT]]))
    assert not torch.equal(rotary.inv_freq, frequencies)


def test_the_factor_on_the_logits_is_of_the_models_own_context(tmp_path, settled):
    settled(rope_parameters=LONG, asked=64)
    spec = describe(load_config(tmp_path), max_position_embeddings=64)
    assert spec.logit_scale == pytest.approx(1 + math.log(8) / math.log(64))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    family=st.sampled_from(["llama", "mistral", "qwen2", "mixtral", "phi3"]),
    asked=st.none() | st.integers(1, 5000),
    window=st.none() | st.integers(1, 1000),
    chunk=st.none() | st.integers(1, 1000),
    rope=st.sampled_from([*(rope for rope, _ in REACH.values()), LONG]),
    layers=st.sampled_from([..., [FULL, SLIDING]]),
    more=st.sampled_from([{}, {"use_sliding_window": True, "max_window_layers": 1}, {"partial_rotary_factor": 0.5}]),
)
def test_an_advice_works_as_it_is_printed(settled, family, asked, window, chunk, rope, layers, more):
    keys = {"sliding_window": window, "attention_chunk_size": chunk, "rope_parameters": rope, **more}
    if layers is not ...:
        keys["layer_types"] = layers
    try:
        settled(family, asked=asked, **keys)
    except TransMLAError as error:
        told = re.search(r"pass (?:--max-position-embeddings )?(\d+)(?: at most)?\.$", str(error))
        told = told or re.search(r"is more than the model's (\d+)\.$", str(error))
        if told:
            assert settled(family, asked=int(told.group(1)), **keys) == int(told.group(1))
