import json
from unittest.mock import MagicMock

import huggingface_hub.errors as errors
import pytest
import torch
from safetensors.torch import save_file

from transmla.checkpoint import hub, source
from transmla.checkpoint.source import Source, open_source, remote_headers
from transmla.errors import CheckpointError, UsageError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def make_model(folder, weights=True):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    if weights:
        save_file({"w": torch.ones(2, 3)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    """Let ``snapshot_download`` answer with a local folder, and record what it was asked."""
    asked = {}

    def snapshot_download(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        wanted = "*.safetensors" in options["allow_patterns"]
        return str(make_model(tmp_path / "snapshots" / COMMIT, weights=wanted))

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    return asked


def failing_hub(monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(hub, "snapshot_download", fail)


def http_error(kind):
    return getattr(errors, kind)("no", response=MagicMock())


def test_a_folder(tmp_path):
    folder = make_model(tmp_path / "model")
    assert open_source(str(folder)) == Source(str(folder), folder)
    assert remote_headers(open_source(str(folder), weights=False))["w"].shape == (2, 3)


def test_home_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    make_model(tmp_path / "model")
    assert open_source("~/model").folder == tmp_path / "model"


def test_a_folder_has_no_revision(tmp_path):
    folder = make_model(tmp_path / "model")
    with pytest.raises(UsageError, match="--revision applies to models on the hub"):
        open_source(str(folder), revision="main")


def test_a_folder_without_config(tmp_path):
    with pytest.raises(CheckpointError, match=r"is not a model folder: it has no config\.json\.$"):
        open_source(str(tmp_path))
    (tmp_path / "m-Q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"It holds m-Q4\.gguf: choose it with --gguf-file m-Q4\.gguf"):
        open_source(str(tmp_path))


def test_a_config_that_is_not_json(tmp_path):
    (tmp_path / "config.json").write_text("<html>")
    with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused(tmp_path, pickle):
    folder = make_model(tmp_path / "model", weights=False)
    (folder / pickle).write_bytes(b"pickle")
    with pytest.raises(
        CheckpointError, match=r"has no safetensors weights\. Pickled ones .* refused; .* save_pretrained"
    ):
        open_source(str(folder))
    assert open_source(str(folder), weights=False).folder == folder


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere/model", "~/nowhere", "a/b/c"])
def test_a_folder_that_does_not_exist(model):
    with pytest.raises(CheckpointError, match=r"There is no folder .*, and it is not a hub id such as org/name"):
        open_source(model)


def test_single_files(tmp_path):
    for name, message in (
        ("m.gguf", r"give its folder as MODEL and --gguf-file m\.gguf"),
        ("m.bin", "is a file; MODEL"),
    ):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(CheckpointError, match=message):
            open_source(str(tmp_path / name))


def test_urls_are_not_repeated():
    with pytest.raises(CheckpointError, match="MODEL is a URL; give the hub id") as caught:
        open_source("https://me:hf_secret@huggingface.co/org/name")
    assert "hf_secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "revision", "asked_for"),
    [("org/name", None, None), ("org/name", "v1", "v1"), ("org/name@v1", None, "v1"), ("org/name@v1", "v1", "v1")],
)
def test_a_hub_model(fake_hub, model, revision, asked_for):
    opened = open_source(model, revision=revision, token="hf_secret")
    assert (opened.name, opened.repo_id, opened.revision) == (model, "org/name", COMMIT)
    assert (fake_hub["repo_id"], fake_hub["revision"], fake_hub["token"]) == ("org/name", asked_for, "hf_secret")
    assert "hf_secret" not in repr(opened)


def test_only_data_is_fetched(fake_hub):
    from huggingface_hub.utils import filter_repo_objects

    files = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "LICENSE",
        "tokenizer.json",
    ]
    others = [
        "pytorch_model.bin",
        "model.pt",
        "modeling.py",
        "original/x.safetensors",
        "consolidated.safetensors",
        "m.gguf",
    ]
    open_source("org/name")
    patterns = {key: fake_hub[key] for key in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects([*files, *others], **patterns)) == files


def test_headers_without_weights(fake_hub, monkeypatch):
    from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo

    class Api:
        def get_safetensors_metadata(self, repo_id, *, revision, token):
            assert (repo_id, revision, token) == ("org/name", COMMIT, "hf_secret")
            info = TensorInfo(dtype="BF16", shape=[4, 2], data_offsets=(0, 16))
            file = SafetensorsFileMetadata(metadata={}, tensors={"w": info})
            return SafetensorsRepoMetadata(None, False, {"w": "model.safetensors"}, {"model.safetensors": file})

    monkeypatch.setattr(hub, "HfApi", Api)
    opened = open_source("org/name", weights=False)
    assert not list(opened.folder.glob("*.safetensors"))
    header = remote_headers(opened, token="hf_secret")["w"]
    assert (header.shape, header.dtype, header.file, header.nbytes) == ((4, 2), torch.bfloat16, "model.safetensors", 16)


def test_two_revisions():
    with pytest.raises(UsageError, match="org/name@v1 names the revision v1, but --revision is v2"):
        open_source("org/name@v1", revision="v2")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("RepositoryNotFoundError", "org/name is neither a folder here nor a model on the hub that you may read"),
        ("GatedRepoError", "org/name is gated: accept its terms on https://huggingface.co/org/name"),
        ("RevisionNotFoundError", "org/name has no revision v1"),
        ("HfHubHTTPError", r"neither a folder here nor a reachable model on the hub \(HfHubHTTPError\)"),
    ],
)
def test_refusals_of_the_hub(monkeypatch, error, message):
    failing_hub(monkeypatch, http_error(error))
    with pytest.raises(CheckpointError, match=message):
        open_source("org/name@v1")


@pytest.mark.parametrize("error", [TimeoutError("slow"), ConnectionError("cut"), FileNotFoundError("not cached")])
def test_a_hub_out_of_reach(monkeypatch, error):
    failing_hub(monkeypatch, error)
    with pytest.raises(CheckpointError, match="neither a folder here nor a reachable model on the hub"):
        open_source("org/name")


def test_offline(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="neither a folder here nor a reachable model on the hub"):
        open_source("org/name")


def test_a_name_that_the_hub_cannot_have():
    with pytest.raises(CheckpointError, match="no good! is neither a folder here nor a hub id such as org/name"):
        open_source("no good!")


def test_a_hub_model_without_safetensors(fake_hub, monkeypatch):
    class Api:
        def get_safetensors_metadata(self, *args, **kwargs):
            raise errors.NotASafetensorsRepoError("none")

    monkeypatch.setattr(hub, "HfApi", Api)
    with pytest.raises(CheckpointError, match=r"org/name has no safetensors weights\. Pickled ones"):
        remote_headers(open_source("org/name", weights=False))


def test_gguf_files_of_the_hub_are_fetched_alone(fake_hub, tmp_path, monkeypatch):
    monkeypatch.setattr(source, "stage_gguf", lambda folder, name: folder)
    opened = open_source("org/name", gguf_file="m.gguf")
    assert (opened.repo_id, opened.revision) == ("org/name", COMMIT)
    assert "m.gguf" in fake_hub["allow_patterns"]
    assert "*.safetensors" not in fake_hub["allow_patterns"]


def test_gguf_files_are_staged(tmp_path, monkeypatch):
    staged = make_model(tmp_path / "staged")
    monkeypatch.setattr(source, "stage_gguf", lambda folder, name: staged)
    assert open_source(str(tmp_path), gguf_file="m.gguf", weights=False) == Source(str(tmp_path), staged)
