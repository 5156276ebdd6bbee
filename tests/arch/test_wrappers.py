"""Wrappers: the text part is found and named, and what is said of it is true of the stock classes."""

import copy

import pytest
import torch
import transformers.models as families
from transformers import AutoModel

from tests.factory import FAMILIES as CONFIGS
from tests.factory import SIZES
from transmla.arch import wrappers
from transmla.arch.families import FAMILIES
from transmla.arch.wrappers import check_no_wrapper
from transmla.errors import UnsupportedModelError

LLAMA = {key: value for key, value in SIZES.items() if key != "rope_parameters"} | {"hidden_act": "silu"}
AXES = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}

#: Model type of a text part: its stock class, where that is not AutoModel's, and keys of its own.
TEXT_CLASSES = {
    "qwen2_vl_text": (families.qwen2_vl.modeling_qwen2_vl.Qwen2VLTextModel, {"rope_parameters": AXES}),
    "qwen2_5_vl_text": (families.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLTextModel, {"rope_parameters": AXES}),
    "qwen2_5_omni_text": (
        families.qwen2_5_omni.modeling_qwen2_5_omni.Qwen2_5OmniThinkerTextModel,
        {"rope_parameters": AXES},
    ),
    "qwen3_vl_text": (families.qwen3_vl.modeling_qwen3_vl.Qwen3VLTextModel, {"rope_parameters": AXES}),
    "qwen3_vl_moe_text": (families.qwen3_vl_moe.modeling_qwen3_vl_moe.Qwen3VLMoeTextModel, {"rope_parameters": AXES}),
    "qwen3_omni_moe_text": (
        families.qwen3_omni_moe.modeling_qwen3_omni_moe.Qwen3OmniMoeThinkerTextModel,
        {"rope_parameters": AXES},
    ),
    "emu3_text_model": (families.emu3.modeling_emu3.Emu3TextModel, {}),
    "mllama_text_model": (families.mllama.modeling_mllama.MllamaTextModel, {"cross_attention_layers": [1]}),
}


def said(**config):
    with pytest.raises(UnsupportedModelError) as caught:
        check_no_wrapper(config)
    return str(caught.value)


@pytest.mark.parametrize("model_type", TEXT_CLASSES)
def test_on_text_alone_a_text_part_is_the_model_it_is_taken_for(model_type):
    model_class, own = TEXT_CLASSES[model_type]
    computed_as = wrappers._COMPUTED_AS[model_type]
    config_class, fields = CONFIGS[computed_as]
    # Where a family has no head_dim of its own, it is computed.
    sizes = copy.deepcopy({**SIZES, **fields, "head_dim": 8, "num_hidden_layers": 3, "pad_token_id": 0})
    passed = own.get("cross_attention_layers", [])
    torch.manual_seed(0)
    part = model_class._from_config(model_class.config_class(**{**sizes, **copy.deepcopy(own)})).eval()
    stock = AutoModel.from_config(config_class(**{**sizes, "num_hidden_layers": 3 - len(passed)})).eval()
    kept = [index for index in range(3) if index not in passed]
    weights = part.state_dict()

    def weight(name, like):
        words = name.split(".")
        if words[0] == "layers":
            words[1] = str(kept[int(words[1])])
        # Rows of the embedding for pictures have no place in a vocabulary.
        return weights[".".join(words)][: like.shape[0]]

    stock.load_state_dict({name: weight(name, like) for name, like in stock.state_dict().items()})
    tokens = torch.randint(SIZES["vocab_size"], (2, 40))
    with torch.no_grad():
        hidden = part(input_ids=tokens).last_hidden_state
        assert torch.allclose(hidden, stock(input_ids=tokens).last_hidden_state, atol=1e-5)


