"""Every field of every section, given something odd: a RecipeError or a recipe, never another exception."""

import json

import pytest

from hf_softpick.data.settings import SourceSettings
from hf_softpick.errors import RecipeError
from hf_softpick.training.recipe import Recipe, load_recipe
from hf_softpick.training.recipe_model import RopeSettings

TEXT = """\
model: {hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4}
tokenizer: {train_bpe: 300}
data: {seq_len: 64, sources: [{path: stdlib}]}
training: {max_steps: 5}
eval: {}
run: {name: small}
"""

ODD = ["text", "''", "-1", "-0.5", "0", ".nan", "[]", "[1]", "null", "true", "{a: 1}", "1e300", "99999999999999999999"]


def _names(section):
    return [field.alias or name for name, field in section.model_fields.items()]


def _paths():
    yield from _names(Recipe)
    for name, field in Recipe.model_fields.items():
        yield from (f"{name}.{key}" for key in _names(field.annotation))
    yield from (f"data.sources.0.{key}" for key in _names(SourceSettings))
    yield from (f"model.rope_parameters.{key}" for key in _names(RopeSettings))
    yield "unknown"
    yield "model.unknown"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """The recipe to which odd values are given."""
    file = tmp_path_factory.mktemp("fuzz") / "r.yaml"
    file.write_text(TEXT)
    return file


@pytest.mark.parametrize("value", ODD)
def test_odd_values(path, value):
    refused = accepted = 0
    for name in _paths():
        try:
            recipe = load_recipe(path, [f"{name}={value}"])
        except RecipeError as error:
            assert f"override {name}" in str(error) or str(path) in str(error), f"{name}={value}: {error}"
            assert "Traceback" not in str(error)
            refused += 1
        else:
            json.dumps(recipe.resolved(), allow_nan=False)
            accepted += 1
    # Not vacuous: something is wrong with each odd value somewhere, and most of the fields were reached. Null unsets.
    assert refused > (20 if value == "null" else 30)
    assert refused + accepted > 140
