"""What the target keeps of a source's attention."""

import pytest

from tests.factory import tiny_checkpoint
from transmla.arch.spec import describe, load_config
from transmla.deepseek.target_spec import TargetSpec


@pytest.mark.parametrize(
    ("family", "keep", "biased", "nonlinear"),
    [
        ("llama", True, False, set()),
        ("llama", False, False, set()),
        ("qwen2", True, True, set()),
        ("qwen2", False, False, {"q_proj", "k_proj", "v_proj"}),
        ("qwen3", True, False, {"q_proj", "k_proj"}),
    ],
)
def test_what_is_kept_decides_what_is_nonlinear(tmp_path, family, keep, biased, nonlinear):
    source = describe(load_config(tiny_checkpoint(tmp_path, family=family)))
    target = TargetSpec.of(source, keep_biases=keep, keep_scaling=False)
    assert (target.biased, target.nonlinear) == (biased, nonlinear)
    assert target.input_size == source.hidden_size + biased
    assert target.biases == source.biases
    assert not hasattr(source, "keep_biases")
