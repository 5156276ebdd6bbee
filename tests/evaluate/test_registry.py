"""A part of an evaluation is a file: one that is registered here appears in table, JSON, HTML report and model card."""

from __future__ import annotations

import json

import pytest

from transmla.evaluate.parts import PARTS
from transmla.evaluate.parts.base import Part
from transmla.evaluate.report.report import EvalReport
from transmla.evaluate.report.text_table import TextTable
from transmla.records import Record

pytestmark = pytest.mark.usefixtures("own_cache")


class Norms(Record):
    """The length of every model's final norm; the source's is what the others are compared with."""

    scores: tuple[float | None, ...]


class NormsPart(Part):
    name = "norms"
    record = Norms
    flags = ("--norms",)

    def __init__(self, cache):
        self._cache, self._found = cache, []

    @classmethod
    def wanted(cls, request):
        return True

    @classmethod
    def build(cls, setting):
        yield cls(setting.cache)

    def measure(self, lazy, progress):
        key = {"what": "norms", **lazy.key}
        self._found.append(self._cache.record(key, lambda: lazy.model.model.norm.weight.norm().item()))

    def report(self):
        yield Norms(scores=tuple(self._found))

    @classmethod
    def tables(cls, records, shown):
        for record in records:
            rows = tuple((name, f"{score:.3f}") for name, score in zip(shown.names, record.scores, strict=True))
            yield TextTable("Final norms", ("Model", "Length"), rows)

    @classmethod
    def plots(cls, records, shown):
        for record in records:
            yield "Final norms", f"<svg><text>{len(record.scores)} norms</text></svg>"


def test_a_part_appears_everywhere(cli, exact_pair, tmp_path, monkeypatch):
    monkeypatch.setitem(PARTS, "norms", NormsPart)
    source, converted = exact_pair
    page = tmp_path / "report.html"
    card = converted / "README.md"
    before = card.read_text()
    arguments = ("eval", source, converted, "--report", page, "--update-card", "--device", "cpu", "-q")
    try:
        found = cli(*arguments, "--json")
        assert found.exit_code == 0, found.stderr
        report = json.loads(found.stdout)
        [record] = report["norms"]
        assert len(record["scores"]) == 2
        assert all(score > 0 for score in record["scores"])
        assert "Final norms" in cli(*arguments).stdout
        assert page.read_text().count("Final norms") == 2
        assert "<text>2 norms</text>" in page.read_text()
        assert f"| source | {record['scores'][0]:.3f} |" in card.read_text()
    finally:
        card.write_text(before)
    assert EvalReport.model_validate(report).norms == (Norms(scores=tuple(record["scores"])),)


def test_a_report_of_the_first_format_is_read():
    models = [
        {
            "name": name,
            "fingerprint": "0",
            "kv_bytes_per_token": 1,
            "kv_numbers_per_token_layer": 1.0,
            "kv_bytes_computed": 1,
            "num_parameters": 1,
        }
        for name in ("source", "a", "b")
    ]
    greedy = {"same_tokens": [1], "median_same_tokens": 1.0, "never_different": 0.0, "agreement": 0.5}
    layer = {"layer": 0, "relative_error": 0.1, "excess_nll": 0.2, "share": 1.0}
    old = {
        "models": models,
        "greedy": [
            {
                "dataset": "t",
                "num_prompts": 1,
                "num_prompt_tokens": 1,
                "num_new_tokens": 1,
                "scores": [{"model": name, **greedy} for name in ("a", "b")],
            }
        ],
        "layers": [{"model": name, "dataset": "t", "num_positions": 9, "layers": [layer]} for name in ("a", "b")],
        "dtype": "float32",
        "device": "cpu",
        "versions": {"transmla": "0.1.0", "torch": "2", "transformers": "5"},
    }
    report = EvalReport.model_validate(old)
    assert [score and score.model for score in report.greedy[0].scores] == [None, "a", "b"]
    assert [score and score.model for score in report.layers[0].scores] == [None, "a", "b"]
    assert EvalReport.model_validate_json(report.model_dump_json()) == report


def test_what_no_part_is_called_is_refused():
    with pytest.raises(ValueError, match="no part of an evaluation is called grredy"):
        EvalReport.model_validate({"models": [], "grredy": []})
