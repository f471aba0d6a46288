"""A run that finished: whether its final/ is still whole, and its upload. finished.json is the record of both."""

from typing import Any

from hf_softpick.errors import CheckpointError
from hf_softpick.files import read_object, write_json
from hf_softpick.training import checkpointing, resume
from hf_softpick.training.push import push
from hf_softpick.training.recipe import Recipe


def faults(recipe: Recipe) -> list[str]:
    """What is wrong with RUN/final of a finished run, one line a file.

    Weights must be those that were written; what people edit (card, configuration) only has to be there.
    """
    final = recipe.run.directory / "final"
    recorded = resume.read_finished(recipe).get("final")
    if not isinstance(recorded, dict):  # finished by an older version
        index = read_object(final / "model.safetensors.index.json")
        weights = set(index.get("weight_map", {}).values()) or {"model.safetensors"}
        recorded = dict.fromkeys(["config.json", *sorted(weights)])
    weights = {
        name: file for name, file in recorded.items() if isinstance(file, dict) and name.endswith(".safetensors")
    }
    gone = [name for name in recorded if name not in weights and not (final / name).is_file()]
    return [f"{name} is missing" for name in gone] + checkpointing.file_faults(final, weights)


def require_checkpoint(recipe: Recipe, step: int, found: int | None) -> None:
    """Refuse to write a damaged final/ again from anything but the checkpoint of its own step.

    Raises:
        CheckpointError: what is wrong with final/, and which checkpoint there is.
    """
    if found == step:
        return
    directory = recipe.run.directory
    newest = f"the newest that can be used is of step {found}" if found is not None else "there is none at all"
    raise CheckpointError(
        f"{directory / 'final'} is damaged ({'; '.join(faults(recipe))}), and no checkpoint of step {step}, where the "
        f"run finished, is left to write it again from: {newest}. Put the files back; or delete "
        f"{directory / resume.FINISHED} to train again from what there is; or choose another run.name."
    )


def is_uploaded(recipe: Recipe) -> bool:
    """Whether nothing is left to upload, because the recipe asks for no upload or the record says that it was made."""
    if not recipe.training.arguments.get("push_to_hub"):
        return True
    made = resume.read_finished(recipe).get("uploads", [])
    return any({name: each.get(name) for name in ("repo", "revision")} == _destination(recipe) for each in made)


def upload(recipe: Recipe) -> None:
    """Upload RUN/final, and write into the record that it was. For rank 0 to call.

    Raises:
        HubError: it failed; the same command tries again.
    """
    hub, destination = recipe.training.arguments, _destination(recipe)
    private = hub.get("hub_private_repo") is not False
    url = push(recipe.run.directory / "final", destination["repo"], private, destination["revision"])
    record = resume.read_finished(recipe)
    record["uploads"] = [*record.get("uploads", []), {**destination, "commit": url}]
    write_json(recipe.run.directory / resume.FINISHED, record)
    print("Uploaded:", url, flush=True)


def _destination(recipe: Recipe) -> dict[str, Any]:
    hub = recipe.training.arguments
    return {"repo": hub.get("hub_model_id") or recipe.run.name, "revision": hub.get("hub_revision")}
