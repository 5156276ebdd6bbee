from pathlib import Path

import pytest

from transmla.config import EvalRequest

RECIPES = sorted((Path(__file__).parents[2] / "configs" / "eval").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_requests(recipe):
    request = EvalRequest.build(recipe=recipe, flags={"source": "a", "converted": ["b"]})
    assert request.dataset
    assert request.tasks