def test_every_text_part_is_of_a_family_and_those_with_a_class_are_compared():
    assert set(wrappers._COMPUTED_AS.values()) <= set(FAMILIES)
    named_alone = {name for name in wrappers._COMPUTED_AS if name.endswith(("_text", "_text_model"))}
    assert named_alone == set(TEXT_CLASSES)


@pytest.mark.parametrize("key", wrappers._TEXT)
def test_a_text_part_is_found_under_every_key(key):
    inner = {"model_type": "llama", **LLAMA}
    found = said(model_type="novel_vl", **{key: inner}, vision_config={"hidden_size": 8})
    assert found.startswith(
        f"This novel_vl model is a wrapper around a text part that is convertible in itself: llama ({key})"
    )
    assert "thinker_config.text_config" in said(model_type="omni", thinker_config={"text_config": inner})


@pytest.mark.parametrize("key", wrappers._SENSES)
def test_a_text_part_in_the_open_is_known_by_the_names_around_it(key):
    for model_type, architecture, family in (
        ("llava_mistral", "LlavaMistralForCausalLM", "mistral"),
        ("llava", "LlavaLlamaForCausalLM", "llama"),
        ("llama", "LlavaLlamaForCausalLM", "llama"),
        ("videollama2_qwen2", "Videollama2Qwen2ForCausalLM", "qwen2"),
    ):
        found = said(model_type=model_type, architectures=[architecture], sliding_window=None, **LLAMA, **{key: "x"})
        assert f"a text part that is convertible in itself: {family} (in the config itself)" in found
    assert "does not name" in said(model_type="novel", **{key: "x"})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ({"model_type": "gemma2"}, "whose text part, gemma2 (text_config), cannot be converted either: its attention"),
        ({"model_type": "deepseek_v3", "kv_lora_rank": 512}, "cannot be converted either: it has latent attention"),
        ({"model_type": "internlm2"}, "convertible in principle: internlm2 (text_config); it is Llama"),
        ({"model_type": "llama", **LLAMA, "hidden_act": "gelu"}, "cannot be converted either: DeepSeek-V3 engines"),
        ({"model_type": "phi3", **LLAMA, "partial_rotary_factor": 0.5}, "cannot be converted either: heads that are"),
        ({"model_type": "llama", **LLAMA, "head_dim": 15}, "cannot be converted either: config.json"),
        ({"model_type": "novel"}, "a text part, novel (text_config), and whether that could be converted has not been"),
        ({"hidden_size": 8}, "does not name"),
        ({"model_type": ["llama"]}, "does not name"),
        (
            {"model_type": "qwen2_vl_text", **LLAMA, "rope_scaling": {"type": "mrope", "mrope_section": [1]}},
            "in itself",
        ),
    ],
)
def test_what_is_said_of_a_text_part(text, words):
    assert words in said(model_type="novel_vl", text_config=text)


def test_a_text_part_that_is_not_named_is_what_transformers_takes_it_for():
    assert "llama (text_config)" in said(model_type="llava", text_config={})
    assert "gemma" in said(model_type="paligemma", text_config={"hidden_size": 64})


@pytest.mark.parametrize("inside", [False, True])
def test_quantised_wrappers_are_told_both(inside):
    quantized = {"quantization_config": {"quant_method": "fp8"}}
    found = said(
        model_type="novel_vl",
        text_config={"model_type": "llama", **LLAMA, **(quantized if inside else {})},
        **({} if inside else quantized),
    )
    assert "a text part that is convertible" in found
    assert found.endswith("Its weights are quantised besides (config.json: quantization_config, fp8).")


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama", **LLAMA},
        {"model_type": "llama", **LLAMA, "text_config": {}},
        {"model_type": "phi-msft", "img_processor": None},
        {"text_config": None},
        {},
    ],
)
def test_what_is_no_wrapper_passes(config):
    check_no_wrapper(config)


def test_configs_in_configs_without_end():
    config = {"model_type": "llama"}
    for _ in range(5000):
        config = {"text_config": config}
    assert "a text part" in said(**config)
