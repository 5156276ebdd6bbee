import copy
import dataclasses

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.factory import FAMILIES as CONFIGS
from tests.factory import SIZES
from transmla.arch.families import FAMILIES
from transmla.arch.refused import REFUSED


@pytest.fixture(params=FAMILIES)
def named(request):
    """A row of the table, and the stock model it names."""
    family = FAMILIES[request.param]
    _, fields = CONFIGS.get(request.param, (None, {}))
    with torch.device("meta"):
        config = AutoConfig.for_model(family.computed_by or request.param, **copy.deepcopy({**SIZES, **fields}))
        model = AutoModelForCausalLM.from_config(config)
    return family, model


def test_every_name_is_one_of_the_stock_model(named):
    family, model = named
    names = set(model.state_dict())
    for layer in range(SIZES["num_hidden_layers"]):
        prefix = f"{family.layers}.{layer}."
        projections = (f"{family.attention}.{kind}_proj.weight" for kind in "qkvo")
        for name in (*projections, family.input_norm, f"{family.mlp_norm}.weight"):
            assert prefix + name in names
    assert {family.embedding, family.head} <= names


def test_the_residual_writers_are_all_that_is_added_to_the_stream(named):
    """With them at zero the decoder layers change nothing; with any of them left, they do."""
    family, model = named
    model = model.to_empty(device="cpu").eval()
    weights = {name: torch.randn_like(weight) for name, weight in model.state_dict().items()}
    rotary = type(model.model.rotary_emb)(model.config)
    hidden, positions = torch.randn(1, 3, SIZES["hidden_size"]), torch.arange(3).unsqueeze(0)

    def through_a_layer(silent):
        # Packed, the matrices of experts are no ``weight`` of a module.
        quiet = (*silent, *(name.removesuffix(".weight") for name in silent))
        model.load_state_dict({name: w * (not name.endswith(quiet)) for name, w in weights.items()})
        with torch.no_grad():
            return model.model.layers[0](hidden, position_embeddings=rotary(hidden, positions))

    assert torch.equal(through_a_layer(family.residual_writers), hidden)
    for name in family.residual_writers:
        assert not torch.equal(through_a_layer(set(family.residual_writers) - {name}), hidden)


def test_the_table_cannot_be_changed():
    with pytest.raises(TypeError):
        FAMILIES["other"] = FAMILIES["llama"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        FAMILIES["llama"].layers = "layers"


def test_every_family_is_a_model_type_of_transformers():
    for model_type, family in FAMILIES.items():
        computed_by = family.computed_by or model_type
        assert AutoConfig.for_model(computed_by).model_type == computed_by
        assert model_type not in REFUSED
