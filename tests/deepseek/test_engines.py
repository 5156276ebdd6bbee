"""The table of engines says nothing that contradicts itself."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from typing import get_args

import pytest

from tests.convert.examples import make_request, make_spec
from transmla.config import EngineName
from transmla.convert.sizes import choose_sizes
from transmla.deepseek.engines import ENGINES, engines_for, fit_engine
from transmla.deepseek.neutral_norm import NORMS
from transmla.deepseek.sizes import MLASizes

WIDE = make_spec(heads=32, kv_heads=8, head_dim=64, hidden=2048, layers=16)


def test_every_name_that_the_flag_accepts_is_in_the_table():
    assert tuple(ENGINES) == get_args(EngineName)


@pytest.mark.parametrize("name", ENGINES)
def test_rows_are_in_the_order_the_code_relies_on(name):
    engine = ENGINES[name]
    assert engine.profiles
    assert set(engine.profiles) <= set(NORMS)
    assert list(engine.heads) == sorted(engine.heads)
    # A rotary size that is cached needs a kernel.
    assert not engine.heads or {rope for _, rope in engine.caches} == {rope for _, rope, _ in engine.heads}


@pytest.mark.parametrize("name", [name for name, engine in ENGINES.items() if engine.caches])
def test_what_an_engine_accepts_it_accepts_again(name):
    for rank, rope in ENGINES[name].caches:
        sizes = fit_engine(MLASizes(rank, rope, 64, 64), WIDE, name, profile="portable", exact=False)
        assert sizes.cache_numbers == rank + rope
        assert fit_engine(sizes, WIDE, name, profile="portable", exact=False) == sizes
        assert fit_engine(replace(sizes, q_lora_rank=9), WIDE, name, profile="portable", exact=False).q_lora_rank == 9


def test_several_engines_in_any_order():
    results = {
        choose_sizes(make_request(kv_lora_rank=512, qk_rope_head_dim=64, engine=names), WIDE)
        for names in permutations(ENGINES)
    }
    assert results == {MLASizes(512, 64, 128, 128)}


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        ({"exact": True}, ["transformers"]),
        ({"kv_ratio": 0.5}, ["transformers", "llama.cpp", "mlx"]),
        ({"kv_ratio": 0.5, "profile": "quantizable"}, ["llama.cpp"]),
        (
            {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "engine": "sglang"},
            ["transformers", "vllm", "vllm-cpu", "sglang", "llama.cpp", "mlx"],
        ),
        (
            {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "engine": "vllm-cpu"},
            ["transformers", "vllm-cpu", "llama.cpp", "mlx"],
        ),
    ],
)
def test_engines_of_given_sizes(choices, expected):
    """The sizes as they are, without padding that an engine would still need."""
    request = make_request(**choices)
    assert engines_for(choose_sizes(request, WIDE), WIDE, request) == expected


def test_mlx_is_left_out_beyond_61_layers():
    deep, request = make_spec(layers=62), make_request(kv_ratio=0.5)
    assert engines_for(choose_sizes(request, deep), deep, request) == ["transformers", "llama.cpp"]
