"""Uploading RUN/final to the Hub: an allow-list of files, a time limit, and an error that says how to try again."""

import fnmatch
import shlex
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from hf_softpick import modeling
from hf_softpick.data.redaction import redact
from hf_softpick.errors import HubError

ALLOWED = (
    *"config.json generation_config.json model*.safetensors model.safetensors.index.json tokenizer.json".split(),
    *"tokenizer_config.json special_tokens_map.json chat_template.jinja README.md".split(),
    *sorted(path.name for path in Path(modeling.__path__[0]).glob("*.py")),  # what loads the weights elsewhere
)


# A Hub is given up after this many seconds, and one more for each MiB: slower than that is as good as hanging.
PATIENCE = 300


def push(final: Path, repo_id: str, private: bool = True, revision: str | None = None) -> str:
    """Upload what ALLOWED names of `final`; repository (private unless told) and branch are made where they are not.

    Returns:
        the address of the commit.

    Raises:
        HubError: the Hub or the network failed, or took too long; the message holds the commands that upload later.
    """
    files = [path for path in sorted(final.iterdir()) if any(fnmatch.fnmatch(path.name, form) for form in ALLOWED)]
    linked = [path.name for path in files if path.is_symlink()]
    if linked:
        raise HubError(
            f"{final} holds symbolic links ({', '.join(linked)}), and what they point to may not be meant for the "
            "Hub. Nothing was uploaded. Put the files themselves there and run the same command again."
        )
    size = sum(path.stat().st_size for path in files) / 2**20
    limit = PATIENCE + size
    print(
        f"Uploading {len(files)} files ({size:,.1f} MiB) of {final} to {repo_id}, in at most {limit:.0f} seconds.",
        flush=True,
    )
    try:
        return _within(limit, lambda: _upload(final, [path.name for path in files], repo_id, private, revision))
    except Exception as error:  # whatever the client raises (HTTP, DNS, offline mode, login)
        command = ["hf", "upload", repo_id, str(final), "."]
        command += [word for pattern in ALLOWED for word in ("--include", pattern)]
        command += ["--private"] if private else []
        command += ["--revision", revision] if revision else []
        first_line = redact(str(error).strip().split("\n")[0])
        raise HubError(
            f"Training is finished and saved in {final}, but uploading it to {repo_id} failed: "
            f"{type(error).__name__}: {first_line}\nRun the same command again to try again, or upload it by hand: "
            f"{shlex.join(command)}"
        ) from error


def _upload(final: Path, names: list[str], repo_id: str, private: bool, revision: str | None) -> str:
    from huggingface_hub import HfApi

    api = HfApi()
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=final,
        allow_patterns=names,
        revision=revision,
        commit_message="Upload a model trained with hf_softpick",
    )
    return str(commit.commit_url)


def _within(seconds: float, call: Callable[[], str]) -> str:
    """`call()`, given up after `seconds`: the client sets no time limit of its own, and goes on in a thread."""
    outcome: Future[str] = Future()

    def work() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        return outcome.result(seconds)
    except TimeoutError:
        if outcome.done():
            raise
        raise TimeoutError(f"no answer within {seconds:.0f} seconds") from None
