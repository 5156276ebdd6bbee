"""Absorbing changes how a model computes, and nothing else about it."""

import copy
import inspect

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from safetensors.torch import load_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention
from transformers.utils import TransformersKwargs

from tests.modeling.models import latent_model, some_ids, stepwise, watched
from transmla.errors import UnsupportedModelError
from transmla.modeling import absorb, expand
from transmla.modeling import absorbed_attention as attention
from transmla.modeling.absorbed_attention import AbsorbedDeepseekV3Attention
from transmla.modeling.absorption import has_latent_attention
from transmla.modeling.kv_cache import cache_argument

IDS, STEPS = some_ids(2, 30), [20] + 10 * [1]


def attentions(model):
    return [layer.self_attn for layer in model.model.layers]


def forms(model):
    """Run a short text and return how often each form was used."""
    with watched() as calls:
        stepwise(model, IDS, STEPS)
    return calls


ABSORBED, EXPANDED = {"absorbed": 20, "expanded": 2}, {"absorbed": 0, "expanded": 22}


@pytest.mark.parametrize(("variant", "stock"), [("v3", DeepseekV3Attention), ("v2", DeepseekV2Attention)])
def test_absorb_and_expand_undo_each_other(variant, stock):
    model = latent_model(variant)
    logits = stepwise(model, IDS, STEPS)
    assert absorb(model) is model
    assert absorb(model) is model
    assert all(isinstance(module, stock) and type(module) is not stock for module in attentions(model))
    assert forms(model) == ABSORBED
    assert expand(model) is model
    assert all(type(module) is stock for module in attentions(model))
    assert torch.equal(stepwise(model, IDS, STEPS), logits)
    assert expand(model) is model


def test_a_part_of_a_model_can_be_absorbed():
    model = latent_model()
    absorb(model.model.layers[1])
    assert forms(model) == {"absorbed": 10, "expanded": 12}


def test_a_model_without_a_latent_is_refused():
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=7, hidden_size=8, intermediate_size=8, num_attention_heads=2))
    assert not has_latent_attention(llama)
    with pytest.raises(UnsupportedModelError, match=r"^LlamaForCausalLM has no latent attention .*transmla convert"):
        absorb(llama)


def test_the_checkpoint_stays_native(tmp_path):
    model = latent_model()
    model.save_pretrained(tmp_path / "stock")
    absorb(model).save_pretrained(tmp_path / "absorbed")
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("stock", "absorbed")]
    assert files[0] == files[1]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "absorbed")
    assert [type(module) for module in attentions(loaded)] == 2 * [DeepseekV3Attention]
    assert load_file(tmp_path / "absorbed" / "model.safetensors").keys() == model.state_dict().keys()


def test_new_weights_are_used_at_once():
    model, other = absorb(latent_model()), latent_model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(stepwise(model, IDS, STEPS), stepwise(other, IDS, STEPS), rtol=0, atol=1e-4)


def step_gradients(model):
    """Train on what follows a prompt that is cached with its gradients."""
    model.zero_grad()
    cache = DynamicCache(config=model.config)
    model(IDS[:, :20], **{cache_argument(model): cache})
    logits = torch.cat(
        [model(piece, **{cache_argument(model): cache}).logits for piece in (IDS[:, 20:25], IDS[:, 25:26])], 1
    )
    nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 21:27].flatten()).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("variant", ["v3", "v2", "v3-exact"])
def test_gradients(variant):
    model = latent_model(variant).train()
    expected = step_gradients(model)
    with watched() as calls:
        found = step_gradients(absorb(model))
    assert calls == {"absorbed": 4, "expanded": 2}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)


def test_dropout_is_left_to_transformers():
    model = absorb(latent_model(attention_dropout=0.3)).train()
    assert forms(model) == EXPANDED
    assert forms(model.eval()) == ABSORBED


class Renamed(DeepseekV3Attention):
    """A subclass that computes what its parent does."""

    def extra_repr(self):
        return "renamed"


class Changed(DeepseekV3Attention):
    def forward(self, *args, **kwargs):
        output, weights = super().forward(*args, **kwargs)
        return 2 * output, weights


class ChangedInPart(DeepseekV3Attention):
    def expand_kv(self, *args):
        keys, values = super().expand_kv(*args)
        return keys, 2 * values


def with_class(subclass):
    model = latent_model()
    for module in attentions(model):
        module.__class__ = subclass
    return model


def test_a_subclass_that_computes_the_same_is_absorbed():
    model = with_class(Renamed)
    logits = stepwise(model, IDS, STEPS)
    assert forms(absorb(model)) == ABSORBED
    assert all(isinstance(module, Renamed) for module in attentions(model))
    torch.testing.assert_close(stepwise(model, IDS, STEPS), logits, rtol=0, atol=1e-4)
    assert [type(module) for module in attentions(expand(model))] == 2 * [Renamed]


