import os
import shutil
import signal
import subprocess
import sys

import pytest

from transmla.checkpoint.journal import Journal
from transmla.checkpoint.publish import Staging, check_free_space, check_output, staging_folder
from transmla.errors import OutputError, PublishedError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def fill(staging, text="new"):
    (staging.folder / "config.json").write_text(text)


def interrupted_run(output, finished):
    with Staging(output, identity="x") as staging:
        fill(staging, "half")
        for entry in finished:
            staging.journal.append(entry)
        raise RuntimeError("boom")


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out"


def test_publish_leaves_only_the_output(tmp_path, output):
    with Staging(output, identity="x") as staging:
        assert not staging.resumed
        fill(staging)
        staging.journal.append({"layer": 0})
        assert not output.exists()
        staging.publish()
    assert names(tmp_path) == ["out"]
    assert names(output) == ["config.json"]


def test_parents_are_created(tmp_path):
    with Staging(tmp_path / "a" / "b", identity="x") as staging:
        fill(staging)
        staging.publish()
    assert names(tmp_path / "a") == ["b"]


def test_an_empty_output_is_filled(output):
    output.mkdir()
    with Staging(output, identity="x") as staging:
        fill(staging)
        staging.publish()
    assert names(output) == ["config.json"]


def test_a_failure_before_any_finished_work_leaves_nothing(tmp_path, output):
    with pytest.raises(RuntimeError, match="boom"):
        interrupted_run(output, finished=[])
    assert names(tmp_path) == []


def test_finished_work_is_resumed(tmp_path, output):
    with pytest.raises(RuntimeError, match="boom"):
        interrupted_run(output, finished=[{"layer": 0}])
    assert names(tmp_path) == [".out.partial"]
    with Staging(output, identity="x", resume=True) as staging:
        assert staging.resumed
        assert staging.journal.entries == [{"layer": 0}]
        assert (staging.folder / "config.json").read_text() == "half"
        staging.publish()
    assert names(tmp_path) == ["out"]


def test_work_of_another_identity_is_not_resumed(output):
    with Staging(output, identity="x") as staging:
        fill(staging)
        staging.journal.append({"layer": 0})
    with pytest.raises(OutputError, match=r"had another source, text or settings: repeat those, or start anew"):
        Staging(output, identity="y", resume=True)
    with Staging(output, identity="x", resume=True) as staging:
        assert staging.journal.entries == [{"layer": 0}]


def test_without_resume_the_work_starts_anew(output):
    with Staging(output, identity="x") as staging:
        fill(staging)
        staging.journal.append({"layer": 0})
    with Staging(output, identity="x") as staging:
        assert not staging.resumed
        assert staging.journal.entries == []
        assert names(staging.folder) == []


def test_discard(tmp_path, output):
    with Staging(output, identity="x") as staging:
        staging.journal.append({"layer": 0})
        staging.discard()
    assert names(tmp_path) == []


def test_overwrite_replaces_at_publication(tmp_path, output):
    output.mkdir()
    (output / "config.json").write_text("old")
    (output / "stale.json").write_text("old")
    with Staging(output, identity="x", overwrite=True) as staging:
        fill(staging)
        assert (output / "config.json").read_text() == "old"
        staging.publish()
    assert names(tmp_path) == ["out"]
    assert names(output) == ["config.json"]
    assert (output / "config.json").read_text() == "new"


def test_an_output_that_came_into_being_meanwhile_is_kept(output):
    with Staging(output, identity="x") as staging:
        fill(staging)
        output.mkdir()
        (output / "theirs").write_text("theirs")
        with pytest.raises(OutputError, match=r"is complete but cannot be renamed to .*out: Directory not empty"):
            staging.publish()
    assert names(output) == ["theirs"]


def test_a_failing_rename_brings_the_old_output_back(output, monkeypatch):
    output.mkdir()
    (output / "config.json").write_text("old")
    rename = os.rename

    def fail_for_model(source, target):
        if str(source).endswith("model"):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_for_model)
    with Staging(output, identity="x", overwrite=True) as staging:
        fill(staging)
        with pytest.raises(OutputError, match=r"cannot be renamed to .*out: Input/output error"):
            staging.publish()
    assert (output / "config.json").read_text() == "old"


