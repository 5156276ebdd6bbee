import json
import os
import struct

import pytest
import torch
from safetensors.torch import save_file

from transmla.checkpoint.reader import CheckpointReader
from transmla.checkpoint.safetensors import INDEX_FILE, SINGLE_FILE
from transmla.errors import CheckpointError

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.full((5,), 2.0, dtype=torch.bfloat16),
    "c": torch.tensor(7, dtype=torch.int64),
    "d": torch.empty(0, 4, dtype=torch.float16),
}


def save_sharded(folder, shards, weight_map=None):
    """Write ``{file: tensors}`` and an index that is true unless ``weight_map`` is given."""
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    true_map = {name: file for file, tensors in shards.items() for name in tensors}
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": true_map if weight_map is None else weight_map}))


def rewrite_header(path, change):
    """Put a changed JSON header before the same weights."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.dumps(change(json.loads(raw[8 : 8 + length]))).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + length :])


def change_entry(path, name, **values):
    rewrite_header(path, lambda header: header | {name: header[name] | values})


@pytest.fixture
def single(tmp_path):
    save_file(TENSORS, tmp_path / SINGLE_FILE)
    return tmp_path


def test_reads_what_was_saved(single):
    reader = CheckpointReader(single)
    read = reader.read(["c", "a", "d", "b"])
    assert list(read) == ["c", "a", "d", "b"]
    for name, tensor in TENSORS.items():
        header = reader.headers[name]
        assert (header.shape, header.dtype, header.nbytes) == (tensor.shape, tensor.dtype, tensor.nbytes)
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_tensors_own_their_memory(single):
    reader = CheckpointReader(single)
    reader.read(["a"])["a"].zero_()
    assert torch.equal(reader.read(["a"])["a"], TENSORS["a"])


def test_reads_across_shards(tmp_path):
    save_sharded(tmp_path, {"one.safetensors": {"a": TENSORS["a"]}, "two.safetensors": {"b": TENSORS["b"]}})
    reader = CheckpointReader(tmp_path)
    assert {name: header.file for name, header in reader.headers.items()} == {
        "a": "one.safetensors",
        "b": "two.safetensors",
    }
    assert torch.equal(reader.read(["b", "a"])["a"], TENSORS["a"])


def test_shards_are_closed_after_reading(single):
    reader = CheckpointReader(single)
    reader.read(TENSORS)
    open_files = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    assert str(single / SINGLE_FILE) not in open_files


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
def test_values_that_are_not_finite_are_refused(tmp_path, value, dtype):
    spoiled = torch.ones(40, 9)
    spoiled[33, 4] = value
    save_file({"good": torch.ones(3), "layers.0.bad": spoiled.to(dtype)}, tmp_path / SINGLE_FILE)
    reader = CheckpointReader(tmp_path)
    reader.read(["good"])
    with pytest.raises(CheckpointError, match=r"Tensor layers\.0\.bad holds values that are NaN or infinite"):
        reader.read(["good", "layers.0.bad"])
    assert reader.read(["layers.0.bad"], finite=False)["layers.0.bad"].dtype == dtype


def test_check_accepts_what_is_there(single):
    CheckpointReader(single).check({name: tensor.shape for name, tensor in TENSORS.items()})


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"a": (3, 2)}, r"Tensor a has the shape \[2, 3\]; config\.json needs the shape \[3, 2\]\.$"),
        ({"b": (5,), "z": (1,)}, r"Tensor z is absent; config\.json needs the shape \[1\]\.$"),
        ({"a": (6,), "y": (1,), "z": (1,)}, r"Tensor a has .* \[6\]\. 2 more do not fit either\.$"),
    ],
)
def test_check_names_the_tensor(single, expected, message):
    with pytest.raises(CheckpointError, match=message):
        CheckpointReader(single).check({name: torch.Size(shape) for name, shape in expected.items()})


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, r"truncated: \d+ bytes, its header needs \d+"),
        (lambda path: path.write_bytes(path.read_bytes() + b"xx"), "its header accounts for only"),
        (lambda path: path.write_bytes(path.read_bytes()[:20]), "truncated inside its header"),
        (
            lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
            "model.safetensors is not the file itself but a pointer of git-lfs to it: run git lfs pull",
        ),
        (lambda path: path.write_bytes(b"abc"), "not a safetensors file"),
        (lambda path: path.write_bytes(b"\xff" * 64), "not a safetensors file"),
        (lambda path: path.write_bytes(struct.pack("<Q", 4) + b"[1]]"), "not valid safetensors JSON"),
        (lambda path: path.write_bytes(struct.pack("<Q", 2) + b"[]"), "not valid safetensors JSON"),
        (lambda path: change_entry(path, "a", dtype="F5"), "Tensor a in model.safetensors is stored as F5"),
        (lambda path: change_entry(path, "a", shape=[2, 4]), "not valid safetensors JSON"),
        (lambda path: change_entry(path, "a", shape=[-2, -3]), "not valid safetensors JSON"),
        (lambda path: change_entry(path, "a", data_offsets=[0, 24]), "overlap or leave gaps"),
        (lambda path: change_entry(path, "b", data_offsets=[10**9, 10**9 + 10]), "overlap or leave gaps"),
    ],
)
def test_damaged_shards_are_refused(single, damage, message):
    damage(single / SINGLE_FILE)
    with pytest.raises(CheckpointError, match=message):
        CheckpointReader(single)


def test_a_shard_that_changes_while_it_is_read(single):
    reader = CheckpointReader(single)
    cut(single / SINGLE_FILE)
    with pytest.raises(CheckpointError, match=r"Shard model\.safetensors ended while \w was read"):
        reader.read(TENSORS)


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no weights: model\.safetensors or"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("name", ["../one.safetensors", "sub/one.safetensors", "/one.safetensors", "..", "s\\one", ""])
def test_index_paths_outside_the_folder_are_refused(tmp_path, name):
    save_sharded(tmp_path, {"one.safetensors": {"a": TENSORS["a"]}}, weight_map={"a": name})
    with pytest.raises(CheckpointError, match="only plain names inside the folder are read"):
        CheckpointReader(tmp_path)


def test_links_out_of_the_folder_are_refused(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(TENSORS, tmp_path / "elsewhere.safetensors")
    (folder / SINGLE_FILE).symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(CheckpointError, match="is a link out of the model folder"):
        CheckpointReader(folder)


def test_links_of_a_hub_cache_are_followed(tmp_path):
    snapshot = tmp_path / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    save_file(TENSORS, tmp_path / "blobs" / "feed")
    (snapshot / SINGLE_FILE).symlink_to("../../blobs/feed")
    assert torch.equal(CheckpointReader(snapshot).read(["a"])["a"], TENSORS["a"])


def test_an_absent_shard(tmp_path):
    save_sharded(tmp_path, {"one.safetensors": {"a": TENSORS["a"]}}, {"a": "one.safetensors", "b": "two.safetensors"})
    with pytest.raises(CheckpointError, match=r"has no file two\.safetensors"):
        CheckpointReader(tmp_path)


def test_a_tensor_that_the_index_promises(tmp_path):
    save_sharded(tmp_path, {"one.safetensors": {"a": TENSORS["a"]}}, {"a": "one.safetensors", "b": "one.safetensors"})
    with pytest.raises(CheckpointError, match=r"places tensor b in one\.safetensors, but the shard does not hold it"):
        CheckpointReader(tmp_path)


def test_a_tensor_in_two_shards(tmp_path):
    shards = {"one.safetensors": {"a": TENSORS["a"]}, "two.safetensors": {"a": TENSORS["a"], "b": TENSORS["b"]}}
    save_sharded(tmp_path, shards)
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"Tensor a is in two shards, one\.safetensors and two\.safetensors"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "must hold a JSON object, found list"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {"a": 1}}', "has no weight_map"),
    ],
)
def test_an_index_that_is_none(tmp_path, index, message):
    (tmp_path / INDEX_FILE).write_text(index)
    with pytest.raises(CheckpointError, match=message):
        CheckpointReader(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="links and permissions of POSIX")
def test_an_unreadable_shard(single, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(CheckpointError, match=r"Shard model\.safetensors cannot be read: Permission denied"):
        CheckpointReader(single)
