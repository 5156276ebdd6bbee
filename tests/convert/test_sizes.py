"""From flags to sizes: what is accepted, what is refused, and that a refusal names what would do."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.convert.examples import make_request, make_spec
from transmla.config import ConvertRequest, InspectRequest
from transmla.convert.candidates import Candidates
from transmla.convert.sizes import choose_sizes, freq_folds, rope_sizes
from transmla.deepseek.engines import ENGINES
from transmla.deepseek.sizes import MLASizes
from transmla.errors import UsageError

# 8 key/value heads of 64, as Llama 3.2 1B: wide enough for the sizes that vLLM and SGLang insist on.
WIDE = make_spec(heads=32, kv_heads=8, head_dim=64, hidden=2048, layers=16)

specs = st.builds(
    lambda kv_heads, groups, pairs: make_spec(heads=kv_heads * groups, kv_heads=kv_heads, head_dim=2 * pairs),
    kv_heads=st.integers(1, 16),
    groups=st.integers(1, 4),
    pairs=st.integers(2, 64),
)


def test_explicit_sizes_are_taken_as_they_are():
    sizes = choose_sizes(make_request(kv_lora_rank=21, qk_rope_head_dim=6), make_spec())
    assert sizes == MLASizes(kv_lora_rank=21, qk_rope_head_dim=6, qk_nope_head_dim=16, v_head_dim=16)
    assert (sizes.cache_numbers, sizes.qk_head_dim) == (27, 22)


@pytest.mark.parametrize(
    ("ratio", "rank", "rope"), [(1.0, 48, 16), (0.5, 24, 8), (0.333, 18, 4), (0.25, 12, 4), (0.125, 6, 2)]
)
def test_a_ratio_gives_a_quarter_to_the_rotary_key(ratio, rank, rope):
    sizes = choose_sizes(make_request(kv_ratio=ratio), make_spec())
    assert (sizes.kv_lora_rank, sizes.qk_rope_head_dim) == (rank, rope)


def test_exact_sizes_cache_what_the_source_caches():
    spec = make_spec()
    sizes = choose_sizes(make_request(exact=True), spec)
    assert sizes == MLASizes(32, 32, 0, 16)
    assert sizes.cache_numbers == spec.cache_numbers


def test_q_lora_rank_is_passed_on():
    assert choose_sizes(make_request(kv_ratio=0.5, q_lora_rank=48), make_spec()).q_lora_rank == 48


@settings(deadline=None)
@given(spec=specs, ratio=st.floats(0.001, 1))
def test_every_ratio_is_met_or_refused(spec, ratio):
    try:
        sizes = choose_sizes(make_request(kv_ratio=ratio), spec)
    except UsageError as error:
        # What the refusal proposes is accepted.
        least = re.search(r"pass --kv-ratio ([\d.e-]+)\.$", str(error))
        assume(least)  # a source of fewer than eight numbers has nothing to cut
        least = float(least[1])
        assert ratio < least
        sizes = choose_sizes(make_request(kv_ratio=least), spec)
        ratio = least
    assert abs(sizes.cache_numbers - ratio * spec.cache_numbers) <= 1
    assert sizes.cache_numbers <= spec.cache_numbers
    assert sizes.kv_lora_rank >= 3 * sizes.qk_rope_head_dim
    assert freq_folds(spec, sizes.qk_rope_head_dim)


@settings(deadline=None)
@given(spec=specs)
def test_every_rotary_size_of_the_range_can_be_shared_out(spec):
    for size in rope_sizes(spec):
        for fold in freq_folds(spec, size):
            groups = spec.num_pairs // fold
            assert groups * fold == spec.num_pairs
            assert (size // 2) % groups == 0
    assert freq_folds(spec, spec.key_size)[0] == 1


@settings(deadline=None)
@given(spec=specs)
def test_every_proposal_of_inspect_is_accepted_again(spec):
    asked = InspectRequest.build(recipe=None, flags={"model": "m", "context": 100})
    proposals = list(Candidates(asked, spec, torch.float32).candidates())
    assert proposals[0].flags == ("--exact",)
    for proposal in proposals:
        words = " ".join(proposal.flags).split()
        flags = {}
        while words:
            name = words.pop(0).removeprefix("--").replace("-", "_")
            flags[name] = True if name == "exact" else words.pop(0)
        sizes = choose_sizes(ConvertRequest.build(recipe=None, flags={"model": "m", "output_dir": "o", **flags}), spec)
        assert (sizes.kv_lora_rank, sizes.qk_rope_head_dim) == (proposal.kv_lora_rank, proposal.qk_rope_head_dim)
        assert sizes.cache_numbers <= spec.cache_numbers
        for engine in proposal.engines:
            assert choose_sizes(ConvertRequest.build(recipe=None, flags=_named(flags, engine)), spec) == sizes


def _named(flags, engine):
    sizes = {name: value for name, value in flags.items() if name != "engine"}
    if "kv_ratio" in flags and ENGINES[engine].caches:
        sizes = {"kv_ratio": flags["kv_ratio"]}
    # The proposal's own engine has padded the heads; a second one must be content with that.
    return {"model": "m", "output_dir": "o", **sizes, "engine": [*flags.get("engine", "").split(), engine]}


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({}, r"sizes are missing: pass --kv-ratio 0\.5, or pass --exact\."),
        (
            {"kv_ratio": 0.5, "kv_lora_rank": 8, "qk_rope_head_dim": 4},
            r"\(--kv-lora-rank/--qk-rope-head-dim and --kv-ratio\): drop --kv-ratio, or drop --kv-lora-rank and --qk-",
        ),
        ({"kv_ratio": 0.5, "exact": True}, r"more than one way \(--kv-ratio and --exact\)"),
        ({"kv_lora_rank": 8, "exact": True}, r"more than one way \(--kv-lora-rank/--qk-rope-head-dim and --exact\)"),
        (
            {"kv_ratio": 0.5, "kv_lora_rank": 8, "exact": True},
            r"\(--kv-lora-rank/--qk-rope-head-dim and --kv-ratio and --exact\)",
        ),
        (
            {"kv_lora_rank": 8},
            r"belong together: pass --qk-rope-head-dim 2, or pass --kv-ratio 0\.5 without --kv-lora-rank\.",
        ),
        ({"qk_rope_head_dim": 8}, r"--kv-lora-rank and --qk-rope-head-dim belong together"),
        (
            {"kv_lora_rank": 8, "qk_rope_head_dim": 7},
            r"head-dim 7 does not fit 2 heads of 16: pass --qk-rope-head-dim 6, or",
        ),
        (
            {"kv_lora_rank": 8, "qk_rope_head_dim": 64},
            r"64 does not fit 2 heads of 16: pass --qk-rope-head-dim 30, or pass --qk-rope-head-dim 32\.",
        ),
        (
            {"kv_lora_rank": 60, "qk_rope_head_dim": 8},
            r"60 \+ 8 is out of range \(the source caches only 64 numbers .*: pass --kv-ratio 0.5 without --kv-lora-",
        ),
        ({"kv_ratio": 0.05}, r"--kv-ratio 0.05 leaves 4 of 64 numbers per token, too few .*: pass --kv-ratio 0.125\."),
        (
            {"kv_ratio": 0.5, "q_lora_rank": 49},
            r"--q-lora-rank 49 is out of range \(the hidden size is 48\): pass --q-lora-rank 48\.",
        ),
    ],
)
def test_refusals(choices, message):
    with pytest.raises(UsageError, match=message):
        choose_sizes(make_request(**choices), make_spec())


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"kv_ratio": 0}, r"--kv-ratio: .* greater than 0 \(found 0\)"),
        ({"kv_ratio": 1.5}, r"--kv-ratio: .* less than or equal to 1 \(found 1.5\)"),
        ({"kv_lora_rank": 0}, r"--kv-lora-rank: .* \(found 0\)"),
        ({"qk_rope_head_dim": -2}, r"--qk-rope-head-dim: .* \(found -2\)"),
        ({"engine": ["tensorrt"]}, r"--engine.*: .*'llama.cpp' or 'mlx' \(found 'tensorrt'\)"),
    ],
)
def test_values_that_no_model_has(choices, message):
    with pytest.raises(UsageError, match=message):
        ConvertRequest.build(recipe=None, flags={"model": "m", "output_dir": "o", **choices})


class TestEngines:
    def test_only_fixed_caches_may_exceed_the_source(self):
        with pytest.raises(UsageError, match=r"60 \+ 8 is out of range"):
            choose_sizes(make_request(kv_lora_rank=60, qk_rope_head_dim=8, engine="mlx"), make_spec())
        sizes = choose_sizes(make_request(kv_lora_rank=512, qk_rope_head_dim=64, engine="vllm-cpu"), make_spec())
        assert sizes == MLASizes(512, 64, 16, 16)
        assert freq_folds(make_spec(), 64)

    @pytest.mark.parametrize("engine", ["vllm", "vllm-cpu", "sglang"])
    def test_a_ratio_becomes_the_nearest_size_of_the_engine(self, engine):
        sizes = choose_sizes(make_request(kv_ratio=0.5, engine=engine), WIDE)
        assert sizes.cache_numbers == (512 if engine == "vllm" else 576)
        assert sizes.qk_rope_head_dim == 64

    def test_a_ratio_is_no_licence_to_grow(self):
        with pytest.raises(
            UsageError, match=r"smallest cache for vllm is 256 \+ 64, more than the source's 64 numbers"
        ):
            choose_sizes(make_request(kv_ratio=0.5, engine="vllm"), make_spec())

    def test_a_ratio_for_engines_with_one_size_in_common(self):
        sizes = choose_sizes(make_request(kv_ratio=0.3, engine=("vllm", "sglang", "llama.cpp")), WIDE)
        assert sizes == MLASizes(512, 64, 128, 128)

    @pytest.mark.parametrize("engine", ["vllm", "vllm-cpu", "sglang"])
    def test_other_sizes_are_refused_with_the_nearest(self, engine):
        nearest = {
            "vllm": "--kv-lora-rank 256 --qk-rope-head-dim 64, or pass --kv-lora-rank 448 --qk-rope-head-dim 64",
        }.get(engine, "--kv-lora-rank 512 --qk-rope-head-dim 64")
        with pytest.raises(UsageError, match=rf"does not take 200 \+ 64: pass {nearest}\.$"):
            choose_sizes(make_request(kv_lora_rank=200, qk_rope_head_dim=64, engine=engine), WIDE)

    @pytest.mark.parametrize(
        ("engine", "head_dim", "nope", "value"),
        [
            ("vllm", 64, 64, 128),
            ("vllm", 96, 128, 128),
            ("vllm", 128, 128, 128),
            ("vllm", 192, 192, 256),
            ("sglang", 64, 128, 128),
            ("sglang", 80, 128, 128),
            ("vllm-cpu", 80, 80, 80),
            ("mlx", 80, 80, 80),
        ],
    )
    def test_heads_are_padded_to_the_next_kernel(self, engine, head_dim, nope, value):
        spec = make_spec(heads=8, kv_heads=8, head_dim=head_dim)
        sizes = choose_sizes(make_request(kv_lora_rank=512, qk_rope_head_dim=64, engine=engine), spec)
        assert (sizes.qk_nope_head_dim, sizes.v_head_dim) == (nope, value)
        assert sizes.cache_numbers == 576

    @pytest.mark.parametrize(
        ("engine", "limit"), [("vllm", "192 / 64 / 256"), ("sglang", "128 / 64 / 128")], ids=["vllm", "sglang"]
    )
    def test_heads_that_are_too_large(self, engine, limit):
        spec = make_spec(head_dim=256, kv_heads=2)
        with pytest.raises(
            UsageError, match=rf"no kernel for heads of 256 \+ 64 and values of 256; .* at most {limit}"
        ):
            choose_sizes(make_request(kv_lora_rank=512, qk_rope_head_dim=64, engine=engine), spec)

    @pytest.mark.parametrize("engine", ["transformers", "mlx"])
    def test_profile_mismatch(self, engine):
        title = ENGINES[engine].title
        with pytest.raises(
            UsageError, match=f"{title} does not compute --profile quantizable: pass --profile portable"
        ):
            choose_sizes(make_request(kv_ratio=0.5, engine=engine, profile="quantizable"), make_spec())

    @pytest.mark.parametrize("engine", [name for name, engine in ENGINES.items() if not engine.free_grid])
    def test_exact_needs_a_grid_of_its_own(self, engine):
        with pytest.raises(
            UsageError, match=r"of its own, .*: pass --kv-ratio 0.5 without --exact, or pass --engine transf"
        ):
            choose_sizes(make_request(exact=True, engine=engine), make_spec())

    def test_exact_for_transformers(self):
        assert choose_sizes(make_request(exact=True, engine="transformers"), make_spec()) == MLASizes(32, 32, 0, 16)

    def test_mlx_drops_layer_61(self):
        request = make_request(kv_ratio=0.5, engine="mlx")
        choose_sizes(request, make_spec(layers=61))
        with pytest.raises(UsageError, match=r"MLX misreads a model of more than 61 layers; this one has 62\."):
            choose_sizes(request, make_spec(layers=62))
