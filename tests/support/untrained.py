"""Models and a tokenizer that nobody trained: what is measured on them is compared with a loop."""

from __future__ import annotations

import copy

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB_SIZE = 281


@pytest.fixture(scope="session")
def text():
    return "".join(f"Line {i}: the quick brown fox counts {i * i} lazy dogs.\n" for i in range(60))


@pytest.fixture(scope="session")
def tokenizer(text):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64)


def loud(model):
    """Give a random model opinions: as initialised, all tokens are about equally likely."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


@pytest.fixture(scope="session")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=42,
        intermediate_size=52,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
        max_position_embeddings=256,
    )
    return loud(LlamaForCausalLM(config))


@pytest.fixture(scope="session")
def deepseek():
    torch.manual_seed(1)
    config = DeepseekV3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=44,
        intermediate_size=52,
        num_hidden_layers=2,
        first_k_dense_replace=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        q_lora_rank=None,
        kv_lora_rank=18,
        qk_rope_head_dim=6,
        qk_nope_head_dim=10,
        v_head_dim=14,
        max_position_embeddings=256,
    )
    return loud(DeepseekV3ForCausalLM(config))


@pytest.fixture(scope="session")
def windows():
    return torch.randint(VOCAB_SIZE, (5, 13), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """ResultCache of earlier runs are those of this test."""
    monkeypatch.setenv("TRANSMLA_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def speaking(tokenizer):
    """The tokenizer with a token that ends a text, by which lm-eval fills up batches."""
    speaking = copy.deepcopy(tokenizer)
    speaking.eos_token = speaking.pad_token = "~"
    return speaking


@pytest.fixture(scope="module")
def speakers(tmp_path_factory, llama, deepseek, speaking):
    """Folders of a source and of what might have been converted from it, for lm-eval."""
    root = tmp_path_factory.mktemp("models")
    for name, model in (("source", llama), ("converted", deepseek)):
        model.save_pretrained(root / name)
        speaking.save_pretrained(root / name)
    return root
