"""The page and the card: all numbers, nothing from outside, and one evaluation at a time."""

import re
from html.parser import HTMLParser

import pytest
from typer.testing import CliRunner

from transmla.cli.app import app
from transmla.errors import OutputError, UsageError
from transmla.evaluate.parts.chat import ChatReport, ChatScore
from transmla.evaluate.parts.cost import ModelReport
from transmla.evaluate.parts.greedy import GreedyReport, GreedyScore
from transmla.evaluate.parts.layerwise import LayerScore, LayersReport, ModelLayers
from transmla.evaluate.parts.long_context import ContextReport, ContextScore
from transmla.evaluate.parts.other_probes import OtherProbesReport, OtherProbesScore
from transmla.evaluate.parts.perplexity import DataReport, TextReport
from transmla.evaluate.report.html import write_html
from transmla.evaluate.report.model_card import check_cards, update_cards, with_evaluation
from transmla.evaluate.report.report import EvalReport
from transmla.evaluate.report.tables import report_tables_of
from transmla.evaluate.statistics import Bucket, TextScore
from transmla.evaluate.tasks.report import TaskReport, TaskScore
from transmla.records import Versions

NAMES = ("org/source", "/models/<closed> & form", "/models/healed")


def make_report(names=NAMES):
    """Every part of a report, with numbers that differ everywhere."""
    texts = tuple(
        TextScore(
            model=name,
            nll=3 + number / 10,
            perplexity=20.125 + number,
            bits_per_byte=0.9 + number / 100,
            **({"excess_nll": number / 10, "excess_se": 0.01, "kl": 0.2, "top1_agreement": 0.8, "top5_agreement": 0.7})
            if number
            else {},
            positions=tuple(
                Bucket(
                    start=start, stop=start + 512, num_positions=99, nll=3.0, excess_nll=number / 7 if number else None
                )
                for start in (0, 512)
            ),
        )
        for number, name in enumerate(names)
    )
    tasks = tuple(
        TaskScore(
            model=name,
            value=0.5 - number / 20,
            standard_error=0.015,
            **({"difference": -number / 20, "difference_se": 0.02, "p_value": 0.2 / number**4} if number else {}),
        )
        for number, name in enumerate(names)
    )
    contexts = tuple(
        ContextReport(
            kind=kind,
            length=length,
            depth=depth,
            num_trials=4,
            scores=tuple(
                ContextScore(
                    model=name,
                    token_accuracy=0.9 - number / 10,
                    exact=0.5,
                    nll=1.25 + number,
                    **({"kl": 0.375, "share_of_source": 1 - number / 9} if number else {}),
                )
                for number, name in enumerate(names)
            ),
        )
        for length in (512, 1024)
        for kind, depth in (("needle", 0.0), ("needle", 1.0), ("copy", None))
    )
    greedy = GreedyReport(
        dataset="wiki.txt",
        num_prompts=2,
        num_prompt_tokens=64,
        num_new_tokens=128,
        scores=(
            None,
            *(
                GreedyScore(
                    model=name, same_tokens=(17, 128), median_same_tokens=72.5, never_different=0.5, agreement=0.93
                )
                for name in names[1:]
            ),
        ),
    )
    others = OtherProbesReport(
        kinds=("needle", "json"),
        num_cells=3,
        scores=(None, *(OtherProbesScore(model=name, share_of_source=0.8125) for name in names[1:])),
    )
    chat = ChatReport(
        num_prompts=3,
        num_new_tokens=128,
        num_positions=321,
        num_ended=2,
        scores=tuple(
            ChatScore(model=name, nll=0.5, **({"kl": 0.0625, "agreement": 0.965} if number else {}))
            for number, name in enumerate(names)
        ),
    )
    by_layer = tuple(
        LayerScore(layer=layer, relative_error=0.123, excess_nll=0.0123 * (layer + 1), share=0.5) for layer in range(2)
    )
    layers = LayersReport(
        dataset="wiki.txt",
        num_positions=99,
        scores=(None, *(ModelLayers(model=name, layers=by_layer) for name in names[1:])),
    )
    return EvalReport(
        models=tuple(
            ModelReport(
                name=name,
                fingerprint=f"{number:032x}",
                kv_bytes_per_token=46080 // (1 + 2 * (number > 0)),
                kv_numbers_per_token_layer=384.0,
                kv_bytes_computed=46080,
                num_parameters=134_515_008 + number,
            )
            for number, name in enumerate(names)
        ),
        texts=(
            TextReport(
                data=DataReport(
                    dataset="texts/wiki.txt",
                    protocol="windows of 1024 tokens",
                    num_tokens=198,
                    num_windows=2,
                    num_positions=196,
                    sha256="a" * 64,
                ),
                scores=texts,
            ),
        ),
        tasks=(TaskReport(task="arc_easy", metric="acc", num_items=1000, scores=tasks),),
        contexts=contexts,
        other_probes=(others,),
        chat=(chat,),
        greedy=(greedy,),
        layers=(layers,),
        dtype="float32",
        device="cpu",
        versions=Versions(transmla="0", torch="1", transformers="2"),
    )


