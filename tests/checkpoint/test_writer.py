import errno
import json
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from transmla.checkpoint.reader import CheckpointReader
from transmla.checkpoint.safetensors import INDEX_FILE, SINGLE_FILE
from transmla.checkpoint.shards import TensorPlan, parse_size, plan_shards
from transmla.checkpoint.writer import CheckpointWriter
from transmla.errors import CheckpointError, OutputError, UsageError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def plans_of(tensors):
    return [TensorPlan(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]


def make(*shapes, dtype=torch.float32):
    return {f"t{number}": torch.randn(shape).to(dtype) for number, shape in enumerate(shapes)}


@settings(max_examples=60, deadline=None)
@given(
    specs=st.lists(st.tuples(st.lists(st.integers(0, 5), max_size=3), st.sampled_from(DTYPES)), min_size=1, max_size=8),
    max_shard_size=st.integers(1, 400),
    seed=st.integers(0, 99),
)
def test_round_trip(tmp_path_factory, specs, max_shard_size, seed):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(seed)
    tensors = {f"t{number}": torch.randn(shape).to(dtype) for number, (shape, dtype) in enumerate(specs)}
    shards = plan_shards(plans_of(tensors), max_shard_size=max_shard_size)
    writer = CheckpointWriter(folder, shards)
    for name in reversed(tensors):
        writer.write({name: tensors[name]})
        assert torch.equal(writer.read([name])[name], tensors[name])
    writer.finish()

    loaded = {}
    for shard in shards:
        assert (folder / shard.file_name).stat().st_size == shard.nbytes
        weights = load_file(folder / shard.file_name)
        assert len(weights) == 1 or sum(tensor.nbytes for tensor in weights.values()) <= max_shard_size
        assert not weights.keys() & loaded.keys()
        loaded |= weights
    assert loaded.keys() == tensors.keys()
    for name, tensor in CheckpointReader(folder).read(tensors).items():
        assert tensor.dtype == loaded[name].dtype == tensors[name].dtype
        assert torch.equal(tensor, tensors[name])
        assert torch.equal(loaded[name], tensors[name])


def test_one_shard_has_no_index(tmp_path):
    tensors = make((2, 3))
    writer = CheckpointWriter(tmp_path, plan_shards(plans_of(tensors), max_shard_size="1MB"))
    writer.write(tensors)
    writer.finish()
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE_FILE]
    with safe_open(tmp_path / SINGLE_FILE, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_several_shards_have_an_index(tmp_path):
    tensors = make((4,), (2,), (9,))
    writer = CheckpointWriter(tmp_path, plan_shards(plans_of(tensors), max_shard_size=24))
    writer.write(tensors)
    writer.finish()
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*files, INDEX_FILE]
    assert json.loads((tmp_path / INDEX_FILE).read_text()) == {
        "metadata": {"total_size": 60},
        "weight_map": {"t0": files[0], "t1": files[0], "t2": files[1]},
    }


def test_transformers_loads_the_shards(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    weights = model.state_dict()
    writer = CheckpointWriter(tmp_path, plan_shards(plans_of(weights), max_shard_size="20KB"))
    writer.write(weights)
    writer.finish()
    config.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())


