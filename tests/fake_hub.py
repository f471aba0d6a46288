"""A small Hub on this machine, which says what it was sent, or refuses, or says nothing."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from huggingface_hub import constants


class Hub(BaseHTTPRequestHandler):
    """The requests of an upload of small files; `refuse` is the status to answer with, answers wait for `talks`."""

    refuse = 0
    talks = threading.Event()
    requests: list[tuple[str, bytes]] = []

    def do_GET(self):
        self._answer({"sha": "0" * 40, "id": "me/tiny", "siblings": []})

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        type(self).requests.append((self.path, body))
        if not self.talks.wait(30):
            return
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


def serve(monkeypatch):
    """For fixtures to yield from: a Hub on this machine that huggingface_hub talks to."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    address = f"http://127.0.0.1:{server.server_port}"
    Hub.requests, Hub.refuse, Hub.talks = [], 0, threading.Event()
    Hub.talks.set()
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", address)
    monkeypatch.setenv("HF_TOKEN", "hf_canarycanary")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield Hub
    Hub.talks.set()
    server.shutdown()
    server.server_close()
