import gc

import pytest
import torch

from transmla.bench import memory
from transmla.bench.memory import is_out_of_memory, measure_memory, memory_limit

CPU = torch.device("cpu")
FLOATS = 1000
SIZE = FLOATS * 4


def test_what_lives_at_once_is_counted():
    before = torch.ones(FLOATS)
    with measure_memory(CPU) as meter:
        one = before + 1
        two = one * 2
        del one
        three = two - before
        assert meter.lap() == 2 * SIZE
        del two
        four = three + 0
        assert meter.lap() == 2 * SIZE
        del three, four
        assert meter.lap() == 2 * SIZE
        assert meter.lap() == 0


def test_views_and_operations_in_place_are_no_new_memory():
    before = torch.ones(FLOATS)
    with measure_memory(CPU) as meter:
        before.view(10, -1).transpose(0, 1).add_(1)
        before[::2].mul_(2)
        assert meter.lap() == 0
        one = torch.empty(FLOATS)
        one.view(10, -1)[:5].fill_(3)
        assert meter.lap() == SIZE


def test_a_view_keeps_the_whole_alive():
    with measure_memory(CPU) as meter:
        view = torch.zeros(FLOATS)[:3]
        gc.collect()
        meter.lap()
        other = torch.zeros(FLOATS)
        assert meter.lap() == 2 * SIZE
        del view, other


def test_several_outputs_and_nested_arguments():
    with measure_memory(CPU) as meter, torch.inference_mode():
        joined = torch.cat([torch.ones(FLOATS), torch.ones(FLOATS)])
        assert meter.lap() == 4 * SIZE
        values, indices = joined.sort()
        assert meter.lap() >= 2 * SIZE + values.nbytes + indices.nbytes


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_what_an_operation_allocates_on_the_way_is_counted(mode):
    """Attention without a fused kernel, for head sizes that differ, holds a matrix of all pairs of tokens."""
    query, value = torch.randn(1, 2, 100, 8), torch.randn(1, 2, 100, 6)
    with measure_memory(CPU) as meter, mode():
        torch.nn.functional.scaled_dot_product_attention(query, query, value, is_causal=True)
        assert meter.lap() > 2 * 100 * 100 * 4


def test_too_large_a_tensor_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.int8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_allocations_beyond_the_limit_fail_and_later_ones_do_not(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda: 2**26)
    with memory_limit(CPU):
        torch.empty(2**20, dtype=torch.int8)
        with pytest.raises(RuntimeError) as caught:
            torch.empty(2**28, dtype=torch.int8)
    assert is_out_of_memory(caught.value)
    torch.empty(2**28, dtype=torch.int8)
