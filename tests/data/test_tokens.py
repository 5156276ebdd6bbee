"""A text begins once, and has no token beyond the embeddings."""

import pytest
import torch
from tokenizers import processors

from tests.factory import TEXT, tiny_tokenizer
from transmla.data.tokens import check_known, encode_text
from transmla.errors import DataError


def tokenizer_with(single, special):
    tokenizer = tiny_tokenizer()
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    return tokenizer


TOKENIZERS = {
    "one in front": tokenizer_with("<s> $A", [("<s>", 0)]),
    "two in front": tokenizer_with("</s> <s> $A", [("<s>", 0), ("</s>", 1)]),
    "front and end": tokenizer_with("<s> $A </s>", [("<s>", 0), ("</s>", 1)]),
    "end only": tokenizer_with("$A </s>", [("</s>", 1)]),
    "nothing": tokenizer_with("$A", []),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", [TEXT[:300], "a", "", " a", "s>"])
def test_a_text_gets_what_its_tokenizer_puts_around_it(name, text):
    assert encode_text(text, TOKENIZERS[name]) == TOKENIZERS[name](text)["input_ids"]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", [TEXT[:300], "a", "", "<s>"])
def test_what_the_text_begins_with_is_not_put_there_again(name, text):
    tokenizer = TOKENIZERS[name]
    before = {"two in front": "</s><s>", "end only": "", "nothing": ""}.get(name, "<s>")
    assert encode_text(before + text, tokenizer) == tokenizer(text)["input_ids"]


def test_tokens_beyond_the_embeddings_are_refused():
    check_known(torch.tensor([[0, 299]]), vocab_size=300)
    check_known(torch.tensor([], dtype=torch.int64), vocab_size=300)
    with pytest.raises(DataError, match=r"^The tokenizer gives token 300, but the model has only 300 embeddings\.$"):
        check_known(torch.tensor([[300, 2]]), vocab_size=300)
