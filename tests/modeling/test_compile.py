"""Steps of an absorbed model compile as a whole."""

import copy
import sys
from importlib.util import module_from_spec, spec_from_file_location

import pytest
import torch
from transformers import StaticCache

from tests.modeling.models import latent_model, some_ids, watched
from transmla.linalg import latent_attention as checked
from transmla.modeling import absorb
from transmla.modeling import absorbed_attention as attention
from transmla.modeling.kv_cache import cache_argument


@pytest.fixture
def unchecked(monkeypatch):
    """Take the mathematics as a user imports it: the compiler cannot read through the checks of shapes in tests."""
    spec = spec_from_file_location("unchecked", checked.__file__)
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "unchecked", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(attention, "latent_attention", module.latent_attention)
    monkeypatch.setattr(attention, "absorbing_is_cheaper", module.absorbing_is_cheaper)
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("unchecked")
# Torch's own compiler warns of what it uses itself.
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("variant", "backend"),
    [("v3", "aot_eager"), ("v2", "eager"), pytest.param("v3", "inductor", marks=pytest.mark.slow)],
)
def test_steps_on_a_static_cache(variant, backend):
    stock = latent_model(variant, num_hidden_layers=1, first_k_dense_replace=1)
    model = absorb(copy.deepcopy(stock))
    ids = some_ids(2, 24)

    def run(prefill, step):
        held = {cache_argument(stock): StaticCache(config=stock.config, max_cache_len=32)}
        with torch.inference_mode():
            logits = [prefill(ids[:, :18], **held).logits]
            logits += [step(ids[:, index : index + 1], **held).logits for index in range(18, 24)]
        return torch.cat(logits, 1)

    with watched() as calls:
        found = run(model, torch.compile(model, backend=backend, fullgraph=True))
    # Only the prompt was expanded; nothing of Transformers' own form is left in the graph of a step.
    assert calls["expanded"] == 1
    torch.testing.assert_close(found, run(stock, stock), rtol=0, atol=1e-4)
