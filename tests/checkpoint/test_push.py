"""``--push-to-hub``: looked at before the work, named before it is sent, and nothing secret in it."""

from __future__ import annotations

from unittest.mock import MagicMock

import huggingface_hub.errors as errors
import pytest

from tests.factory import tiny_checkpoint
from transmla.checkpoint import push as pushed
from transmla.convert import run as conversion

SECRET = "hf_secretsecretsecret"


@pytest.fixture
def api(monkeypatch):
    """Records what the hub is asked, in order."""
    calls = []

    class Api:
        def __init__(self, token=None):
            self.token = token

        def create_repo(self, repo_id, **options):
            calls.append(("create", repo_id, options, self.token))

        def upload_folder(self, **options):
            calls.append(("upload", options, self.token))

    monkeypatch.setattr(pushed, "HfApi", Api)
    return calls


@pytest.fixture
def source(tmp_path):
    return tiny_checkpoint(tmp_path / "source")


def test_a_conversion_is_uploaded_as_it_was_written(cli, api, source, tmp_path):
    output = tmp_path / "out"
    result = cli("convert", source, output, "--exact", "-q", "--push-to-hub", "me/mla", "--token", SECRET)
    assert result.exit_code == 0
    (first, repo_id, created, token), (second, uploaded, again) = api
    assert (first, repo_id, created) == ("create", "me/mla", {"private": True, "exist_ok": True})
    assert (second, uploaded["repo_id"], uploaded["folder_path"]) == ("upload", "me/mla", output)
    assert token == again == SECRET
    files = {path.relative_to(output).as_posix(): path for path in output.rglob("*") if path.is_file()}
    assert set(uploaded["allow_patterns"]) == set(files)
    for name, path in files.items():
        assert f"  {name}  {path.stat().st_size:,}\n" in result.stderr
        assert SECRET.encode() not in path.read_bytes()
    assert SECRET not in result.stderr + result.stdout


def test_nothing_is_uploaded_without_being_asked(cli, api, source, tmp_path):
    assert cli("convert", source, tmp_path / "out", "--exact", "-q").exit_code == 0
    assert api == []


def test_a_repository_that_may_not_be_written_is_found_before_the_work(cli, source, tmp_path, monkeypatch):
    api = MagicMock()
    api.return_value.create_repo.side_effect = errors.HfHubHTTPError(f"no {SECRET}", response=MagicMock())
    monkeypatch.setattr(pushed, "HfApi", api)
    monkeypatch.setattr(conversion, "plan_conversion", None)
    result = cli("convert", source, tmp_path / "out", "--exact", "--push-to-hub", "me/mla", "--token", SECRET)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: me/mla cannot be written on the hub (HfHubHTTPError)")
    assert "nothing has been computed yet" in result.stderr
    assert SECRET not in result.stderr
    assert not (tmp_path / "out").exists()


def test_an_upload_that_fails_leaves_the_output(cli, source, tmp_path, monkeypatch):
    api = MagicMock()
    api.return_value.upload_folder.side_effect = ConnectionError("cut")
    monkeypatch.setattr(pushed, "HfApi", api)
    result = cli("convert", source, tmp_path / "out", "--exact", "-q", "--push-to-hub", "me/mla")
    assert result.exit_code == 1
    assert f"the output is complete in {tmp_path / 'out'}; hf upload me/mla" in result.stderr
    assert cli("verify", tmp_path / "out", "--source", source, "-q").exit_code == 0


def test_not_a_hub_id(cli, source, tmp_path, monkeypatch):
    api = MagicMock()
    api.return_value.create_repo.side_effect = errors.HFValidationError("no")
    monkeypatch.setattr(pushed, "HfApi", api)
    result = cli("convert", source, tmp_path / "out", "--exact", "--push-to-hub", "a/b/c")
    assert result.stderr.startswith("Error: --push-to-hub a/b/c is not a hub id such as org/name")
