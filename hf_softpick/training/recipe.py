"""The recipe: one strict YAML file that says everything about a run. Imports neither torch nor transformers.

recipe_text.py reads the text, recipe_model.py and recipe_arguments.py hold the sections `model:` and `training:`,
recipe_errors.py words what is wrong.
"""

import os
import re
from collections.abc import Iterator, Sequence
from io import StringIO
from pathlib import Path
from typing import Any, get_args

from pydantic import Field, ValidationError, field_validator, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.representer import SafeRepresenter

from ..data.redaction import redacted_errors
from ..data.settings import DataSettings, Section, TokenizerSettings
from ..errors import RecipeError
from ..files import write_text
from .recipe_arguments import TrainingSettings
from .recipe_errors import fields_of, find_secrets, word_error
from .recipe_evolution import migrate
from .recipe_model import ModelSettings, Problem, check_model
from .recipe_text import Document, apply_override, dotted, read_document, walk
from .recipe_training import check_training

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}\Z")


class EvalSettings(Section):
    """What is measured during training, and how often."""

    every: int = Field(default=0, ge=0)
    """Optimizer steps between validations; 0: only at the end."""
    max_rows: int | None = Field(default=None, ge=1)
    """Rows of the validation split to use; unset: all."""
    generate_every: int = Field(default=0, ge=0)
    """Optimizer steps between samples of text; 0: only at the end."""
    statistics: int = Field(default=0, ge=0)
    """Optimizer steps between measurements of sinks, sparsity and activations; 0: never."""
    prompts: list[str] = Field(default=["The "])
    """One sample is generated for each."""
    max_new_tokens: int = Field(default=64, ge=1)


class RunSettings(Section):
    """Where the run is kept: the folder root/name."""

    name: str
    root: str = Field(default="runs", min_length=1)

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if not _NAME.match(name):
            raise ValueError("must be 1 to 64 of a-z, 0-9, '.', '_' and '-', and begin with a letter or digit")
        return name

    @field_validator("root")
    @classmethod
    def _plain_root(cls, root: str) -> str:
        if "\0" in root:
            raise ValueError("must be a folder name without NUL characters")
        root = os.path.expanduser(root)
        if root.startswith("~"):
            raise ValueError("begins with the home folder of a user who does not exist; write ./~ for such a name")
        return root

    @property
    def directory(self) -> Path:
        """The run folder."""
        return Path(self.root) / self.name


class Recipe(Section):
    """A checked recipe; made by `load_recipe`."""

    model: ModelSettings
    tokenizer: TokenizerSettings
    data: DataSettings
    training: TrainingSettings  # type: ignore[valid-type]
    eval: EvalSettings = Field(default_factory=EvalSettings)
    run: RunSettings

    @model_validator(mode="before")
    @classmethod
    def _positions_follow_rows(cls, data: Any) -> Any:
        """A model of our own can read at least the rows that it is trained on."""
        model, rows = (data.get(name) if isinstance(data, dict) else None for name in ("model", "data"))
        if not isinstance(model, dict) or not isinstance(rows, dict) or model.get("from") is not None:
            return data
        seq_len = rows.get("seq_len")
        if model.get("max_position_embeddings") is not None or type(seq_len) is not int or seq_len < 1:
            return data
        return {**data, "model": {**model, "max_position_embeddings": seq_len}}

    def resolved(self) -> dict[str, Any]:
        """Everything as plain values, defaults included; `load_recipe` reads it back to an equal recipe."""
        sections = self.model_dump(by_alias=True, exclude={"training"})
        training = {**self.training.own, **self.training.written}
        sections["model"] = {name: value for name, value in sections["model"].items() if value is not None}
        if "rope_parameters" in sections["model"]:
            sections["model"]["rope_parameters"] = self.model.rope_parameters.model_dump(exclude_none=True)
        order = ("model", "tokenizer", "data", "training", "eval", "run")
        return {name: training if name == "training" else sections[name] for name in order}


@redacted_errors()
def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: a YAML file.
        overrides: `section.key=value` each, the value in YAML; they win over the file.

    Raises:
        RecipeError: one line for each thing that is wrong, with its place, what was given and what is allowed.
    """
    document = read_document(path)
    migrate(document)
    for override in overrides:
        apply_override(document, override)
    migrate(document)
    _unset(document)
    problems = document.problems | find_secrets(document)
    try:
        recipe = Recipe.model_validate(document.data, by_alias=True, by_name=False)
    except ValidationError as error:
        problems = word_error(error, document, Recipe) | problems
    if not problems:
        problems = {path: f"{document.place(path)}: {dotted(path)} {what}" for path, what in _check(recipe)}
    if problems:
        raise RecipeError("\n".join(problems.values()))
    return recipe


def _unset(document: Document) -> None:
    """An override with null takes away what the file says, where null is no value of its own."""
    for path, value in list(walk(document.data)):
        if value is not None or len(path) != 2 or not document.place(path).startswith("override"):
            continue
        section = Recipe.model_fields[path[0]].annotation if path[0] in Recipe.model_fields else Section
        field = fields_of(section).get(path[1])
        if field and type(None) not in get_args(field.annotation):
            del document.data[path[0]][path[1]]


def dump_recipe(recipe: Recipe, path: str | Path, notes: Sequence[str] = ()) -> None:
    """Write `recipe.resolved()` as YAML, and `notes` above it as comments of one line each.

    Raises:
        StorageError: the file cannot be written.
    """
    write_text(Path(path), "".join(f"# {note}\n" for note in notes) + to_yaml(recipe.resolved()))


class _Representer(SafeRepresenter):
    """Quotes text with characters that YAML takes for line ends; unquoted they come back as spaces."""

    def represent_str(self, data: str):
        """A scalar node."""
        style = '"' if any(character in data for character in "\r\x85\u2028\u2029\ufeff") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Representer.add_representer(str, _Representer.represent_str)


def to_yaml(values: dict[str, Any]) -> str:
    """Plain values as YAML, in the order that they have."""
    text, yaml = StringIO(), YAML(typ="safe", pure=True)
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    yaml.allow_unicode = True
    yaml.dump(values, text)
    return text.getvalue()


def _check(recipe: Recipe) -> Iterator[Problem]:
    """What does not fit together, across keys and sections."""
    yield from check_model(recipe.model)
    yield from _check_lengths(recipe)
    yield from check_training(recipe)
    yield from _check_folder(recipe.run)


def _check_lengths(recipe: Recipe) -> Iterator[Problem]:
    model, seq_len = recipe.model, recipe.data.seq_len
    longest, rope = model.max_position_embeddings, model.rope_parameters
    scaled = rope is not None and rope.rope_type != "default"
    if longest is not None and seq_len > longest and not scaled:
        yield (
            ("data", "seq_len"),
            f"is {seq_len}, longer than model.max_position_embeddings = {longest};"
            " raise that, or scale model.rope_parameters",
        )
    vocabulary = recipe.tokenizer.train_bpe
    if vocabulary is not None and model.vocab_size is not None and model.vocab_size < vocabulary:
        yield (
            ("model", "vocab_size"),
            f"is {model.vocab_size}, smaller than tokenizer.train_bpe = {vocabulary}; leave it out",
        )


def _check_folder(run: RunSettings) -> Iterator[Problem]:
    try:
        root, directory = Path(run.root).resolve(), run.directory.resolve()
    except (OSError, RuntimeError) as error:
        yield ("run", "root"), f"is no usable folder: {error}"
        return
    if directory.parent != root:
        yield ("run", "name"), f"is a link that leads out of run.root, to {directory}; choose another name"
