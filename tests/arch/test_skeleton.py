import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.factory import tiny_checkpoint
from transmla.arch.skeleton import Skeleton
from transmla.arch.spec import load_config

LAYER = "model.layers.1"
META = torch.device("meta")


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def source(request, tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("source"), dtype=torch.bfloat16, tie_word_embeddings=request.param)


@pytest.fixture
def skeleton(source):
    return Skeleton(load_config(source))


@pytest.fixture
def model(source):
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)


@pytest.fixture
def tensors(model):
    return model.get_submodule(LAYER).state_dict()


def parts(module):
    return [*module.parameters(), *module.buffers()]


def test_shapes_are_those_of_the_whole_model_a_tied_head_included(skeleton, model):
    assert skeleton.shapes == {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert skeleton.shapes["lm_head.weight"] == (401, 48)


def test_an_idle_skeleton_takes_no_memory(skeleton):
    assert all(tensor.device == META for tensor in parts(skeleton._model))


def test_a_module_is_lent_with_the_tensors_themselves_and_handed_back_empty(skeleton, tensors):
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    with skeleton.module(LAYER, tensors) as layer:
        lent = layer.state_dict()
        assert {name: t.data_ptr() for name, t in lent.items()} == {n: t.data_ptr() for n, t in tensors.items()}
        assert not any(parameter.requires_grad for parameter in layer.parameters())
        assert not layer.training
        busy = {id(tensor) for tensor in parts(layer)}
        assert all(tensor.device == META for tensor in parts(skeleton._model) if id(tensor) not in busy)
    assert all(tensor.device == META for tensor in parts(layer))
    assert all(torch.equal(tensors[name], tensor) for name, tensor in before.items())


def test_a_lent_layer_is_the_models(skeleton, model, tensors):
    hidden, positions = torch.randn(2, 5, 48), torch.arange(5).unsqueeze(0)
    turns = model.model.rotary_emb(hidden, positions)
    with torch.no_grad(), skeleton.module(LAYER, tensors) as layer:
        mine = layer(hidden, position_embeddings=skeleton.rotary(torch.device("cpu"))(hidden, positions))
        assert torch.equal(mine, model.get_submodule(LAYER)(hidden, position_embeddings=turns))


def test_a_module_is_handed_back_after_a_failure(skeleton, tensors):
    with pytest.raises(ZeroDivisionError), skeleton.module(LAYER, tensors) as layer:
        raise ZeroDivisionError
    assert all(tensor.device == META for tensor in parts(layer))
    # One tensor too few: what was taken in before that was noticed goes back as well.
    del tensors["mlp.up_proj.weight"]
    with pytest.raises(RuntimeError, match=r"mlp\.up_proj\.weight"), skeleton.module(LAYER, tensors):
        pass
    assert all(tensor.device == META for tensor in parts(skeleton._model))


def test_the_rotary_tables_are_computed_where_they_are_needed(skeleton, model):
    rotary = skeleton.rotary(torch.device("cpu"))
    assert rotary.inv_freq.device.type == "cpu"
    assert torch.equal(rotary.inv_freq, model.model.rotary_emb.inv_freq)
    assert all(tensor.device == META for tensor in parts(skeleton._model))
