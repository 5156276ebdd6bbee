import pytest
import torch

from transmla.arch.arguments import refuse_arguments
from transmla.calibration.stream import _Attention
from transmla.errors import UnsupportedModelError


def test_what_asks_for_nothing_passes():
    refuse_arguments({"attention_mask": None, "use_cache": False}, "attention")


@pytest.mark.parametrize("value", [True, 0, 1.0, torch.ones(1, 2), "flash"])
def test_what_asks_for_something_is_refused(value):
    with pytest.raises(UnsupportedModelError, match=r"hands attention the argument 'window', which is not known"):
        refuse_arguments({"attention_mask": None, "window": value}, "attention")


def test_the_attention_of_a_converted_stream_swallows_nothing():
    attention = _Attention(lambda inputs: 2 * inputs)
    inputs, tables = torch.ones(1, 2, 3), (torch.ones(2), torch.ones(2))
    output, _ = attention(inputs, position_embeddings=tables, cache=None, use_cache=False)
    assert torch.equal(output, 2 * inputs)
    with pytest.raises(UnsupportedModelError, match="'attention_mask'"):
        attention(inputs, position_embeddings=tables, attention_mask=torch.ones(1))
