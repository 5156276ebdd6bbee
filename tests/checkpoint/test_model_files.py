import json

import pytest

from transmla.checkpoint.model_files import copy_model_files
from transmla.errors import CheckpointError


@pytest.fixture
def folders(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    return tmp_path / "in", tmp_path / "out"


def test_exactly_the_companions_are_copied(folders):
    source, output = folders
    files = ["tokenizer.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "LICENSE", "License.txt"]
    files += ["NOTICE", "USE_POLICY.md", "additional_chat_templates/tool.jinja"]
    others = ["config.json", "model.safetensors", "README.md", "tokenization_x.py", "LICENSE.py", "pytorch_model.bin"]
    (source / "additional_chat_templates").mkdir()
    for name in [*files, *others]:
        (source / name).write_text('{"a": [1,  2]}')
    assert sorted(copy_model_files(source, output)) == sorted(files)
    copied = [path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()]
    assert sorted(copied) == sorted(files)
    assert (output / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_requests_for_code_are_dropped(folders):
    source, output = folders
    (source / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["x.Y"]}, "pad": "π"}))
    assert copy_model_files(source, output) == ("tokenizer_config.json",)
    assert json.loads((output / "tokenizer_config.json").read_text()) == {"pad": "π"}


def test_links_out_of_the_folder_are_refused(folders, tmp_path):
    source, output = folders
    (tmp_path / "secret").write_text("secret")
    (source / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="LICENSE is a link out of the model folder"):
        copy_model_files(source, output)


def test_broken_json_is_refused(folders):
    source, output = folders
    (source / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json is not valid JSON"):
        copy_model_files(source, output)