def test_a_kill_between_the_two_renames_is_repaired(output):
    replaced = staging_folder(output) / "replaced"
    replaced.mkdir(parents=True)
    (replaced / "config.json").write_text("old")
    with Staging(output, identity="x", overwrite=True):
        assert (output / "config.json").read_text() == "old"
    assert names(output) == ["config.json"]


def test_a_kill_after_the_two_renames_is_tidied(tmp_path, output):
    root = staging_folder(output)
    for folder in (root / "replaced", output):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("some")
    journal = Journal(root / "journal.jsonl")
    journal.start("x")
    journal.append({"layer": 0})
    with Staging(output, identity="x", overwrite=True) as staging:
        assert not staging.resumed
        fill(staging)
        staging.publish()
    assert names(tmp_path) == ["out"]
    assert (output / "config.json").read_text() == "new"


def test_a_second_process_is_refused(output):
    second = """
import sys
from pathlib import Path
from transmla.checkpoint.publish import Staging
Staging(Path(sys.argv[1]), identity="x")
"""
    with Staging(output, identity="x"):
        result = subprocess.run([sys.executable, "-c", second, str(output)], capture_output=True, text=True)
    assert "BusyError: Another process is writing" in result.stderr
    with Staging(output, identity="x"), pytest.raises(OutputError, match=r"Another process is writing .*out; wait"):
        Staging(output, identity="x")


def test_a_run_whose_folder_was_deleted_leaves_that_of_the_next_alone(tmp_path, output):
    with Staging(output, identity="x") as first:
        first.journal.append({"layer": 0})
        shutil.rmtree(staging_folder(output))
        with Staging(output, identity="x") as second:
            second.journal.append({"layer": 7})
            with pytest.raises(OutputError, match="deleted or replaced while this run"):
                first.journal.append({"layer": 1})
            with pytest.raises(OutputError, match="deleted or replaced while this run"):
                first.publish()
            first.discard()
            second.journal.append({"layer": 8})
            (second.folder / "file").write_text("second")
            second.publish()
    assert (output / "file").read_text() == "second"
    assert list(tmp_path.iterdir()) == [output]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"out\.partial cannot be prepared: Not a directory"):
        Staging(tmp_path / "file" / "out", identity="x")


KILLED = """
import os, sys
from pathlib import Path
import torch
from transmla.checkpoint.shards import TensorPlan, plan_shards
from transmla.checkpoint.publish import Staging
from transmla.checkpoint.writer import CheckpointWriter

plans = [TensorPlan(f"t{i}", (50,), torch.float32) for i in range(4)]
shards = plan_shards(plans, max_shard_size=400)
with Staging(Path(sys.argv[1]), identity="x", resume=True) as staging:
    writer = CheckpointWriter(staging.folder, shards, resume=staging.resumed)
    done = [entry["name"] for entry in staging.journal.entries]
    writer.mark_written(done)
    print(done)
    for i, plan in enumerate(plans):
        if plan.name in done:
            continue
        writer.write({plan.name: torch.full((50,), float(i))})
        writer.flush()
        staging.journal.append({"name": plan.name})
        if str(i) == sys.argv[2]:
            os.kill(os.getpid(), 9)
    writer.finish()
    staging.publish()
"""


def test_a_killed_writer_leaves_no_output_and_is_resumed(tmp_path, output):
    def run(kill_after):
        command = [sys.executable, "-c", KILLED, str(output), kill_after]
        return subprocess.run(command, capture_output=True, text=True)

    assert run("1").returncode == -signal.SIGKILL
    assert names(tmp_path) == [".out.partial"]
    journal = staging_folder(output) / "journal.jsonl"
    journal.write_bytes(journal.read_bytes() + b'{"name": "t')
    second = run("never")
    assert (second.returncode, second.stdout) == (0, "['t0', 't1']\n"), second.stderr
    assert names(tmp_path) == ["out"]

    straight = tmp_path / "straight"
    subprocess.run([sys.executable, "-c", KILLED, str(straight), "never"], check=True, capture_output=True)
    assert names(straight) == names(output)
    assert all((straight / name).read_bytes() == (output / name).read_bytes() for name in names(straight))


