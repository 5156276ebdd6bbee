import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.factory import tiny_checkpoint
from transmla.arch.experts import Expert
from transmla.arch.skeleton import Skeleton
from transmla.arch.spec import describe, load_config
from transmla.calibration.stream import SourceStream, add_experts
from transmla.deepseek.target_spec import TargetSpec

CPU = torch.device("cpu")
WINDOWS, TOKENS = 7, 11


@pytest.fixture(scope="module", params=["llama", "mistral", "mixtral"])
def source(request, tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("source"), family=request.param, num_hidden_layers=3)


@pytest.fixture(scope="module")
def model(source):
    return AutoModelForCausalLM.from_pretrained(source).eval()


@pytest.fixture(scope="module")
def windows():
    return torch.randint(0, 401, (WINDOWS, TOKENS), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def expected(model, windows):
    """What the whole stock model does: hidden states, and each attention's input and output."""
    inputs, outputs, after = [], [], []

    def watch(module, args, kwargs, output):
        inputs.append(kwargs["hidden_states"])
        outputs.append(output[0])

    hooks = [layer.self_attn.register_forward_hook(watch, with_kwargs=True) for layer in model.model.layers]
    hooks.append(model.model.layers[-1].register_forward_hook(lambda module, args, output: after.append(output)))
    with torch.no_grad():
        states = model.model(windows, output_hidden_states=True, use_cache=False).hidden_states
    for hook in hooks:
        hook.remove()
    # The last hidden state that transformers gives is behind the final norm; the hook sees it in front.
    return [*states[:3], *after], inputs, outputs


def open_stream(source, model, windows, *, dtype=torch.float32, batch_size=3):
    config = load_config(source)
    return SourceStream(
        Skeleton(config),
        TargetSpec.of(describe(config), keep_biases=True, keep_scaling=False),
        model.model.embed_tokens.weight.detach(),
        windows,
        device=CPU,
        dtype=dtype,
        batch_size=batch_size,
    )


def without_experts(layer):
    return {name: tensor for name, tensor in layer.state_dict().items() if "experts" not in name}


def experts_of(layer):
    if experts := getattr(layer.mlp, "experts", None):
        for index, (gate_up, down) in enumerate(zip(experts.gate_up_proj, experts.down_proj, strict=True)):
            yield Expert(index, *gate_up.detach().chunk(2), down.detach())


def run_layer(stream, model, index, rows=slice(None)):
    own = model.model.layers[index]
    with stream.layer(index, without_experts(own)) as layer:
        batches = list(stream.advance(layer, rows))
    add_experts([stream], experts_of(own))
    return batches


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_layer_by_layer_is_the_whole_model_at_once(source, model, windows, expected, batch_size):
    states, inputs, outputs = expected
    stream = open_stream(source, model, windows, batch_size=batch_size)
    assert torch.equal(stream._hidden, states[0])
    for index in range(3):
        batches = run_layer(stream, model, index)
        assert [len(batch.input) for batch in batches] == [
            min(batch_size, WINDOWS - start) for start in range(0, WINDOWS, batch_size)
        ]
        # A batch of another size may be summed in another order: measured 6e-7.
        close = {"rtol": 0, "atol": 1e-5}
        torch.testing.assert_close(torch.cat([batch.input for batch in batches]), inputs[index], **close)
        torch.testing.assert_close(torch.cat([batch.output for batch in batches]), outputs[index], **close)
        attention = model.model.layers[index].self_attn
        for name in ("query", "key", "value"):
            projected = torch.cat([getattr(batch, name) for batch in batches])
            weight = getattr(attention, f"{name[0]}_proj").weight.detach()
            torch.testing.assert_close(projected, inputs[index] @ weight.T, rtol=0, atol=2e-5)
        torch.testing.assert_close(stream._hidden, states[index + 1], **close)


def test_only_the_rows_asked_for_move_on(source, model, windows, expected):
    states, inputs, _ = expected
    stream = open_stream(source, model, windows)
    batches = run_layer(stream, model, 0, slice(2, 6))
    torch.testing.assert_close(torch.cat([batch.input for batch in batches]), inputs[0][2:6], rtol=0, atol=1e-5)
    torch.testing.assert_close(stream._hidden[2:6], states[1][2:6], rtol=0, atol=1e-5)
    still = [0, 1, 6]
    assert torch.equal(stream._hidden[still], states[0][still])


def test_a_layer_is_left_as_it_was_found(source, model, windows):
    stream = open_stream(source, model, windows)
    with stream.layer(0, without_experts(model.model.layers[0])) as layer:
        batches = stream.advance(layer, slice(None))
        next(batches)
        assert layer.self_attn._forward_hooks
        batches.close()
        assert not layer.self_attn._forward_hooks
    assert all(parameter.device.type == "meta" for parameter in layer.parameters())


def test_products_run_in_the_type_asked_for_and_the_stream_in_float32(source, model, windows, expected):
    states, _, _ = expected
    stream = open_stream(source, model, windows, dtype=torch.bfloat16)
    [first, *_] = run_layer(stream, model, 0)
    assert first.query.dtype == first.output.dtype == torch.bfloat16
    assert first.input.dtype == first.residual.dtype == stream._hidden.dtype == torch.float32
    torch.testing.assert_close(stream._hidden, states[1], rtol=0, atol=0.1)  # measured 0.042
    assert not torch.equal(stream._hidden, states[1])
    # The tensors that were lent keep their type.
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.float32


def test_the_embedding_stays_as_it_was(source, model, windows):
    before = model.model.embed_tokens.weight.detach().clone()
    run_layer(open_stream(source, model, windows), model, 0)
    assert torch.equal(model.model.embed_tokens.weight, before)


def test_what_an_output_is_added_to_comes_along(source, model, windows, expected):
    states, _, outputs = expected
    stream = open_stream(source, model, windows)
    residual = torch.cat([batch.residual for batch in run_layer(stream, model, 0)])
    torch.testing.assert_close(residual, states[0] + outputs[0], rtol=1e-5, atol=1e-6)


def test_a_fork_with_the_source_s_own_attention_is_the_source(source, model, windows, expected):
    states, inputs, _ = expected
    stream = open_stream(source, model, windows)
    fork = stream.fork()
    for index in range(2):
        with stream.layer(index, without_experts(model.model.layers[index])) as layer:
            torch.testing.assert_close(fork.inputs(layer, slice(2, 6)), inputs[index][2:6], rtol=0, atol=1e-5)
            own = layer.self_attn
            fork.advance(layer, lambda x, own=own: own(x, position_embeddings=stream._rotary, attention_mask=None)[0])
            assert layer.self_attn is own
        add_experts([fork], experts_of(model.model.layers[index]))
        torch.testing.assert_close(fork._hidden, states[index + 1], rtol=0, atol=1e-5)
    assert torch.equal(stream._hidden, states[0])


def test_a_fork_without_attention_adds_only_the_mlp(source, model, windows, expected):
    states, _, _ = expected
    stream = open_stream(source, model, windows)
    fork, own = stream.fork(), model.model.layers[0]
    with stream.layer(0, without_experts(own)) as layer:
        fork.advance(layer, torch.zeros_like)
    add_experts([fork], experts_of(own))
    with torch.no_grad():
        alone = states[0] + own.mlp(own.post_attention_layernorm(states[0]))
    torch.testing.assert_close(fork._hidden, alone, rtol=0, atol=1e-5)
