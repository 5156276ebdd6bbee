"""What the hosts of the repository and of the package read: workflows, forms, hooks, citation, changelog, metadata."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.version import Version

import transmla
from transmla.config.recipes import shipped_recipes

ROOT = Path(__file__).parent.parent
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = sorted(path for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config")
PAGES = sorted([*ROOT.glob("*.md"), *GITHUB.rglob("*.md"), *FORMS])
DEVELOPERS = ROOT / "docs" / "developers"
HOW_TO = [f"docs/developers/add-{kind}.md" for kind in ("a-family", "an-engine", "a-method", "an-eval-part")]
CHANGES = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def named(path):
    return str(path.relative_to(ROOT))


def read(path):
    return path.read_text(encoding="utf-8")


def load(path):
    """A YAML file; no key of it may be there twice, which YAML itself takes for the last one."""

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            mapping = super().construct_mapping(node, deep)
            assert len(mapping) == len(node.value), (
                f"{named(path)}: a key is there twice in {sorted(map(str, mapping))}"
            )
            return mapping

    return yaml.load(read(path), Loader)


def triggers(workflow):
    """The events that start a workflow; YAML takes the key ``on`` for true."""
    return workflow[True]


def steps(workflow):
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def commands(workflow):
    return [line.strip() for step in steps(workflow) for line in step.get("run", "").splitlines()]


def named_workflow(name):
    return load(GITHUB / "workflows" / name)


def changelog():
    """The sections of the changelog by version, newest first."""
    parts = re.split(r"^## \[(.+?)\].*$", read(ROOT / "CHANGELOG.md"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def pyproject():
    return tomllib.loads(read(ROOT / "pyproject.toml"))


def links(text):
    """The targets of a text's links that lead to files of the repository.

    Issues and pull requests are shown two folders below the repository's address, so theirs begin with
    ``../blob/HEAD/``.
    """
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    return [target.partition("#")[0] for target in targets if not re.match(r"[a-z]+:|#", target)]


def target_of(link, page):
    shown_elsewhere = GITHUB in page.parents
    assert link.startswith("../blob/HEAD/") is shown_elsewhere, link
    return ROOT / link.removeprefix("../blob/HEAD/") if shown_elsewhere else page.parent / link


def is_written(path):
    # The pages for developers come together.
    return path.exists() or (DEVELOPERS in path.parents and not DEVELOPERS.exists())


@pytest.mark.parametrize("path", WORKFLOWS, ids=named)
def test_workflows_are_whole(path):
    workflow = load(path)
    assert workflow["name"]
    assert triggers(workflow)
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job["runs-on"]
        assert job["timeout-minutes"] <= 60
    for step in steps(workflow):
        assert ("run" in step) != ("uses" in step)
        assert re.fullmatch(r"[\w.-]+/[\w./-]+@\S+", step.get("uses", "a/b@v1"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=named)
def test_workflows_call_scripts_that_exist(path):
    for command in commands(load(path)):
        for script in re.findall(r"(?<![\w/.-])(?:scripts|tests)/[\w./-]+", command):
            assert (ROOT / script).is_file(), script
            assert command.startswith("python ") or os.access(ROOT / script, os.X_OK), script


def test_every_change_is_tested_with_the_oldest_and_newest_releases():
    workflow = named_workflow("test.yml")
    assert {"push", "pull_request"} <= set(triggers(workflow))
    assert "scripts/test.sh" in commands(workflow)
    job = workflow["jobs"]["suite"]
    sets = job["strategy"]["matrix"]["include"]
    oldest = pyproject()["project"]["requires-python"].removeprefix(">=")
    assert {oldest, "3.13"} <= {one["python"] for one in sets}
    assert {one.get("transformers") for one in sets} == {None, "5.17"}
    for one in sets:
        assert "transformers" not in one or (ROOT / "constraints" / f"transformers-{one['transformers']}.txt").is_file()
    # Otherwise scripts/env.sh chooses another Python than the matrix.
    assert f"python -m venv {job['env']['TRANSMLA_VENV']}" in commands(workflow)


def test_what_is_published_was_built_and_run_before():
    workflow = named_workflow("release.yml")
    build, publish = workflow["jobs"]["build"], workflow["jobs"]["publish"]
    assert triggers(workflow) == {"push": {"tags": ["v*"]}, "pull_request": None}
    told = "\n".join(commands(workflow))
    order = [
        "python -m build",
        "twine check --strict",
        "pip install dist/*.whl",
        "transmla --version",
        "transmla recipes",
    ]
    places = [told.index(command) for command in order]
    assert places == sorted(places)
    assert publish["needs"] == "build"
    assert publish["if"] == "github.ref_type == 'tag'"
    assert publish["environment"] == "pypi"
    assert publish["permissions"] == {"id-token": "write"}
    assert "permissions" not in build
    uploaded, downloaded = build["steps"][-1], publish["steps"][0]
    assert uploaded["with"]["name"] == downloaded["with"]["name"]
    assert publish["steps"][-1]["uses"].startswith("pypa/gh-action-pypi-publish@")


def test_hooks_are_checks_of_the_suite():
    (local,) = load(ROOT / ".pre-commit-config.yaml")["repos"]
    assert local["repo"] == "local"
    checks = [line.strip() for line in read(ROOT / "scripts" / "test.sh").splitlines()]
    for hook in local["hooks"]:
        assert hook["id"]
        assert hook["name"]
        assert hook["language"] == "system"
        assert hook["pass_filenames"] is False
        assert hook["entry"] in checks
    assert [hook["entry"] for hook in local["hooks"]] == ["ruff check", "ruff format --check", "mypy"]


@pytest.mark.parametrize("path", FORMS, ids=named)
def test_forms_are_whole(path):
    form = load(path)
    assert form.keys() <= {"name", "description", "title", "labels", "body"}
    assert form["name"]
    assert form["description"]
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields) > 0
    for field in form["body"]:
        assert field["type"] in {"markdown", "input", "textarea", "dropdown", "checkboxes"}
        assert field["attributes"]["value" if field["type"] == "markdown" else "label"]
        assert field["type"] != "checkboxes" or all(option["label"] for option in field["attributes"]["options"])
    assert any(field.get("validations", {}).get("required") for field in fields)


def test_there_is_a_form_for_each_kind():
    assert {path.stem for path in FORMS} == {"bug", "family", "engine", "method"}
    assert load(GITHUB / "ISSUE_TEMPLATE" / "config.yml") == {"blank_issues_enabled": True}


def test_the_bug_form_asks_for_what_is_needed():
    asked = read(GITHUB / "ISSUE_TEMPLATE" / "bug.yml")
    for thing in (
        "transmla --version",
        "torch.__version__",
        "transformers.__version__",
        "transmla verify FOLDER --json",
        "transmla_report.json",
    ):
        assert thing in asked


def test_pull_requests_have_a_checklist_for_each_kind_of_addition():
    template = read(GITHUB / "PULL_REQUEST_TEMPLATE.md")
    lists = dict(
        re.findall(r"^\[(docs/developers/add-[\w-]+\.md)\]\(.*\)\n\n((?:- \[ \] .+\n)+)", template, re.MULTILINE)
    )
    assert sorted(lists) == sorted(HOW_TO)
    assert set(HOW_TO) <= set(links(read(ROOT / "CONTRIBUTING.md")))


def test_the_citation_is_one():
    citation, project = load(ROOT / "CITATION.cff"), pyproject()["project"]
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert citation["title"] == project["name"]
    assert citation["license"] == project["license"]
    assert citation["authors"] == project["authors"]
    for reference in citation["references"]:
        assert {"type", "title", "authors"} <= reference.keys()


def test_versions_agree():
    newest = next(iter(changelog()))
    assert load(ROOT / "CITATION.cff")["version"] == newest
    assert Version(newest) >= Version(transmla.__version__)


def test_the_changelog_keeps_its_form():
    versions = [Version(version) for version in changelog()]
    assert versions == sorted(versions, reverse=True)
    assert transmla.__version__ in changelog()
    for version, section in changelog().items():
        kinds = re.findall(r"^### (.+)$", section, re.MULTILINE)
        assert kinds, version
        assert set(kinds) <= CHANGES
        assert len(set(kinds)) == len(kinds)


def test_the_wheel_has_types_and_recipes(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    for name in ("transmla", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, tmp_path)
    build = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", "wheels"]
    subprocess.run(build, cwd=tmp_path, check=True, capture_output=True)
    [wheel] = (tmp_path / "wheels").glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "transmla/py.typed" in names
    recipes = {f"transmla/recipes/{name}.yaml" for name in shipped_recipes()}
    assert {name for name in names if name.endswith(".yaml")} == recipes
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "transmla").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules


def test_links_are_found():
    text = "[a](b.md#c) [d](#e) [f](https://g.org/h)\n```\n[i](j)\n```\n[k](../blob/HEAD/l.md)\n"
    assert links(text) == ["b.md", "../blob/HEAD/l.md"]


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page):
    assert [link for link in links(read(page)) if not is_written(target_of(link, page))] == []


def test_the_fast_lane_names_files_that_are_there():
    lines = (ROOT / "tests" / "fast.txt").read_text(encoding="utf-8").splitlines()
    files = [line for line in lines if not line.startswith("#")]
    assert len(files) == len(set(files)) > 50
    assert all((ROOT / name).is_file() for name in files)
