"""Specifications, weights and moments without a model."""

from __future__ import annotations

from typing import Any

import torch

from transmla.arch.families import FAMILIES
from transmla.calibration.moments import AttentionWeights, Moments
from transmla.config import ConvertRequest
from transmla.convert.methods.base import ConvertedLayer, LayerGoal, MethodOptions
from transmla.convert.methods.exact import Exact
from transmla.convert.methods.fitted import Fitted, FittedOptions
from transmla.convert.methods.rorope import RoRoPE
from transmla.deepseek.target_spec import TargetSpec
from transmla.linalg.rotary import rope_frequencies

HIDDEN, TOKENS = 22, 7


def make_spec(*, heads: int = 6, kv_heads: int = 2, head_dim: int = 16, hidden: int = 48, layers: int = 2):
    return TargetSpec(
        family=FAMILIES["llama"],
        model_type="llama",
        hidden_size=hidden,
        intermediate_size=80,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=401,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        rope_type="default",
        rope_scaling={"rope_type": "default"},
        frequencies=rope_frequencies(10000.0, head_dim).float(),
    )


def make_request(**choices: Any) -> ConvertRequest:
    return ConvertRequest(model="m", output_dir="o", **choices)


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_weights(heads, kv_heads, head_dim, *, seed=0):
    return AttentionWeights(
        query=randn(heads, head_dim, HIDDEN, seed=seed) * HIDDEN**-0.5 * 1.5,
        key=randn(kv_heads, head_dim, HIDDEN, seed=seed + 1) * HIDDEN**-0.5 * 1.5,
        value=randn(kv_heads, head_dim, HIDDEN, seed=seed + 2) * HIDDEN**-0.5,
        output=randn(heads, HIDDEN, head_dim, seed=seed + 3),
    )


def random_moments(weights, *, seed=0, distance=None):
    """Any moments of the layer input will do where nothing is approximated; ``distance`` makes it the only one."""
    heads, head_dim, _ = weights.query.shape
    inputs = random_gram(2, HIDDEN + 1, seed=seed + 7)
    joint = torch.block_diag(weights.joint, torch.ones(1, 1))
    uniform, attended = (root @ root.T for root in randn(2, HIDDEN, 3 * HIDDEN, seed=seed + 4))
    mass, spread = randn(2, heads, seed=seed + 5).abs() + 0.1
    distances = randn(heads, TOKENS, seed=seed + 6).abs()
    if distance is not None:
        distances = torch.zeros(heads, TOKENS, dtype=torch.float64)
        distances[:, distance] = 1
    return Moments(
        uniform=uniform,
        attended=attended,
        distances=distances / distances.sum(-1, keepdim=True),
        mass=mass,
        spread=spread,
        keys=(joint @ inputs[0] @ joint.T).expand(len(weights.key), -1, -1),
        values=(joint @ inputs[1] @ joint.T)[:-1, :-1].expand(heads, -1, -1),
        queries=random_gram(heads, head_dim, seed=seed + 9),
    )


def random_gram(count, size, *, seed):
    root = randn(count, size, 3 * size, seed=seed)
    return root @ root.mT / (3 * size)


def make_goal(rank, slots, pairs, *, folds):
    """A goal that distances beyond the calibration windows do not change."""
    return LayerGoal(rank, slots, pairs, folds=folds, context=TOKENS)


def fitted(weights, moments, goal) -> ConvertedLayer:
    """Convert by our method, with a ridge far below what tests tolerate."""
    return Fitted(FittedOptions(ridge=1e-14)).convert(weights, moments, goal)


def rorope(weights, moments, goal) -> ConvertedLayer:
    return RoRoPE(MethodOptions()).convert(weights, moments, goal)


def exact(weights):
    """The same attention, whatever the goal is."""
    goal = make_goal(0, torch.ones(0), torch.ones(0), folds=())
    return Exact(MethodOptions()).convert(weights, None, goal).attention


def frequencies(head_dim):
    return 50.0 ** -(torch.arange(head_dim // 2, dtype=torch.float64) / (head_dim // 2))