def test_views_and_parameters_are_written(tmp_path):
    tensors = {"t": torch.nn.Parameter(torch.randn(6, 4)).t()}
    writer = CheckpointWriter(tmp_path, plan_shards(plans_of(tensors), max_shard_size="1MB"))
    writer.write(tensors)
    writer.finish()
    assert torch.equal(load_file(tmp_path / SINGLE_FILE)["t"], tensors["t"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tensors_on_a_gpu_are_written(tmp_path):
    tensors = {name: tensor.cuda() for name, tensor in make((6, 4), dtype=torch.bfloat16).items()}
    writer = CheckpointWriter(tmp_path, plan_shards(plans_of(tensors), max_shard_size="1MB"))
    writer.write(tensors)
    writer.finish()
    assert torch.equal(load_file(tmp_path / SINGLE_FILE)["t0"], tensors["t0"].cpu())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(tmp_path, value):
    tensors = make((3,))
    writer = CheckpointWriter(tmp_path, plan_shards(plans_of(tensors), max_shard_size="1MB"))
    with pytest.raises(CheckpointError, match="Tensor t0 holds values that are NaN or infinite"):
        writer.write({"t0": torch.tensor([1.0, value, 2.0])})


def test_the_plan_is_binding(tmp_path):
    tensors = make((3,), (4,))
    writer = CheckpointWriter(tmp_path, plan_shards(plans_of(tensors), max_shard_size="1MB"))
    with pytest.raises(AssertionError, match=r"t0 is torch\.float64, planned torch\.float32"):
        writer.write({"t0": tensors["t0"].double()})
    with pytest.raises(AssertionError, match=r"t0 is \[4\], planned \[3\]"):
        writer.write({"t0": tensors["t1"]})
    writer.write({"t0": tensors["t0"]})
    with pytest.raises(AssertionError, match="1 planned tensors were not written, such as t1"):
        writer.finish()


def test_a_later_writer_resumes(tmp_path):
    tensors = make((3,), (4,), (5,))
    shards = plan_shards(plans_of(tensors), max_shard_size=20)
    first = CheckpointWriter(tmp_path, shards)
    first.write({"t1": tensors["t1"]})
    first.flush()

    second = CheckpointWriter(tmp_path, shards, resume=True)
    second.mark_written(["t1"])
    second.write({name: tensors[name] for name in ("t0", "t2")})
    second.finish()
    read = CheckpointReader(tmp_path).read(tensors)
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_shards_of_another_plan_are_not_resumed(tmp_path):
    CheckpointWriter(tmp_path, plan_shards(plans_of(make((3,), (4,))), max_shard_size="1MB"))
    with pytest.raises(OutputError, match="does not fit the plan, so its run cannot be resumed; delete"):
        CheckpointWriter(tmp_path, plan_shards(plans_of(make((4,), (3,))), max_shard_size="1MB"), resume=True)
    os.remove(tmp_path / SINGLE_FILE)
    with pytest.raises(OutputError, match="does not fit the plan"):
        CheckpointWriter(tmp_path, plan_shards(plans_of(make((3,), (4,))), max_shard_size="1MB"), resume=True)


def test_a_full_disk_is_found_at_once(tmp_path, monkeypatch):
    def full(descriptor, offset, length):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match=r"is full: the weights need 4,\d{3} bytes in all and [\d,]+ are free"):
        CheckpointWriter(tmp_path, plan_shards(plans_of(make((1000,))), max_shard_size="1MB"))


@pytest.mark.parametrize("error", [OSError(errno.EOPNOTSUPP, "not supported"), AttributeError("posix_fallocate")])
def test_file_systems_that_reserve_nothing(tmp_path, monkeypatch, error):
    def refuse(descriptor, offset, length):
        raise error

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    tensors = make((1000,))
    writer = CheckpointWriter(tmp_path, plan_shards(plans_of(tensors), max_shard_size="1MB"))
    writer.write(tensors)
    writer.finish()
    assert torch.equal(load_file(tmp_path / SINGLE_FILE)["t0"], tensors["t0"])


def test_a_folder_that_vanishes(tmp_path):
    tensors = make((3,))
    folder = tmp_path / "model"
    folder.mkdir()
    writer = CheckpointWriter(folder, plan_shards(plans_of(tensors), max_shard_size="1MB"))
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match=r"The weights cannot be written to .*: No such file"):
        writer.write(tensors)
    with pytest.raises(OutputError, match=r"The weights cannot be written to .*: No such file"):
        writer.flush()


@pytest.mark.parametrize(
    ("size", "count"),
    [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("2GiB", 2**31), ("1.5 kb", 1500), ("10m", 10**7), ("77", 77), (9, 9)],
)
def test_sizes(size, count):
    assert parse_size(size) == count


@pytest.mark.parametrize("size", ["", "GB", "5 apples", "-5GB", "0", 0, -1, "0.1", "1e9", "5GBx"])
def test_sizes_that_are_none(size):
    with pytest.raises(UsageError, match=r"--max-shard-size .* is not a size; write 5GB"):
        plan_shards([TensorPlan("t", (1,), torch.float32)], max_shard_size=size)
