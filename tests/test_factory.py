"""The checkpoints that other tests rest on are what they claim to be."""

from __future__ import annotations

import json
import time

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tests.factory import FAMILIES, TEXT, TOKENIZER_SIZE, random_model, tiny_checkpoint, tiny_tokenizer


@pytest.mark.parametrize("tie_word_embeddings", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_stock_transformers_load_every_weight(tmp_path, family, shards, tie_word_embeddings):
    source = tiny_checkpoint(tmp_path, family=family, shards=shards, tie_word_embeddings=tie_word_embeddings)
    model, report = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True)
    assert not any(report.values())
    expected = random_model(model.config).state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_attention_are_of_a_trained_models_size(tmp_path, family):
    source = tiny_checkpoint(tmp_path, family=family)
    model = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager")
    ids = torch.randint(2, TOKENIZER_SIZE, (4, 64), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        output = model(ids, output_hidden_states=True, output_attentions=True)
    for hidden in output.hidden_states[1:]:
        assert 0.5 < hidden.std() < 2.5
    for attention in output.attentions:
        last = attention[:, :, -1]
        # Log-probabilities differ from logits by a constant.
        assert 0.8 < last.log().std(dim=-1).mean() < 2.5
    assert 0.5 < output.logits.std() < 3


@pytest.mark.parametrize("shards", [2, 3, 4])
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"phi3"}))
def test_keys_and_values_of_a_layer_lie_in_different_shards(tmp_path, family, shards):
    tiny_checkpoint(tmp_path, family=family, shards=shards)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index.values()) == {path.name for path in tmp_path.glob("*.safetensors")}
    assert len(set(index.values())) == shards
    for layer in range(2):
        prefix = f"model.layers.{layer}.self_attn"
        assert index[f"{prefix}.k_proj.weight"] != index[f"{prefix}.v_proj.weight"]
    for name, file in index.items():
        with safe_open(tmp_path / file, "pt") as shard:
            assert name in shard.keys()  # noqa: SIM118


def test_no_two_sizes_are_equal(tmp_path):
    tiny_checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    heads, groups, size = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    sizes = [heads * size, groups * size, heads, groups, size]
    sizes += [config[key] for key in ("hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings")]
    assert len(set(sizes)) == len(sizes)


def test_the_folder_is_complete(tmp_path):
    tiny_checkpoint(tmp_path, dtype=torch.bfloat16)
    assert {path.name for path in tmp_path.iterdir()} == {
        "LICENSE",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    with safe_open(tmp_path / "model.safetensors", "pt") as shard:
        assert {shard.get_tensor(name).dtype for name in shard.keys()} == {torch.bfloat16}  # noqa: SIM118
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == 1


def test_the_tokenizer_survives_saving(tmp_path):
    tiny_checkpoint(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == TOKENIZER_SIZE
    ids = tokenizer(TEXT).input_ids
    assert ids == tiny_tokenizer()(TEXT).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == TEXT
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "When?"}], tokenize=False)
    assert chat == "user: When?\n"


def test_a_checkpoint_takes_less_than_a_second(tmp_path):
    tiny_checkpoint(tmp_path / "warm")
    started = time.perf_counter()
    tiny_checkpoint(tmp_path / "timed", shards=2)
    assert time.perf_counter() - started < 1


def test_the_calibration_text_fills_forty_windows(calibration_text):
    ids = tiny_tokenizer()(calibration_text.read_text(encoding="utf-8")).input_ids
    assert len(ids) >= 2 * 40 * 32
