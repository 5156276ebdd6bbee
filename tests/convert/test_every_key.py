"""Every key of every family's config.json, changed: the conversion follows the source, or is refused in a sentence.

The source is what stock transformers computes, reading a text at once and decoding it with a cache. Where the logits
move with a key, those of the exact conversion must move along; Qwen3 has none, and there the reference is attention as
the formulas say it, from nothing but what the conversion knows of the source.

``TRANSMLA_KEYS=docs/results/keys.md`` writes down what was found.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from tests.convert.keys import COMBINED, MORE_ROPES, VALUES, declared, made, single_changes
from tests.convert.models import as_deepseek_names, asked, decoded_logits, difference, load_tensors, logits, read_config
from tests.convert.naive import model_logits, rms_norm
from transmla.arch.families import FAMILIES
from transmla.arch.skeleton import empty_matrices_are_fine
from transmla.arch.spec import AttentionSpec
from transmla.config import ConvertRequest
from transmla.convert.plan import plan_conversion
from transmla.convert.run import convert
from transmla.errors import TransMLAError

#: Longer than the context of most, and than most windows.
IDS = torch.randint(2, 389, (1, 72), generator=torch.Generator().manual_seed(5))
DECODED = 3
#: From the verdict that says most of a key to the one that says least.
VERDICTS = ("handled", "required", "refused", "told", "harmless")


@dataclass(frozen=True)
class Logits:
    """What a model says to a text, read at once, and to its last tokens, decoded with a cache."""

    read: torch.Tensor
    decoded: torch.Tensor

    def difference(self, other: Logits) -> float:
        return max(difference(self.read, other.read), difference(self.decoded, other.decoded))


def said(model: PreTrainedModel, length: int) -> Logits:
    ids = IDS[:, :length]
    return Logits(logits(model, ids)[0], decoded_logits(model, ids, DECODED)[0])


def stock(folder: Path, config: dict[str, Any]) -> PreTrainedModel:
    """Load what transformers makes of a folder; MiMo as the class that computes it."""
    path, name = folder / "config.json", config["model_type"]
    path.write_text(json.dumps({**config, "model_type": FAMILIES[name].computed_by if name == "mimo" else name}))
    try:
        with empty_matrices_are_fine():
            model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    finally:
        path.write_text(json.dumps(config))
    assert not [*report["missing_keys"], *report["mismatched_keys"]]
    return model.eval()


def from_what_is_known(folder: Path, spec: AttentionSpec, length: int) -> Logits:
    """Compute a model with norms on its heads as the formulas say, in float64."""
    tensors = as_deepseek_names(load_tensors(folder))

    def attend(index: int, x: torch.Tensor) -> torch.Tensor:
        prefix = f"model.layers.{index}.self_attn."
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

        def project(kind: str, y: torch.Tensor) -> torch.Tensor:
            y = y @ own[f"{kind}_proj.weight"].T
            return y + own[f"{kind}_proj.bias"] if f"{kind}_proj" in spec.biases else y

        def heads(kind: str) -> torch.Tensor:
            y = project(kind, x).unflatten(-1, (-1, spec.head_dim)).movedim(1, 0)
            y = y if kind == "q" else y.repeat_interleave(spec.num_key_value_groups, dim=0)
            return y if kind == "v" else turned(rms_norm(y, own[f"{kind}_norm.weight"], spec.rms_norm_eps))

        def turned(y: torch.Tensor) -> torch.Tensor:
            angles = torch.arange(len(x)).unsqueeze(-1) * spec.frequencies.double()
            pairs = torch.complex(*y.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
            return torch.cat([pairs.real, pairs.imag], dim=-1)

        scores = heads("q") @ heads("k").mT * spec.logit_scale / math.sqrt(spec.head_dim)
        scores = scores.masked_fill(torch.ones(len(x), len(x), dtype=torch.bool).triu(1), -math.inf)
        return project("o", (scores.softmax(-1) @ heads("v")).movedim(0, 1).flatten(1))

    top_k = spec.mixture.num_experts_per_tok if spec.mixture else 0
    read = model_logits(
        tensors, attend, IDS[0, :length], num_layers=spec.num_hidden_layers, eps=spec.rms_norm_eps, top_k=top_k
    )
    return Logits(read, read[-DECODED:])


class Judge:
    """One family: a checkpoint, what it says, and what becomes of its conversion when keys are changed."""

    def __init__(self, folder: Path, family: str, text: Path) -> None:
        self.family, self.text = FAMILIES[family], text
        self.folder, self.output = made(folder / "source", family), folder / "out"
        self.config = read_config(self.folder)
        self.model = stock(self.folder, self.config)
        self.said: dict[int, Logits] = {}
        self.known, _ = self.plan()

    def request(self) -> ConvertRequest:
        if self.family.head_norms:
            return asked(self.folder, self.output, self.text, kv_ratio=0.5)
        if self.family.experts:
            text = {"window": 24, "num_windows": 4, "num_heldout_windows": 1}
            return asked(self.folder, self.output, self.text, exact=True, **text)
        return asked(self.folder, self.output, exact=True)

    def plan(self) -> tuple[object, AttentionSpec]:
        """Return all that decides the result, and the description of the source."""
        plan = plan_conversion(self.request(), overwrite=True)
        spec = {**vars(plan.spec), "frequencies": plan.spec.frequencies.tolist(), "unread": ()}
        return (plan.config, spec, plan.source_shapes), plan.spec

    def before(self, length: int) -> Logits:
        if length not in self.said:
            self.said[length] = said(self.model, length)
        return self.said[length]

    def judge(self, change: dict[str, Any]) -> str:
        """Change keys, and return what happens.

        ``required`` by a row of the family, ``refused`` for another reason, ``handled`` if the conversion follows,
        ``told`` if nothing reads it, ``harmless`` if nothing at all depends on it.
        """
        config = self.changed(change)
        try:
            known, spec = self.plan()
        except TransMLAError as error:
            rows = (f"(config.json: {row.key} = " for row in self.family.requirements)
            return "required" if any(row in str(error) for row in rows) else "refused"
        length = min(spec.max_position_embeddings, IDS.shape[1])
        before = self.before(length)
        try:
            after = said(stock(self.folder, config), length)
        except Exception:  # where transformers itself fails, the change may decide nothing
            after = before
        if after.difference(before) == 0 and known == self.known:
            return "told" if spec.unread else "harmless"
        found = from_what_is_known(self.folder, spec, length) if self.family.head_norms else self.converted(length)
        off = found.difference(after)
        assert off < 1e-4, off  # measured 1e-6 to 1e-5, and 0.09 and more where a key is not followed
        return "handled"

    def changed(self, change: dict[str, Any]) -> dict[str, Any]:
        config = json.loads(json.dumps(self.config | change))
        (self.folder / "config.json").write_text(json.dumps(config))
        return config

    def judge_strange(self, changes: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], str]]:
        """Judge keys that no class declares at once, and only where that decides anything by halves."""
        together = {key: value for change in changes for key, value in change.items()}
        assert len(together) == len(changes), "one value of a key at a time"
        verdict = self.judge(together)
        if len(changes) == 1:
            yield changes[0], verdict
        elif verdict in ("told", "harmless"):
            self.changed(together)
            unread = self.plan()[1].unread
            yield from ((change, "told" if set(change) <= unread else "harmless") for change in changes)
        else:
            half = len(changes) // 2
            yield from (*self.judge_strange(changes[:half]), *self.judge_strange(changes[half:]))

    def converted(self, length: int) -> Logits:
        convert(self.request(), overwrite=True)
        return said(stock(self.output, read_config(self.output)), length)


@pytest.fixture(scope="module")
def found() -> Iterator[dict[str, list[tuple[dict[str, Any], str]]]]:
    """Verdicts by family; written down where ``TRANSMLA_KEYS`` says, when all is done."""
    verdicts: dict[str, list[tuple[dict[str, Any], str]]] = {}
    yield verdicts
    if path := os.environ.get("TRANSMLA_KEYS"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(page(verdicts), encoding="utf-8")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_conversion_follows_every_key_or_is_refused(family, found, calibration_text, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # hundreds of conversions, none of which is kept
    logging.set_verbosity_error()
    judge = Judge(tmp_path, family, calibration_text)
    failures: list[str] = []
    single = list(single_changes(family, judge.config))
    looked_at = VALUES.keys() | declared(family).keys() | {row.key for row in FAMILIES[family].requirements}
    strange = [change for change in single if not {*change} & looked_at]
    verdicts = [
        *judge.judge_strange([{key: True} for change in strange for key in change if change[key] is True]),
        *judge.judge_strange([change for change in strange if True not in change.values()]),
    ]
    ropes = MORE_ROPES if family == next(iter(FAMILIES)) else ()
    changes = [change for change in single if change not in strange]
    for change in (*COMBINED, *({"rope_parameters": rope} for rope in ropes), *changes):
        try:
            verdicts.append((change, judge.judge(change)))
        except Exception as error:
            failures.append(f"{json.dumps(change)}: {type(error).__name__} {error}")
    assert not failures, "\n".join(failures)
    assert {verdict for _, verdict in verdicts} == {*VERDICTS}
    found[family] = verdicts


INTRODUCTION = """\
Each key is set to other values, alone and with those that it works with, and the logits of the source, read at once and
decoded with a cache, are compared with those of the exact conversion (Qwen3 has none: with the formulas of attention,
given what the conversion knows). *Handled*: the logits or the result change, and stay equal. *Required*: a row of the
family refuses other values, with the reason. *Refused*: for another reason, such as tensors of another size, or a
window within the context. *Told*: nothing in transformers reads it; `inspect` and the plan name it. *Harmless*: nothing
depends on it. A key counts once, where most is said of it."""


def page(found: dict[str, list[tuple[dict[str, Any], str]]]) -> str:
    """Lay out which key of which family has which verdict: the one that says most, of all its values."""
    lines = [
        "# Every key of every family's config.json",
        "",
        *INTRODUCTION.splitlines(),
        f"Written by `{Path(__file__).name}` with transformers {transformers.__version__}.",
        "",
        "| family | keys | values | " + " | ".join(VERDICTS) + " |",
        "|---|" + "--:|" * (2 + len(VERDICTS)),
    ]
    keys = {family: _by_verdict(verdicts) for family, verdicts in found.items()}
    for family, by_verdict in keys.items():
        counts = [len(by_verdict[verdict]) for verdict in VERDICTS]
        lines.append(f"| {family} | {sum(counts)} | {len(found[family])} | {' | '.join(map(str, counts))} |")
    for family, by_verdict in keys.items():
        lines += ["", f"## {FAMILIES[family].title}", ""]
        lines += [f"- *{verdict}*: {', '.join(by_verdict[verdict])}" for verdict in VERDICTS]
    return "\n".join(lines) + "\n"


def _by_verdict(verdicts: list[tuple[dict[str, Any], str]]) -> dict[str, list[str]]:
    best: dict[str, str] = {}
    for change, verdict in verdicts:
        if len(change) == 1:
            (key,) = change
            best[key] = min(verdict, best.get(key, verdict), key=VERDICTS.index)
    return {verdict: sorted(key for key in best if best[key] == verdict) for verdict in VERDICTS}
