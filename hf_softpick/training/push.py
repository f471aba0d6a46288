"""Uploading RUN/final to the Hub: an allow-list of files, and an error that says how to try again."""

from pathlib import Path

from hf_softpick.errors import HubError

ALLOWED = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "configuration_*.py",
    "modeling_*.py",
    "attention_*.py",
    "normalizers.py",
    "README.md",
)


def push(final: Path, repo_id: str, private: bool = True, revision: str | None = None) -> str:
    """Upload what ALLOWED names of `final`; the repository is made when it does not exist, private unless told.

    Returns:
        the address of the commit.

    Raises:
        HubError: the Hub or the network failed; the message holds the command that uploads later.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=final,
            allow_patterns=list(ALLOWED),
            revision=revision,
            commit_message="Upload a model trained with hf_softpick",
        )
    except (
        Exception
    ) as error:  # Whatever the client raises (HTTP, DNS, offline mode, login): training is done and kept.
        command = ["hf upload", repo_id, str(final), "."]
        command += [f"--include '{pattern}'" for pattern in ALLOWED]
        command += ["--private"] if private else []
        command += [f"--revision {revision}"] if revision else []
        first_line = str(error).strip().split("\n")[0]
        raise HubError(
            f"Training is finished and saved in {final}, but uploading it to {repo_id} failed: "
            f"{type(error).__name__}: {first_line}\nTo upload it later: {' '.join(command)}"
        ) from error
    return str(commit.commit_url)