def test_a_torn_line_is_forgotten_for_good(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.start("x")
    journal.append({"layer": 0})
    path.write_bytes(path.read_bytes() + b'{"lay')
    again = Journal(path)
    again.append({"layer": 1})
    assert Journal(path).entries == [{"layer": 0}, {"layer": 1}]


@pytest.mark.parametrize("damaged", [b"{\xd3}\n", b"[1]\n", b"\x00\x00\n", b"{\n", b"[" * 5000 + b"\n"])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_damaged_line_is_forgotten_with_all_behind_it(tmp_path, damaged, at):
    path = tmp_path / "journal.jsonl"
    lines = [b'{"identity": "x"}\n', b'{"layer": 0}\n', b'{"layer": 1}\n']
    path.write_bytes(b"".join([*lines[:at], damaged, *lines[at:]]))
    journal = Journal(path)
    assert journal.identity == ("x" if at else None)
    assert journal.entries == [{"layer": 0}][: max(0, at - 1)]
    assert path.read_bytes() == b"".join(lines[:at])


def test_a_journal_torn_in_its_first_line(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"ident')
    journal = Journal(path)
    assert (journal.identity, journal.entries) == (None, [])


class TestCheckOutput:
    def check(self, output, source=None, overwrite=False):
        check_output(output, source_folder=source, overwrite=overwrite)

    def test_new_and_empty_folders_are_fine(self, output):
        self.check(output / "deep" / "down")
        output.mkdir()
        self.check(output)

    def test_not_empty(self, output):
        output.mkdir()
        (output / "config.json").write_text("{}")
        with pytest.raises(OutputError, match=r"out is not empty; .* --overwrite"):
            self.check(output)
        self.check(output, overwrite=True)

    def test_overwrite_deletes_only_models(self, output):
        output.mkdir()
        (output / "thesis.tex").write_text("")
        with pytest.raises(OutputError, match="does not hold a model, so --overwrite will not delete it"):
            self.check(output, overwrite=True)

    @pytest.mark.parametrize(("output", "source"), [("m", "m"), ("m/out", "m"), ("m", "m/source"), ("link/out", "m")])
    def test_overlap_with_the_source(self, tmp_path, output, source):
        (tmp_path / source).mkdir(parents=True)
        (tmp_path / "link").symlink_to(tmp_path / "m")
        with pytest.raises(OutputError, match=r"and the source .* overlap; choose a folder outside of it"):
            self.check(tmp_path / output, tmp_path / source, overwrite=True)

    def test_neighbours_do_not_overlap(self, tmp_path):
        (tmp_path / "model").mkdir()
        self.check(tmp_path / "model-mla", tmp_path / "model")

    @pytest.mark.parametrize("output", ["file", "file/out"])
    def test_a_file_in_the_way(self, tmp_path, output):
        (tmp_path / "file").write_text("")
        with pytest.raises(OutputError, match=r"file is a file; the output .* needs a folder there"):
            self.check(tmp_path / output)

    def test_a_parent_that_is_not_writable(self, output, monkeypatch):
        monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
        with pytest.raises(OutputError, match=r"is not writable, so .*out cannot be created"):
            self.check(output)

    def test_a_mount_point(self, output, monkeypatch):
        monkeypatch.setattr(os.path, "ismount", lambda path: path == output)
        with pytest.raises(OutputError, match=r"out is a mount point .* choose a new folder inside it"):
            self.check(output)


def test_free_space(output):
    check_free_space(output / "deep", 1)
    with pytest.raises(
        OutputError, match=r"out needs 1,000,000,000,000,000,000 bytes, but its disk has only [\d,]+ free"
    ):
        check_free_space(output, 10**18)


def test_an_output_that_has_come_since_is_refused_before_the_work(output):
    output.mkdir(parents=True)
    (output / "config.json").write_text("{}")
    with pytest.raises(PublishedError, match=r"is not empty; choose another folder, or replace it with --overwrite"):
        Staging(output, identity="x")
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    with Staging(output, identity="x", overwrite=True) as staging:
        assert staging.folder.is_dir()
