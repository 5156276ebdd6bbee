"""Our own checkpoints: an exact conversion, absorbed, continues a text as its source does."""

import copy

import torch

from tests.convert.models import asked, greedy, load, logits, some_ids
from tests.factory import tiny_checkpoint
from tests.modeling.models import stepwise, watched
from transmla.convert.run import convert
from transmla.modeling import absorb


def test_an_exact_conversion_decodes_as_its_source(tmp_path):
    source, output = tiny_checkpoint(tmp_path / "source"), tmp_path / "output"
    convert(asked(source, output, exact=True))
    stock, ids = load(output), some_ids(2, 40)
    absorbed = absorb(copy.deepcopy(stock))
    with watched() as calls:
        found = stepwise(absorbed, ids, [20] + 20 * [1])
    assert calls["absorbed"] == 2 * 20
    expected = logits(load(source), ids)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)  # measured 1e-5
    assert greedy(absorbed) == greedy(stock) == greedy(load(source))
