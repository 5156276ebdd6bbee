"""Models as they are published: each is converted as far as it can be, or refused with its own true reason."""

import pytest

from tests.published.checkpoints import HERE, build, rows, truths
from transmla.config import ConvertRequest, InspectRequest
from transmla.convert import plan as planning
from transmla.convert.inspection import inspect
from transmla.convert.opened import open_model
from transmla.errors import TransMLAError

TRUTHS = truths()


@pytest.fixture(params=[truth for truth in TRUTHS if truth.verdict == "refused"], ids=lambda truth: truth.name)
def refused(request):
    return request.param


def reason(function, request):
    with pytest.raises(TransMLAError) as caught:
        function(request)
    return str(caught.value)


def test_every_config_has_a_line_and_every_line_a_config():
    configs = {path.stem for path in (HERE / "configs").iterdir()}
    assert configs == {truth.name for truth in TRUTHS}
    assert configs >= {row[0] for row in rows("TENSORS.tsv")}
    assert len(TRUTHS) == len(configs)


def test_the_reason_is_the_true_one_and_the_same_in_both_commands(tmp_path, refused):
    folder = build(refused.name, tmp_path / "model")
    found = reason(inspect, InspectRequest(model=str(folder)))
    request = ConvertRequest(model=str(folder), output_dir=tmp_path / "out", exact=True)
    assert reason(planning.plan_conversion, request) == found
    for words in refused.words:
        assert words in found
    # No flag helps, so none is named.
    assert "--max-position-embeddings" not in found
    assert str(tmp_path) not in found or "not a valid" in found


@pytest.mark.parametrize("name", [truth.name for truth in TRUTHS if truth.verdict == "converts"])
def test_a_model_that_can_be_converted_is(tmp_path, name):
    folder = build(name, tmp_path / "model")
    opened = open_model(InspectRequest(model=str(folder)))
    assert opened.left_over == ()
    assert opened.spec.max_position_embeddings == opened.config.max_position_embeddings


@pytest.mark.parametrize(
    "truth", [truth for truth in TRUTHS if truth.verdict.startswith("within")], ids=lambda t: t.name
)
def test_a_model_that_can_be_converted_for_shorter_contexts(tmp_path, truth):
    folder, most = build(truth.name, tmp_path / "model"), int(truth.verdict.split()[1])
    opened = open_model(InspectRequest(model=str(folder), max_position_embeddings=most))
    assert opened.spec.max_position_embeddings == most
    for asked in (None, most + 1):
        found = reason(open_model, InspectRequest(model=str(folder), max_position_embeddings=asked))
        # The first hint is the one that works.
        assert f"--max-position-embeddings {most}" in found


@pytest.mark.parametrize("name", ["smollm2-135m", "llama-2-70b", "qwen3-30b-a3b", "mimo-7b"])
def test_a_plan_is_made_without_a_byte_of_weights(tmp_path, monkeypatch, name):
    monkeypatch.setattr(planning, "check_free_space", lambda *arguments: None)
    request = ConvertRequest(
        model=str(build(name, tmp_path / "model")),
        output_dir=tmp_path / "out",
        kv_ratio=0.5,
        calibration=("text.txt",),
        dtype="bfloat16",
    )
    plan = planning.plan_conversion(request)
    assert plan.sizes.cache_numbers <= plan.spec.cache_numbers / 2
    assert plan.summary.left_over == ()