VOID = {"meta", "br", "path", "use", "link", "img"}


class Reader(HTMLParser):
    """Words of a page, tags that fetch, and whether all tags are closed."""

    def __init__(self):
        super().__init__()
        self.words, self.open, self.fetched, self.pictures = [], [], [], 0

    def handle_starttag(self, tag, attributes):
        self.fetched += [
            value
            for name, value in attributes
            if name in ("src", "href", "xlink:href") and not value.startswith(("#", "data:"))
        ]
        self.pictures += tag == "svg"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def read(path):
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    assert not reader.open
    return reader


def test_a_page_holds_everything_and_needs_nothing(tmp_path):
    report = make_report()
    write_html(report, tmp_path / "report.html")
    page = read(tmp_path / "report.html")
    shown = " ".join(page.words)
    for sheet in report_tables_of(report):
        for cell in (sheet.title, *sheet.headings, *(cell for row in sheet.rows for cell in row)):
            assert cell in shown
    assert page.fetched == []
    assert page.pictures == 6
    assert "<closed>" not in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_source_alone_has_a_page_as_well(tmp_path):
    report = make_report(NAMES[:1]).model_copy(update={"greedy": (), "layers": ()})
    write_html(report, tmp_path / "report.html")
    assert "20.1250" in " ".join(read(tmp_path / "report.html").words)


def test_the_same_report_makes_the_same_page(tmp_path):
    for name in ("one.html", "two.html"):
        write_html(make_report(), tmp_path / name)
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


def test_a_page_does_not_tell_where_things_lie_on_the_machine(tmp_path):
    report = make_report([f"/private/place/{name}" for name in ("source", "closed", "healed")])
    write_html(report, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "healed" in page
    assert "wiki.txt" in page
    assert "private" not in page
    assert "texts/" not in page


def test_a_page_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "report.html").mkdir()
    with pytest.raises(OutputError, match=r"report.html cannot be written"):
        write_html(make_report(), tmp_path / "report.html")


def test_a_card_gets_its_own_numbers_and_the_next_ones_instead(tmp_path):
    names = ["org/source", str(tmp_path / "closed"), str(tmp_path / "healed")]
    for name in names[1:]:
        (tmp_path / name).mkdir()
    (tmp_path / "closed" / "README.md").write_text("---\ntags: [mla]\n---\n\n# closed\n", encoding="utf-8")
    update_cards(make_report(names))
    card = (tmp_path / "closed" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\ntags: [mla]\n---\n\n# closed\n\n<!--")
    assert "| closed | 21.1250 |" in card
    for row in (
        "| copy, 512 | source | 90.0% | - | 1.2500 | - |\n|  | closed | 80.0% | 88.9% | 2.2500 | 0.3750 |",
        "| closed | 81.2% |",
        "| closed | 0.5000 | 0.0625 | 96.5% |",
    ):
        assert row in card
    assert "healed" not in card
    assert str(tmp_path) not in card
    assert "| healed | 22.1250 |" in (tmp_path / "healed" / "README.md").read_text(encoding="utf-8")
    update_cards(make_report(names))
    assert (tmp_path / "closed" / "README.md").read_text(encoding="utf-8") == card
    assert sorted(path.name for path in (tmp_path / "closed").iterdir()) == ["README.md"]


def test_what_follows_in_a_card_stays():
    card = with_evaluation("# a\n", make_report(), 1)
    again = with_evaluation(card + "\n## More\n", make_report(("s", "b")).model_copy(update={"tasks": ()}), 1)
    assert again.endswith("-->\n\n## More\n")
    assert again.count("## Evaluation") == 1
    assert "arc_easy" in card
    assert "arc_easy" not in again
    for line in re.findall(r"^\|.*\|$", card, re.MULTILINE):
        assert line.count("|") >= 3


def test_cards_are_of_folders(tmp_path):
    with pytest.raises(UsageError, match="into folders, and org/name is none"):
        check_cards(["org/name"])
    with pytest.raises(UsageError, match="pass CONVERTED"):
        check_cards([])


def test_the_command_line_refuses_before_it_measures(tmp_path):
    arguments = ["eval", "no-such-model", "other", "--dataset", "text.txt"]
    for more, message in (
        (["--report", str(tmp_path / "absent" / "report.html")], "to write --report report.html to"),
        (["--update-card"], "other is none"),
    ):
        result = CliRunner().invoke(app, arguments + more)
        assert result.exit_code != 0
        assert message in result.output.replace("\n", " ")
