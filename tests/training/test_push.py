"""Uploading: against a small Hub of our own, which says what it was sent, or refuses."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from huggingface_hub import constants

from hf_softpick.errors import HubError
from hf_softpick.training.push import push

FILES = ["model.safetensors", "config.json", "tokenizer.json", "README.md", "modeling_softpick.py", "normalizers.py"]
SECRETS = [".env", "training_args.bin", "notes.txt", "optimizer.pt", "id_rsa"]


class Hub(BaseHTTPRequestHandler):
    """The four requests of an upload of small files."""

    refuse = 0
    requests: list[tuple[str, bytes]] = []

    def do_GET(self):
        self._answer({"sha": "0" * 40, "id": "me/tiny", "siblings": []})

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        type(self).requests.append((self.path, body))
        if self.refuse:
            self._answer({"error": "over quota"}, self.refuse)
        elif self.path.endswith("/repos/create"):
            self._answer({"url": f"{constants.ENDPOINT}/me/tiny", "name": "me/tiny"})
        elif "/preupload/" in self.path:
            names = [each["path"] for each in json.loads(body)["files"]]
            self._answer({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        else:
            self._answer({"commitUrl": f"{constants.ENDPOINT}/me/tiny/commit/1", "commitOid": "1"})

    def _answer(self, value, status=200):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        """Quiet."""


@pytest.fixture
def hub(monkeypatch):
    """A Hub on this machine; huggingface_hub talks to it."""
    server = HTTPServer(("127.0.0.1", 0), Hub)
    address = f"http://127.0.0.1:{server.server_port}"
    Hub.requests, Hub.refuse = [], 0
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", address)
    monkeypatch.setenv("HF_TOKEN", "hf_canarycanary")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield Hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def final(tmp_path):
    """A finished model among files that must stay here."""
    for name in FILES + SECRETS:
        (tmp_path / name).write_text(f"content of {name}")
    return tmp_path


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
        push(final, "me/tiny")
    message = str(caught.value)
    assert caught.value.exit_code == 69
    assert f"hf upload me/tiny {final} . --include 'config.json'" in message and "--private" in message
    assert "Training is finished" in message and "canary" not in message
