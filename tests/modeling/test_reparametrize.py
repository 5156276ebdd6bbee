"""Weights for training: the same function, ordinary sizes, and the very bits again when nothing was trained."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.factory import tiny_checkpoint
from tests.modeling.models import SIZES
from transmla.arch.skeleton import empty_matrices_are_fine
from transmla.modeling.reparametrize import ConstantScale, reparametrize

SIZED = ("--kv-lora-rank", "24", "--qk-rope-head-dim", "8", "--num-windows", "8", "--window", "32")
# What is converted, with which flags, and whether its latent norm is one that does nothing.
CHECKPOINTS = {
    "portable": ("llama", SIZED, True),
    "bfloat16": ("llama", (*SIZED, "--dtype", "bfloat16"), True),
    "padded": ("llama", (*SIZED, "--engine", "vllm-cpu"), True),
    "exact": ("llama", ("--exact",), True),
    "biased": ("qwen2", ("--exact",), True),
    "low-rank queries": ("llama", (*SIZED, "--q-lora-rank", "40"), True),
    "mixture": ("mixtral", SIZED, True),
    "norm": ("llama", (*SIZED, "--latent-norm", "fitted"), False),
    "quantizable": ("llama", (*SIZED, "--profile", "quantizable"), True),
}
TOKENS = torch.arange(5, 65).view(2, 30)


@pytest.fixture(scope="module")
def checkpoint(cli, calibration_text, tmp_path_factory):
    made = {}

    def checkpoint(name):
        if name not in made:
            family, flags, _ = CHECKPOINTS[name]
            root = tmp_path_factory.mktemp("plain")
            source = tiny_checkpoint(root / "source", family=family)
            if name == "padded":
                flags = tuple({"24": "512", "8": "64"}.get(flag, flag) for flag in flags[:4]) + flags[4:]
                flags = (*flags, "--method", "rorope")
            text = () if name in ("exact", "biased") else ("--calibration", calibration_text)
            result = cli("convert", source, root / "mla", *flags, *text, "-q")
            assert result.exit_code == 0, result.stderr
            made[name] = root / "mla"
        return made[name]

    return checkpoint


def load(folder):
    with empty_matrices_are_fine():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


def change(state, name, factor):
    return {key: value * factor if key.endswith(name) else value for key, value in state.items()}


@pytest.mark.parametrize("name", [name for name in CHECKPOINTS if name != "quantizable"])
def test_the_function_stays(checkpoint, name):
    model = load(checkpoint(name))
    before = logits(model)
    reparametrize(model)
    # Found: 3e-6 at most.
    assert (logits(model) - before).abs().max() < 2e-5 * before.std()


def test_the_quantizable_profile_is_computed_too(checkpoint):
    plain = load(checkpoint("quantizable"))
    reparametrize(plain)
    wanted = logits(load(checkpoint("portable")))
    # Its norm is neutral to 1e-4 for an average token only. Found: 5e-4.
    assert (logits(plain) - wanted).abs().max() < 5e-3 * wanted.std()


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_untrained_weights_come_back_bit_for_bit(checkpoint, name):
    model = load(checkpoint(name))
    stored = {key: value.clone() for key, value in model.state_dict().items()}
    plain = reparametrize(model)
    state = model.state_dict()
    assert any(not torch.equal(state[key], stored[key]) for key in state)
    native = plain.native(state)
    assert native.keys() == stored.keys()
    assert [key for key in stored if not torch.equal(native[key], stored[key])] == []


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_latents_are_of_ordinary_size(checkpoint, name):
    model = load(checkpoint(name))
    reparametrize(model)
    for layer in model.model.layers:
        attention = layer.self_attn
        assert isinstance(attention.kv_a_layernorm, ConstantScale) == CHECKPOINTS[name][2]
        if CHECKPOINTS[name][2]:
            assert 0.5**0.5 <= attention.kv_a_layernorm.scale <= 2**0.5
        rows = attention.kv_a_proj_with_mqa.weight[: model.config.kv_lora_rank]
        assert 1e-3 < rows[rows != 0].square().mean().sqrt() < 10


def test_a_stream_of_the_quantizable_profile_is_of_ordinary_size(checkpoint):
    model = load(checkpoint("quantizable"))
    assert model.model.embed_tokens.weight.std() > 30
    reparametrize(model)
    assert model.model.embed_tokens.weight.std() < 3


@pytest.mark.parametrize("factor", [0.01, 1.3, 50.0])
@pytest.mark.parametrize("name", ["portable", "biased", "low-rank queries"])
def test_grown_projections_get_a_norm_that_is_as_neutral(checkpoint, name, factor):
    """What is behind them is as much smaller, so the function is the same, and an engine must compute it."""
    model = load(checkpoint(name))
    wanted = logits(model)
    plain = reparametrize(model)
    state = dict(model.state_dict())
    assert len(plain.norms) == (4 if name != "portable" else 2)
    for norm in plain.norms:
        for part in ("weight", "bias"):
            if (key := f"{norm.projection}.{part}") in state:
                rows, others = state[key].tensor_split([norm.rank])
                state[key] = torch.cat([rows * factor, others])
        behind = norm.norm.replace("a_layernorm", "b_proj") + ".weight"
        state[behind] = state[behind] / factor
    engine = load(checkpoint(name))
    engine.load_state_dict(plain.native(state))
    # Found: 4e-6 at most; with the old weight 50 times the rows would be off by 1e-3.
    assert (logits(engine) - wanted).abs().max() < 3e-5 * wanted.std()


def test_a_longer_norm_of_the_input_counts_as_growth(checkpoint):
    folder = checkpoint("portable")
    plain = reparametrize(load(folder))
    stored = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.kv_a_layernorm.weight"
    weight = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    model = load(folder)
    reparametrize(model)
    state = {key: value for key, value in model.state_dict().items() if key.startswith("model.layers.0.")}
    longer = plain.native(change(state, "input_layernorm.weight", 3.0))
    assert (longer[name] == 4 * stored[name]).all()
    assert torch.equal(longer[weight][:24], stored[weight][:24] / 4)
    assert torch.equal(longer[weight][24:], stored[weight][24:])


def test_only_what_is_given_comes_back(checkpoint):
    model = load(checkpoint("portable"))
    plain = reparametrize(model)
    state = {key: value for key, value in model.state_dict().items() if "q_proj" in key}
    assert plain.native(state).keys() == state.keys()


def test_a_model_of_deepseeks_own_keeps_its_norms():
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    model = DeepseekV3ForCausalLM(DeepseekV3Config(**SIZES)).eval()
    before = logits(model)
    stored = {key: value.clone() for key, value in model.state_dict().items()}
    plain = reparametrize(model)
    assert plain.norms == ()
    assert (logits(model) - before).abs().max() < 1e-5 * before.std()
    native = plain.native(model.state_dict())
    assert all(torch.equal(native[key], value) for key, value in stored.items())


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_factors_that_meet_are_of_like_size(checkpoint, name):
    """Where a diagonal matrix can make them so."""
    model = load(checkpoint(name))
    reparametrize(model)
    config = model.config
    for layer in model.model.layers:
        attention = layer.self_attn
        query = attention.q_proj if config.q_lora_rank is None else attention.q_b_proj
        up = attention.kv_b_proj.weight.unflatten(0, (config.num_attention_heads, -1))
        query = query.weight.unflatten(0, (config.num_attention_heads, -1))
        nope = config.qk_nope_head_dim
        output = attention.o_proj.weight.unflatten(1, (config.num_attention_heads, -1))
        pairs = [
            (up[:, :nope], 2, query[:, :nope], 2),
            (up[:, nope:], 2, output, 0),
        ]
        if isinstance(attention.kv_a_layernorm, ConstantScale):
            pairs.append((attention.kv_a_proj_with_mqa.weight[: config.kv_lora_rank], 1, attention.kv_b_proj.weight, 0))
        for left, left_axis, right, right_axis in pairs:
            left, right = left.square().mean(left_axis).sqrt(), right.square().mean(right_axis).sqrt()
            both = (left > 0) & (right > 0)
            # Powers of two come within a factor of 2; what is done afterwards moves them a little.
            assert not both.any() or (left[both] / right[both]).log2().abs().max() < 1.6
