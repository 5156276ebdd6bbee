"""A hub that fails: the model comes whole, or a sentence does, and nothing is converted from half of a file."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.factory import tiny_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SECRET = "hf_secretsecretsecretsecretsecretse"


class Hub(ThreadingHTTPServer):
    """One model, by the few requests that a download makes; ``fault`` says what goes wrong."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.fault, self.asked = folder, "", []


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        hub = self.server
        hub.asked.append(self.path)
        if hub.fault == "silent":
            time.sleep(3)
            self.close_connection = True
            return
        if hub.fault == "error":
            self.send(500, b"", body=body)
        elif hub.fault == "nonsense":
            self.send(200, b'{"siblings": "none", "sha": 3}', body=body)
        elif self.path.startswith("/api/models/org/tiny/tree/"):
            listed = [
                {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": "0" * 40}
                for path in sorted(hub.folder.iterdir())
            ]
            self.send(200, json.dumps(listed).encode(), body=body)
        elif self.path.startswith("/api/models/org/tiny"):
            files = [{"rfilename": path.name} for path in sorted(hub.folder.iterdir())]
            answer = {"id": "org/tiny", "modelId": "org/tiny", "sha": COMMIT, "siblings": files, "tags": []}
            self.send(200, json.dumps(answer).encode(), body=body)
        elif self.path.startswith("/org/tiny/resolve/"):
            self.send_file(hub.folder / self.path.rpartition("/")[2], body=body)
        else:
            self.send(404, b"", body=body, headers={"X-Error-Code": "RepoNotFound"})

    def send_file(self, path: Path, *, body: bool) -> None:
        if not path.is_file():
            self.send(404, b"", body=body, headers={"X-Error-Code": "EntryNotFound"})
            return
        content = path.read_bytes()
        whole = len(content)
        if self.server.fault == "half" and path.suffix == ".safetensors":
            content = content[: whole // 2]
        etag = hashlib.sha256(path.read_bytes()).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}
        self.send(200, content, body=body, headers=headers, length=whole)

    def send(self, code, content, *, body, headers=(), length=None) -> None:
        self.send_response(code)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        if body:
            self.wfile.write(content)
        if length is not None and length != len(content):
            self.close_connection = True


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Iterator[Hub]:
    hub = Hub(tiny_checkpoint(tmp_path_factory.mktemp("hub") / "model", shards=2))
    thread = threading.Thread(target=hub.serve_forever)
    thread.start()
    yield hub
    hub.shutdown()
    thread.join()
    hub.server_close()


@pytest.fixture
def run(hub, tmp_path):
    """Convert the hub's model in a process of its own, with an empty cache at first."""

    def run(fault: str = "", *, model: str = "org/tiny", **environment: str) -> subprocess.CompletedProcess[str]:
        hub.fault = fault
        hub.asked.clear()
        address = f"http://127.0.0.1:{hub.server_address[1]}"
        settings = {
            "HF_ENDPOINT": address,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_ETAG_TIMEOUT": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "OMP_NUM_THREADS": "1",
            **environment,
        }
        command = [sys.executable, "-m", "transmla", "convert", model, str(tmp_path / "out"), "--exact", "-q"]
        return subprocess.run(
            [*command, "--token", SECRET],
            env={**os.environ, **settings},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return run


def test_a_hub_that_works(hub, run, tmp_path, cli):
    done = run()
    assert done.returncode == 0, done.stderr
    assert cli("verify", tmp_path / "out", "--source", hub.folder, "-q").exit_code == 0
    # What was given to read the model is nowhere.
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
    # Once it is here, nobody needs the hub.
    (tmp_path / "out").rename(tmp_path / "first")
    done = run("error", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert hub.asked == []


@pytest.mark.parametrize("fault", ["silent", "error", "nonsense", "half", "offline"])
def test_a_hub_that_fails(hub, run, tmp_path, cli, fault):
    done = run(fault, HF_HUB_OFFLINE="1") if fault == "offline" else run(fault)
    assert done.returncode == 1, done.stdout
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: org/tiny is neither a folder here nor a reachable model on the hub"), done.stderr
    assert "Traceback" not in done.stderr
    assert SECRET not in done.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {"home"}
    if fault in ("silent", "error", "nonsense"):
        assert not list((tmp_path / "home").rglob("*.safetensors"))
        return
    # The same command, when the hub is well again.
    done = run()
    assert done.returncode == 0, done.stderr
    assert cli("verify", tmp_path / "out", "--source", hub.folder, "-q").exit_code == 0


def test_a_model_that_is_not_there(run, tmp_path):
    done = run(model="org/other")
    assert done.returncode == 1
    assert "nor a model on the hub that you may read" in done.stderr
    assert not (tmp_path / "out").exists()
