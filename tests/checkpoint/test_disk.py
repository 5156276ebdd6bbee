import errno
import os
import shutil

import pytest

from transmla.checkpoint.disk import output_errors
from transmla.errors import OutputError


def refuse(source, target):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_refuses_a_file_is_told_with_its_name(tmp_path):
    with (
        pytest.raises(OutputError, match=r"absent/file cannot be written: No such file or directory\.$"),
        output_errors(tmp_path),
    ):
        (tmp_path / "absent" / "file").write_text("")


def test_of_a_whole_tree_the_first_file_is_told(tmp_path):
    (tmp_path / "from").mkdir()
    for name in "ab":
        (tmp_path / "from" / name).write_text(name)
    told = pytest.raises(OutputError, match=r"^[^\n]*to/[ab] cannot be written: [^\n]*No space left on device\.$")
    with told, output_errors(tmp_path / "to"):
        shutil.copytree(tmp_path / "from", tmp_path / "to", copy_function=refuse)


def test_other_errors_pass(tmp_path):
    with pytest.raises(ValueError, match="not a disk"), output_errors(tmp_path):
        raise ValueError("not a disk")
