"""Uploading: against a small Hub of our own."""

import json
import shlex

import fake_hub
import pytest

from hf_softpick.errors import HubError
from hf_softpick.training.push import ALLOWED, push

FILES = ["model.safetensors", "config.json", "tokenizer.json", "README.md", "modeling_softpick.py", "normalizers.py"]
SECRETS = [".env", "training_args.bin", "notes.txt", "optimizer.pt", "id_rsa"]


@pytest.fixture
def hub(monkeypatch):
    """A Hub on this machine; huggingface_hub talks to it."""
    yield from fake_hub.serve(monkeypatch)


@pytest.fixture
def final(tmp_path):
    """A finished model among files that must stay here."""
    folder = tmp_path / "it's final"
    folder.mkdir()
    for name in FILES + SECRETS:
        (folder / name).write_text(f"content of {name}")
    return folder


def test_only_what_belongs_to_a_model_is_uploaded(hub, final):
    """An allow-list: whatever else lies in the folder stays on this machine."""
    url = push(final, "me/tiny")
    assert url.endswith("/me/tiny/commit/1")
    create, preupload, commit = (
        next(body for path, body in hub.requests if part in path) for part in ("/create", "/preupload/", "/commit/")
    )
    assert json.loads(create).get("visibility") == "private" or json.loads(create)["private"] is True
    lines = [json.loads(line) for line in commit.splitlines()]
    assert sorted(line["value"]["path"] for line in lines if line["key"] == "file") == sorted(FILES)
    assert not any(name.encode() in body for name in SECRETS for body in (preupload, commit))
    assert not any(b"canary" in body for _, body in hub.requests)


@pytest.mark.parametrize("status", [403, 404])
def test_a_refusal_says_how_to_try_again(hub, final, status):
    """The model is trained and kept: the exit code says so, and the command is ready to copy."""
    hub.refuse = status
    with pytest.raises(HubError) as caught:
        push(final, "me/tiny", revision="v 1")
    message = str(caught.value)
    assert caught.value.exit_code == 69
    assert "Training is finished" in message and "Run the same command again" in message and "canary" not in message
    command = shlex.split(message.split("by hand: ")[1])
    included = [word for pattern in ALLOWED for word in ("--include", pattern)]
    assert command == ["hf", "upload", "me/tiny", str(final), ".", *included, "--private", "--revision", "v 1"]


def test_a_branch_is_made(hub, final):
    """Uploading to a revision that does not exist is a 404."""
    push(final, "me/tiny", revision="v1")
    paths = [path for path, _ in hub.requests]
    assert any(path.endswith("/branch/v1") for path in paths) and any(path.endswith("/commit/v1") for path in paths)


def test_a_hub_that_hangs_is_given_up(hub, final, monkeypatch, capsys):
    """The client waits for ever, and says nothing while it does."""
    monkeypatch.setattr("hf_softpick.training.push.PATIENCE", 1)
    hub.talks.clear()
    with pytest.raises(HubError, match="no answer within 1 seconds"):
        push(final, "me/tiny")
    assert f"Uploading {len(FILES)} files" in capsys.readouterr().out


def test_a_link_is_not_followed(hub, final, tmp_path):
    """Whoever plants one in a shared run folder would publish what it points to."""
    (tmp_path / "secret").write_text("secret")
    (final / "tokenizer_config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(HubError, match="tokenizer_config.json"):
        push(final, "me/tiny")
    assert not hub.requests
