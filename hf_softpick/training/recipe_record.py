"""What the recipe of a run meant, written into its records so that another version can compare it with one of now.

A record holds every setting, flat and under its dotted name, those at their default apart: a field that the record
does not know is compared by its default of now, one that is gone by its default of then.
"""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from transformers import TrainingArguments

from hf_softpick.errors import RecipeError
from hf_softpick.modeling.configuration_softpick import SoftpickConfig
from hf_softpick.training.recipe import Recipe, load_recipe
from hf_softpick.training.recipe_arguments import DEFAULTS, installed_name
from hf_softpick.training.recipe_evolution import present_path, was_default
from hf_softpick.training.recipe_model import REQUIRED

SCHEMA = 2
"""1 had no number: `identity`, nested, with what a run could not change, and `length` in finished.json."""

UNSET = "unset"


@dataclass(frozen=True)
class Settings:
    """Dotted names and plain values: `given` differ from their defaults, the rest is in `defaults`."""

    given: dict[str, Any]
    defaults: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.given.get(name, self.defaults.get(name))

    def record(self) -> dict[str, Any]:
        """What goes into manifest.json and finished.json under `recipe`."""
        return {"schema": SCHEMA, "settings": self.given, "defaults": self.defaults}


def settings(recipe: Recipe) -> Settings:
    """Every setting of `recipe` with the value that it has in effect."""
    found: dict[str, tuple[Any, Any]] = {}
    for name in type(recipe).model_fields:
        section = getattr(recipe, name)
        if name == "training":
            found.update(_training(section))
        elif name == "model" and recipe.model.from_ is None:
            found.update(_new_model(recipe))
        else:
            found.update(_section(section, f"{name}."))
    found = json.loads(json.dumps(found))
    return Settings(
        {name: value for name, (value, default) in found.items() if value != default},
        {name: value for name, (value, default) in found.items() if value == default},
    )


def _section(section: BaseModel, prefix: str) -> Iterator[tuple[str, tuple[Any, Any]]]:
    for name, field in type(section).model_fields.items():
        value, path = getattr(section, name), prefix + (field.alias or name)
        items = value if isinstance(value, list) else [value]
        if all(isinstance(item, BaseModel) for item in items) and items:
            for index, item in enumerate(items):
                yield from _section(item, f"{path}.{index}." if value is items else f"{path}.")
        else:
            yield path, (value, None if field.is_required() else field.get_default(call_default_factory=True))


def _new_model(recipe: Recipe) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """What is left unset has the value that SoftpickConfig gives it."""
    given = recipe.model.config_fields()
    config = SoftpickConfig(**given)
    plain = SoftpickConfig(**{name: given[name] for name in (*REQUIRED, "max_position_embeddings")})
    for path, (value, default) in _section(recipe.model, "model."):
        name = path.removeprefix("model.")
        if name.startswith("rope_parameters"):
            continue
        known = name not in ("from", "revision", "attn_implementation", "vocab_size")
        value, default = (getattr(config, name), getattr(plain, name)) if known else (value, default)
        yield path, (value, None if name in REQUIRED else default)
    for name in {**plain.rope_parameters, **config.rope_parameters}:
        values = (config.rope_parameters.get(name), plain.rope_parameters.get(name))
        yield f"model.rope_parameters.{name}", values


def _training(section: Any) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """What is left unset has the value that the installed transformers gives it."""
    upstream = {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(TrainingArguments)
    }
    written = section.written
    for name, field in type(section).model_fields.items():
        default = DEFAULTS.get(name, upstream.get(installed_name(name), field.default))
        default = getattr(default, "value", default)
        value = written[name] if name in written else getattr(section, name) if name not in upstream else default
        yield f"training.{name}", (value, default)


def read_settings(record: dict[str, Any], run: Path) -> Settings:
    """The settings in a record of any version.

    Args:
        record: a checkpoint's manifest, or finished.json.
        run: the run folder, whose recipe.yaml says what records of schema 1 leave out.

    Raises:
        RecipeError: that recipe.yaml cannot be read, or the record is of a newer version.
        KeyError, TypeError, ValueError: it is no such record.
    """
    if "recipe" in record:
        if record["recipe"]["schema"] > SCHEMA:
            raise RecipeError(
                f"{run} was written by a newer version of hf_softpick. Update it, or choose another run.name."
            )
        return Settings(*(_present(dict(record["recipe"][kind])) for kind in ("settings", "defaults")))
    known = {name: value for name, value in _flat(record["identity"]) if value is not None}
    said = settings(load_recipe(run / "recipe.yaml"))
    for name, value in dict(record.get("length", {})).items():
        known[f"training.{name}"] = said.defaults.get(f"training.{name}", -1) if value is None else value
    return Settings({**said.given, **_present(known)}, said.defaults)


def _present(flat: dict[str, Any]) -> dict[str, Any]:
    return {".".join(map(str, present_path(_parts(name)))): value for name, value in flat.items()}


def _parts(name: str) -> tuple[str | int, ...]:
    return tuple(int(part) if part.isdecimal() else part for part in name.split("."))


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for name, item in items:
        if isinstance(item, dict) or (isinstance(item, list) and item and isinstance(item[0], dict)):
            yield from _flat(item, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", item


def differences(old: Settings, new: Settings) -> dict[str, tuple[Any, Any]]:
    """Settings that mean something else than before, each with its value before and now."""
    before, after = old.defaults | old.given, new.defaults | new.given
    found = {}
    for name in sorted(before.keys() | after.keys()):
        if name not in before:
            equal = name in new.defaults
        elif name not in after:
            equal = (name in old.defaults and name not in old.given) or was_default(_parts(name), before[name])
        else:
            equal = before[name] == after[name]
        if not equal:
            found[name] = (before.get(name, UNSET), after.get(name, UNSET))
    return found
