"""What the code cites of the documentation is there, and so is what the documentation says of itself and the code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ALGORITHM = "docs/concepts/algorithm.md"
MODULES = sorted(path for folder in ("transmla", "tests", "scripts") for path in (ROOT / folder).rglob("*.py"))
PACKAGE = [path for path in MODULES if path.is_relative_to(ROOT / "transmla")]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
CONCEPTS = [page for page in PAGES if page.parent.name == "concepts"]
# The design notes that the pages replaced, and the ways in which code spoke of them.
OUTDATED = re.compile(r"ALGORITHM\.md|ENGINES\.md|(?i:\b(?:stage|fact)s? \d)|\u00a7")


def named(path):
    return str(path.relative_to(ROOT))


def citations(source):
    """Every page and heading that a Python text cites; a citation may go over lines, of a comment too."""
    text = re.sub(r"\s+", " ", re.sub(r"\n\s*#+ ?", " ", source))
    return re.findall(r'(docs/[\w./-]+\.md), "([^"]+)"', text)


def without_code(page):
    """A Markdown text without its code blocks."""
    return re.sub(r"^ *(```|~~~).*?^ *\1", "", page, flags=re.MULTILINE | re.DOTALL)


def headings(page):
    return [heading.strip() for heading in re.findall(r"^#{1,6} (.+?)#*$", without_code(page), flags=re.MULTILINE)]


def anchors(page):
    """The anchors that a page's headings are given."""
    plain = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings(page))
    return {re.sub(r"[-\s]+", "-", heading) for heading in plain}


def links(page):
    """The targets of a page's links and pictures, but for those that lead elsewhere."""
    text = re.sub(r"`[^`\n]*`", "", without_code(page))
    targets = re.findall(r"\]\(\s*<?([^\s)>]+)", text)
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def uncited(source):
    """What a Python text cites, and the documentation does not have."""
    return [
        (page, heading)
        for page, heading in citations(source)
        if not (ROOT / page).is_file() or heading not in headings((ROOT / page).read_text(encoding="utf-8"))
    ]


def broken(page, folder):
    """The links of a page in ``folder`` that lead to no file, or to no heading of it."""

    def leads_somewhere(target):
        name, _, anchor = target.partition("#")
        file = folder / name
        if name and not file.exists():
            return False
        return not anchor or anchor in anchors(file.read_text(encoding="utf-8") if name else page)

    return [target for target in links(page) if not leads_somewhere(target)]


def test_wrong_citations_are_found():
    source = f'''"""Choose the slots ({ALGORITHM}, "Slots and latent
    from eigenvectors").
    """
    # The latent norm: {ALGORITHM}, "Fitted
    # latent norm"; {ALGORITHM}, "No such heading".
    x = 1  # {ALGORITHM.replace("algorithm", "absent")}, "Notation"
    '''
    assert citations(source) == [
        (ALGORITHM, "Slots and latent from eigenvectors"),
        (ALGORITHM, "Fitted latent norm"),
        (ALGORITHM, "No such heading"),
        ("docs/concepts/absent.md", "Notation"),
    ]
    assert uncited(source) == [(ALGORITHM, "No such heading"), ("docs/concepts/absent.md", "Notation")]


def test_outdated_citations_are_found():
    notes = "algorithm".upper()
    for text in (f"see {notes}.md", f"Stage {4} and the wiring", f"in {chr(0xA7)}5", f"facts {1} and {2}"):
        assert OUTDATED.search(text)
    assert not OUTDATED.search(f'the stages of {ALGORITHM}, "Notation"')


def test_broken_links_are_found(tmp_path):
    (tmp_path / "other.md").write_text("# Other\n\n## The published method (RoRoPE)\n\n```sh\n# no heading\n```\n")
    page = (
        "# A page\n[right](other.md) [right](other.md#the-published-method-rorope) [right](#a-page)\n"
        "![picture](absent.svg) [wrong](other.md#no-heading) [wrong](#b-page) [elsewhere](https://x.org/#y)\n"
        "`[no](link)`\n"
    )
    assert broken(page, tmp_path) == ["absent.svg", "other.md#no-heading", "#b-page"]


def test_every_citation_is_of_a_heading():
    wrong = {named(path): uncited(path.read_text(encoding="utf-8")) for path in MODULES}
    assert {name: cited for name, cited in wrong.items() if cited} == {}
    assert sum(len(citations(path.read_text(encoding="utf-8"))) for path in PACKAGE) > 10


def test_every_page_that_is_cited_is_cited_by_heading():
    for path in PACKAGE:
        source = path.read_text(encoding="utf-8")
        assert len(citations(source)) == len(re.findall(r"docs/concepts/[\w-]+\.md", source)), named(path)


def test_nothing_is_cited_that_readers_do_not_have():
    found = {named(path): OUTDATED.findall(path.read_text(encoding="utf-8")) for path in PACKAGE}
    assert {name: cited for name, cited in found.items() if cited} == {}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page):
    assert broken(page.read_text(encoding="utf-8"), page.parent) == []


def test_tests_that_pages_name_exist():
    tests = {
        node.name
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    }
    mentioned = {name for page in CONCEPTS for name in re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8"))}
    assert len(mentioned) > 10
    assert mentioned - tests == set()


def test_constants_that_pages_list_have_these_values():
    page = (ROOT / ALGORITHM).read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w*[A-Z]\w*)` \| ([\d.e-]+) \|", page, re.MULTILINE)
    values = {
        (node.targets[0].id, float(node.value.value))
        for path in PACKAGE
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, int | float)
    }
    assert len(rows) > 10
    assert {(name, float(value)) for name, value in rows} - values == set()
