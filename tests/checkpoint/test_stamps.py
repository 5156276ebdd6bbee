"""A file that takes the place of another, with its name, size and times, is another file."""

import mmap
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

from transmla.checkpoint import stamps
from transmla.checkpoint.stamps import file_stamp, model_files, model_stamp
from transmla.errors import CheckpointError

TIME = (1_577_836_800, 1_577_836_800)


def weights(path, changed=None, place=0):
    tensors = {f"layers.{number}.weight": torch.zeros(64, 256) for number in range(5)}
    if changed is not None:
        tensors[changed].view(-1)[place] = 1.0
    save_file(tensors, path)
    os.utime(path, TIME)
    return path


@pytest.mark.parametrize("small", [2**26, 0])
@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("place", [0, 64 * 128, -1])
def test_one_number_of_any_tensor_is_seen(tmp_path, monkeypatch, small, number, place):
    """Read whole or sampled: at the start of a tensor, in its middle, and at its end."""
    monkeypatch.setattr(stamps, "SMALL", small)
    before = file_stamp(weights(tmp_path / "model.safetensors"))
    assert before.whole is bool(small)
    assert file_stamp(weights(tmp_path / "model.safetensors")) == before
    after = file_stamp(weights(tmp_path / "model.safetensors", f"layers.{number}.weight", place))
    assert (before.size, before.time_ns) == (after.size, after.time_ns)
    assert before.sha256 != after.sha256


@pytest.mark.parametrize(
    "header", [b"torn", (2**63).to_bytes(8, "little"), (9).to_bytes(8, "little") + b'{"a": -1}'.ljust(40)]
)
def test_what_is_no_safetensors_file_has_a_stamp(tmp_path, monkeypatch, header):
    monkeypatch.setattr(stamps, "SMALL", 0)
    path = tmp_path / "model.safetensors"
    path.write_bytes(header)
    assert file_stamp(path) == file_stamp(path)


def test_only_a_part_of_a_large_file_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(stamps, "SMALL", 2**12)
    tensors = {"weight": torch.zeros(2**20)}
    save_file(tensors, tmp_path / "model.safetensors")
    os.utime(tmp_path / "model.safetensors", TIME)
    before = file_stamp(tmp_path / "model.safetensors")
    tensors["weight"][2**18] = 1.0
    save_file(tensors, tmp_path / "model.safetensors")
    os.utime(tmp_path / "model.safetensors", TIME)
    assert file_stamp(tmp_path / "model.safetensors") == before, "a quarter into it nothing is read"


def test_what_decides_is_looked_at_and_what_does_not_is_left_alone(tmp_path):
    deciding = {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
        "additional_chat_templates/tool.jinja",
        "unheard_of.json",
    }
    for name in [*deciding, "README.md", "LICENSE", "transmla_report.json", "transmla_finetune.json", "events.out"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert set(model_files(tmp_path)) == deciding
    for name in deciding:
        before = model_stamp(tmp_path)
        (tmp_path / name).write_text("[]")
        os.utime(tmp_path / name, ns=(before[name].time_ns, before[name].time_ns))
        assert {key for key, stamp in model_stamp(tmp_path).items() if stamp != before[key]} == {name}


def test_permissions_and_hard_links_are_no_change(tmp_path):
    path = weights(tmp_path / "model.safetensors")
    before = file_stamp(path)
    path.chmod(0o600)
    os.link(path, tmp_path / "other.safetensors")
    assert file_stamp(path) == before
    shutil.copy2(path, tmp_path / "copy")
    assert file_stamp(tmp_path / "copy") == before


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"absent\.safetensors cannot be read: No such file"):
        file_stamp(tmp_path / "absent.safetensors")


def test_what_is_written_through_a_map_is_seen(tmp_path):
    path = weights(tmp_path / "model.safetensors")
    before = file_stamp(path)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[-3] = 7
    os.utime(path, TIME)
    assert file_stamp(path) != before
