"""ResultCache are found again for what is the same, and never for what only looks so."""

import json
import mmap
import os
import shutil
import time

import pytest
from safetensors.torch import load_file, save_file

from transmla.checkpoint import stamps
from transmla.checkpoint.source import Source
from transmla.config import EvalRequest
from transmla.errors import CheckpointError
from transmla.evaluate import lazy_model as lazy_models
from transmla.evaluate import result_cache as module
from transmla.evaluate.result_cache import ResultCache
from transmla.evaluate.run import evaluate

pytestmark = pytest.mark.usefixtures("own_cache")

TIME = (1_577_836_800, 1_577_836_800)


@pytest.fixture(params=["read whole", "noted"])
def notes(request, monkeypatch):
    """Files that are read whole every time, and large ones, whose hash is noted however young they are."""
    if request.param == "noted":
        monkeypatch.setattr(stamps, "SMALL", 0)
        monkeypatch.setattr(module, "SETTLED_NS", 0)


@pytest.fixture
def folder(tmp_path, llama, tokenizer):
    folder = tmp_path / "model"
    llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tokenizer.eos_token = None
    for path in folder.iterdir():
        os.utime(path, TIME)
    return folder


@pytest.fixture
def other(folder, tmp_path):
    """Weights of the same size and time."""
    path = tmp_path / "other.safetensors"
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"].flip(0).contiguous()
    save_file(weights, path, metadata={"format": "pt"})
    os.utime(path, TIME)
    assert path.stat().st_size == (folder / "model.safetensors").stat().st_size
    return path


def copied(path, other):
    shutil.copy2(other, path)


def renamed(path, other):
    os.replace(other, path)


def written_in_place(path, other):
    content = other.read_bytes()
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[:] = content
    os.utime(path, TIME)


def linked(path, other):
    path.unlink()
    os.link(other, path)


def pointed_to(path, other):
    path.unlink()
    path.symlink_to(other)


@pytest.mark.usefixtures("notes")
@pytest.mark.parametrize("replace", [copied, renamed, written_in_place, linked, pointed_to])
def test_weights_that_are_replaced_with_their_time_kept_are_seen(folder, other, tmp_path, text, replace):
    (tmp_path / "text.txt").write_text(text)
    request = EvalRequest(
        source=str(folder), dataset=str(tmp_path / "text.txt"), window=32, max_tokens=64, device="cpu"
    )
    before = evaluate(request)
    assert evaluate(request) == before
    path = folder / "model.safetensors"
    size, when = path.stat().st_size, path.stat().st_mtime_ns
    replace(path, other)
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (size, when)
    after = evaluate(request)
    assert after == evaluate(request.model_copy(update={"no_cache": True}))
    assert after.texts[0].scores[0].nll != before.texts[0].scores[0].nll


@pytest.mark.usefixtures("notes")
@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "generation_config.json", "chat_template.jinja", "adapter_config.json"]
)
def test_every_file_that_decides_is_in_the_fingerprint(folder, tmp_path, name):
    results, model = ResultCache(tmp_path), Source("model", folder)
    path = folder / name
    content = path.read_text() if path.exists() else '{"lora_alpha": 1}'
    found = set()
    for spaces in (1, 2):
        path.write_text(content[:1] + " " * spaces + content[1:] + " " * (3 - spaces))
        os.utime(path, TIME)
        found.add(results.fingerprint(model))
    assert len(found) == 2


def test_a_large_file_is_read_once_in_its_life(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(stamps, "SMALL", 0)
    monkeypatch.setattr(module, "SETTLED_NS", 0)
    results, model = ResultCache(tmp_path), Source("model", folder)
    before = results.fingerprint(model)
    with monkeypatch.context() as patch:
        patch.setattr(module.hashlib, "file_digest", lambda *_: pytest.fail("It is read again."))
        assert results.fingerprint(model) == before
    # Not its content, but that nobody can tell any more: chmod costs a second reading.
    (folder / "model.safetensors").chmod(0o600)
    assert results.fingerprint(model) == before


def test_the_hash_of_a_young_file_is_not_kept(folder, tmp_path, monkeypatch):
    """What is written in the same tick of the clock would be taken for it."""
    monkeypatch.setattr(stamps, "SMALL", 0)
    results, model = ResultCache(tmp_path / "results"), Source("model", folder)
    results.folder.mkdir()
    results.fingerprint(model)
    assert not list(results.folder.iterdir())
    monkeypatch.setattr(module, "SETTLED_NS", time.time_ns() - max(p.stat().st_ctime_ns for p in folder.iterdir()))
    results.fingerprint(model)
    assert list(results.folder.iterdir())


def test_weights_that_change_before_they_are_loaded_are_refused(folder, other, tmp_path, text, monkeypatch):
    """A training may put new ones there while other models are read."""
    (tmp_path / "text.txt").write_text(text)
    load = lazy_models.load_model

    def late(*args, **options):
        shutil.copy2(other, folder / "model.safetensors")
        return load(*args, **options)

    monkeypatch.setattr(lazy_models, "load_model", late)
    request = EvalRequest(
        source=str(folder), dataset=str(tmp_path / "text.txt"), window=32, max_tokens=64, device="cpu"
    )
    with pytest.raises(CheckpointError, match=r"model was changed while it was evaluated: evaluate it again"):
        evaluate(request)


@pytest.fixture
def task(folder, tmp_path, tokenizer):
    tokenizer.eos_token = tokenizer.pad_token = "~"
    tokenizer.save_pretrained(folder)
    tokenizer.eos_token = tokenizer.pad_token = None
    data, code, path = (tmp_path / name for name in ("data.jsonl", "code.py", "task.yaml"))
    data.write_text(
        "".join(json.dumps({"question": f"Line {n}: the", "label": int(n % 4 == 0)}) + "\n" for n in range(8))
    )
    code.write_text("def helped(docs):\n    return docs.map(lambda doc: {'label': doc['label']})\n")
    path.write_text(
        f"task: task\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        "process_docs: !function code.helped\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\n"
        "doc_to_choice: ['brown', 'lazy']\ndoc_to_target: label\nmetric_list:\n  - metric: acc\n"
    )
    for file in (data, code, path):
        os.utime(file, TIME)
    return path


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("data.jsonl", '"label": 1', '"label": 0'),
        ("task.yaml", "['brown', 'lazy']", "['lazy', 'brown']"),
        ("code.py", "doc['label']}", "1-doc['label']}"),
    ],
)
def test_a_task_whose_files_are_replaced_with_their_time_kept_is_asked_again(folder, task, tmp_path, name, old, new):
    """Its rows among them, of which datasets has a copy by the file's time."""
    request = EvalRequest(source=str(folder), tasks=(str(task),), device="cpu")
    before = evaluate(request).tasks[0].scores[0].value
    path = tmp_path / name
    path.write_text(path.read_text().replace(old, new))
    os.utime(path, TIME)
    after = evaluate(request).tasks[0].scores[0].value
    assert after == evaluate(request.model_copy(update={"no_cache": True})).tasks[0].scores[0].value
    assert after != before


def test_other_batches_and_types_are_other_results(folder, tmp_path):
    lazy = {"found": Source("m", folder), "fingerprint": "f", "device": module.torch.device("cpu"), "stamp": {}}
    keys = [
        lazy_models.LazyModel(dtype=dtype, batch_size=batch_size, **lazy).key
        for dtype in ("float32", "bfloat16")
        for batch_size in (1, 4)
    ]
    assert len({json.dumps(key) for key in keys}) == 4
