"""A server on the loopback interface that answers as the Hugging Face Hub does for one data set."""

import json
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

REPO = "owner/name"
TOKEN = "hf_of_the_test_only"


class _Handler(BaseHTTPRequestHandler):
    server: "HubServer"
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests[path] += 1
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if self.server.failures:
            self._answer(self.server.failures.pop(0), b"")
        elif self.server.is_private and not allowed and not path.startswith("/cdn/"):
            # The Hub does not tell a private repository from one that does not exist.
            self._answer(401, b"{}", X_Error_Code="RepoNotFound")
        elif path in (f"/api/datasets/{REPO}", f"/api/datasets/{REPO}/revision/main"):
            self._json({"id": REPO, "sha": "0" * 40, "siblings": [], "tags": [], "private": False})
        elif path.startswith(f"/api/datasets/{REPO}/tree/main"):
            folder = path.removeprefix(f"/api/datasets/{REPO}/tree/main").strip("/")
            names = [n for n in self.server.files if n.rpartition("/")[0] == folder]
            if not names:
                self._answer(404, b"{}", X_Error_Code="EntryNotFound")
                return
            self._json([self.server.entry(name) for name in names])
        elif (name := path.removeprefix(f"/datasets/{REPO}/resolve/main/")) in self.server.files:
            # Large files are on a server of their own; it needs no token.
            self._answer(302, b"", Location=f"/cdn/{name}")
        elif (name := path.removeprefix("/cdn/")) in self.server.files:
            self._content(self.server.files[name])
        else:
            is_repo = path.startswith((f"/datasets/{REPO}/", f"/api/datasets/{REPO}/"))
            self._answer(404, b"{}", X_Error_Code="EntryNotFound" if is_repo else "RepoNotFound")

    do_HEAD = do_GET

    def _content(self, content: bytes) -> None:
        first, _, last = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        if not first:
            self._answer(200, content)
            return
        body = content[int(first) : int(last or len(content)) + 1]
        place = f"bytes {first}-{int(first) + len(body) - 1}/{len(content)}"
        self._answer(206, body, Content_Range=place)

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content_Length": str(len(body))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


class HubServer(ThreadingHTTPServer):
    """Serves ``files`` of the data set ``owner/name``.

    Attributes:
        url: Its address, for ``HF_ENDPOINT``.
        files: Contents by path in the repository.
        is_private: Whether requests need the token.
        requests: How often each path was asked for.
        failures: Statuses of the next answers.
    """

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.is_private = files, False
        self.requests: Counter[str] = Counter()
        self.failures: list[int] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def entry(self, name: str) -> dict[str, object]:
        size = len(self.files[name])
        lfs = {"oid": "0" * 64, "size": size, "pointerSize": 130}
        return {"type": "file", "path": name, "size": size, "oid": "0" * 40, "lfs": lfs}

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients that hang up
