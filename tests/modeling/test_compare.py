import torch
from transformers import LlamaForCausalLM

from transmla.checkpoint.source import open_source
from transmla.modeling.absorbed_attention import AbsorbedDeepseekV3Attention
from transmla.modeling.load import load_model


def loaded(model, folder):
    model.save_pretrained(folder)
    return load_model(open_source(str(folder)), dtype="float32", device=torch.device("cpu"))


def test_a_model_with_a_latent_is_absorbed(deepseek, tmp_path, windows):
    model = loaded(deepseek, tmp_path)
    assert {type(layer.self_attn) for layer in model.model.layers} == {AbsorbedDeepseekV3Attention}
    with torch.inference_mode():
        torch.testing.assert_close(model(windows).logits, deepseek(windows).logits, rtol=0, atol=1e-4)


def test_another_model_stays_as_it_is(llama, tmp_path):
    assert type(loaded(llama, tmp_path)) is LlamaForCausalLM