@pytest.mark.parametrize(("subclass", "method"), [(Changed, "forward"), (ChangedInPart, "expand_kv")])
def test_a_subclass_that_computes_something_else_is_refused(subclass, method):
    model = with_class(subclass)
    logits = stepwise(model, IDS, STEPS)
    with pytest.raises(UnsupportedModelError, match=f"^{subclass.__name__} changes {method} of DeepseekV3Attention"):
        absorb(model)
    assert torch.equal(stepwise(model, IDS, STEPS), logits)


def test_a_patched_method_is_not_overlooked():
    model = latent_model()
    module = attentions(model)[1]
    module.forward = lambda *args, **kwargs: DeepseekV3Attention.forward(module, *args, **kwargs)
    with pytest.raises(UnsupportedModelError, match="has a forward of its own"):
        absorb(model)
    assert forms(model) == EXPANDED


@pytest.mark.parametrize("variant", ["v3", "v2"])
def test_an_argument_that_is_not_known_is_refused(variant):
    model = absorb(latent_model(variant))
    with pytest.raises(UnsupportedModelError, match=r"does not know the argument 'kv_store'.*--stock"):
        model(IDS[:, :3], kv_store=1)
    # What is not given decides nothing.
    model(IDS[:, :3], kv_store=None, output_hidden_states=True, num_items_in_batch=torch.tensor(3))


def test_what_only_transformers_understands_is_left_to_it():
    model = absorb(latent_model())
    with watched() as calls:
        model(IDS[:, :1], is_causal=True)
    assert calls == {"absorbed": 0, "expanded": 2}


@pytest.mark.parametrize("stock", [DeepseekV3Attention, DeepseekV2Attention])
def test_no_argument_of_the_stock_class_is_overlooked(stock):
    """A release that renames or adds an argument is found here, before anyone runs it."""
    ours = inspect.signature(AbsorbedDeepseekV3Attention.forward).parameters
    known = {*ours, "past_key_values", "cache"} | attention._IDLE | attention._EXPANDED_ONLY
    # Behind the wrapper that takes an old name stands the function itself.
    named = {
        name
        for name, parameter in inspect.signature(inspect.unwrap(stock.forward)).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }
    assert named <= known
    assert set(TransformersKwargs.__annotations__) <= known


class LowRank(nn.Module):
    """An adapter as PEFT makes it: it has the weight of what it wraps, which is not all that it adds."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    @property
    def weight(self):
        return self.base.weight

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def wrap(model, name):
    torch.manual_seed(0)
    for module in attentions(model):
        setattr(module, name, LowRank(getattr(module, name)))


@pytest.mark.parametrize(
    ("name", "expected"),
    [("q_proj", ABSORBED), ("kv_a_proj_with_mqa", ABSORBED), ("o_proj", ABSORBED), ("kv_b_proj", EXPANDED)],
)
def test_adapters(name, expected):
    model = latent_model()
    wrap(model, name)
    logits = stepwise(model, IDS, STEPS)
    assert forms(absorb(model)) == expected
    torch.testing.assert_close(stepwise(model, IDS, STEPS), logits, rtol=0, atol=1e-4)


def test_a_hook_on_the_up_projection_is_called():
    model = absorb(latent_model())
    seen = []
    for module in attentions(model):
        module.kv_b_proj.register_forward_hook(lambda _module, _inputs, output: seen.append(output.shape))
    assert forms(model) == EXPANDED
    assert len(seen) == 22


def test_weights_of_eight_bits_are_left_to_transformers():
    model = absorb(latent_model())
    module = attentions(model)[0]
    module.kv_b_proj.weight = nn.Parameter(module.kv_b_proj.weight.to(torch.float8_e4m3fn), requires_grad=False)
    assert not module._absorbs(None, 1, 30)
    assert attentions(model)[1]._absorbs(None, 1, 30)


def test_hooks_of_accelerate_call_the_new_form():
    model = latent_model()
    logits = stepwise(model, IDS, STEPS)
    for module in attentions(model):
        add_hook_to_module(module, AlignDevicesHook(io_same_device=True))
    assert forms(absorb(model)) == ABSORBED
    torch.testing.assert_close(stepwise(model, IDS, STEPS), logits, rtol=0, atol=1e-4)
    assert forms(expand(model)) == EXPANDED


def test_a_copy_stays_absorbed():
    assert forms(copy.deepcopy(absorb(latent_model()))) == ABSORBED


@torch.inference_mode()
def step_flops(model, cached):
    cache = DynamicCache(config=model.config)
    model(some_ids(1, cached), **{cache_argument(model): cache})
    with FlopCounterMode(display=False) as counter:
        model(some_ids(1, 1), **{cache_argument(model): cache})
    return counter.get_total_flops()


def test_a_cached_token_costs_a_step_no_expansion():
    model = latent_model()
    sizes = model.config
    rank, nope, rope, value = sizes.kv_lora_rank, sizes.qk_nope_head_dim, sizes.qk_rope_head_dim, sizes.v_head_dim
    layers_and_heads, more = 2 * 3, 100

    def multiplications():
        grown = step_flops(model, 50 + more) - step_flops(model, 50)
        return grown / 2 / more / layers_and_heads

    assert multiplications() == rank * (nope + value) + nope + rope + value
    absorb(model)
    assert multiplications() == 2 * rank + rope
