"""Uploads to a hub on this machine: what is asked of it, and what its refusals look like."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import huggingface_hub
import pytest

from ds_linclip.interop.hub_push import check_push, push_folder

TOKEN = "hf_secret"


class Hub(ThreadingHTTPServer):
    """Answers as the hub does for small files, and keeps what it received."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.status = 200

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self._answer({"id": "me/model", "sha": "0" * 40, "siblings": []})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunks()
        self.server.tokens.add(self.headers.get("Authorization"))
        place = self.path.partition("?")[0]
        if place == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self._answer({"url": f"{self.server.url}/me/model"})
        elif place.endswith("/preupload/main"):
            files = [
                {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for each in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        elif place.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.files[line["value"]["path"]] = content
            commit = f"{self.server.url}/me/model/commit/{'0' * 40}"
            self._answer({"commitUrl": commit, "commitOid": "0" * 40, "success": True})
        else:
            self._answer({"warnings": [], "errors": []})

    def _chunks(self) -> bytes:
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _answer(self, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Hub() as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "open_clip_config.json").write_text("{}")
    (tmp_path / "out" / "open_clip_model.safetensors").write_bytes(bytes(range(256)))
    return tmp_path / "out"


def test_folder_becomes_one_commit_of_a_private_repository(hub, folder, capfd, caplog):
    url = push_folder(folder, "hf-hub:me/model")
    assert url.endswith("/me/model")
    (created,) = hub.created
    assert created["name"] == "model"
    assert created["organization"] == "me"
    assert created.get("private") is True or created.get("visibility") == "private"
    assert hub.files == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert TOKEN not in "".join(capfd.readouterr()) + caplog.text + url


def test_refusal_of_the_hub_is_one_line_without_the_token(hub, folder):
    hub.status = 403
    with pytest.raises(
        ValueError, match=r"^--push \(hf-hub:me/model\) failed: .*403.*hf upload"
    ) as e:
        push_folder(folder, "hf-hub:me/model")
    assert TOKEN not in str(e.value)
    assert "\n" not in str(e.value)


def test_hub_that_does_not_answer_is_named(hub, folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(ValueError, match=r"^--push \(hf-hub:me/model\) failed: .*hf upload"):
        push_folder(folder, "hf-hub:me/model")


@pytest.mark.parametrize("target", ["me/model", "hf-hub:model", "hf-hub:a/b/c", "hf-hub:a/ b"])
def test_target_must_be_a_repository(target, hub):
    with pytest.raises(ValueError, match=r"--push \(.*\) must be hf-hub:owner/name"):
        check_push(target)


def test_token_is_needed_before_the_export(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"--push \(hf-hub:a/b\) needs a token: set HF_TOKEN"):
        check_push("hf-hub:a/b")
