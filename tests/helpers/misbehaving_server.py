"""Scripted servers on the loopback interface: HTTP by path, FTP by connection."""

import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, repeat
from socket import create_server
from socketserver import StreamRequestHandler, ThreadingTCPServer
from threading import Lock, Thread

Answer = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    server: "MisbehavingServer"
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        try:
            self.server.next_answer(self.path)(self)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_HEAD = do_GET

    def head(self, status: int, **headers: object) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        pass


class MisbehavingServer(ThreadingHTTPServer):
    """Gives each path the answers of its script, repeating the last one; 404 without a script."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.num_requests: Counter[str] = Counter()
        self._scripts: dict[str, list[Answer]] = {}
        self._lock = Lock()
        Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def url(self, path: str, *script: Answer) -> str:
        """Return the URL of a path that answers by this script from now on."""
        self._scripts[path] = list(script)
        return f"http://127.0.0.1:{self.server_address[1]}{path}"

    def next_answer(self, path: str) -> Answer:
        with self._lock:
            self.num_requests[path] += 1
            script = self._scripts.get(path) or [status(404)]
            return script.pop(0) if len(script) > 1 else script[0]

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients that hang up


def status(code: int) -> Answer:
    """Return an answer without content."""
    return lambda handler: handler.head(code, Content_Length=0)


def delayed(answer: Answer, seconds: float) -> Answer:
    """Return an answer that begins after some seconds."""

    def wait_and_answer(handler: Handler) -> None:
        time.sleep(seconds)
        answer(handler)

    return wait_and_answer


def whole(
    content: bytes,
    *,
    etag: str = '"1"',
    send: int | None = None,
    wait: float = 0.0,
    seconds: float = 0.0,
) -> Answer:
    """Return an answer with the content, or with the range that is requested.

    Args:
        content: The whole body.
        etag: Version of the content.
        send: Bytes of the body sent before the connection is closed.
        wait: Seconds of silence after them.
        seconds: Time that the whole body takes.
    """

    def answer(handler: Handler) -> None:
        first, _, last = handler.headers.get("Range", "").removeprefix("bytes=").partition("-")
        start, end = int(first or 0), min(int(last or len(content)) + 1, len(content))
        body = content[start:end]
        headers = {"ETag": etag, "Content_Length": len(body)}
        if first:
            headers["Content_Range"] = f"bytes {start}-{end - 1}/{len(content)}"
        handler.head(206 if first else 200, **headers)
        if handler.command == "HEAD":
            return
        for piece in range(0, len(body[:send]), 2**16):
            handler.wfile.write(body[:send][piece : piece + 2**16])
            time.sleep(seconds * 2**16 / len(body))
        if send is not None and send < len(body):
            handler.wfile.flush()
            time.sleep(wait)
            handler.close_connection = True

    return answer


def endless_zeros(size: int) -> Answer:
    """Return an answer with a large body that the server does not hold in memory either."""

    def answer(handler: Handler) -> None:
        handler.head(200, Content_Length=size)
        block = bytes(2**20)
        for _ in range(size // len(block)):
            handler.wfile.write(block)

    return answer


class FtpHandler(StreamRequestHandler):
    server: "FtpServer"

    def handle(self) -> None:
        """Serve a control connection until it ends or a transfer is cut."""
        with self.server.lock:
            self.server.num_connections += 1
            greeting, send = next(self.server.script)
        self.say(greeting)
        start = 0
        while greeting.startswith("220") and (line := self.rfile.readline()):
            command, _, argument = line.decode().strip().partition(" ")
            if command == "PASV":
                listener = create_server(("127.0.0.1", 0))
                high, low = divmod(listener.getsockname()[1], 256)
                self.say(f"227 here (127,0,0,1,{high},{low})")
            elif command == "REST":
                start = int(argument)
                self.say("350 from there")
            elif command in ("MLSD", "RETR"):
                listing = f"type=file;size={len(self.server.content)}; 0.tar\r\n".encode()
                content = listing if command == "MLSD" else self.server.content[start:]
                cut = command == "RETR" and send is not None
                self.say("150 it comes")
                connection, _ = listener.accept()
                listener.close()
                with connection, suppress(OSError):  # the client may have enough
                    connection.sendall(content[:send] if cut else content)
                if cut:
                    return
                self.say("226 done")
                start = 0
            else:
                self.say({"USER": "331 who?", "PASS": "230 hello"}.get(command, "200 fine"))

    def say(self, line: str) -> None:
        self.wfile.write(f"{line}\r\n".encode())


class FtpServer(ThreadingTCPServer):
    """Serves one file, ``0.tar``.

    Args:
        script: For each connection its greeting and the bytes after which a transfer is
            cut (None: never); the last one is repeated.
    """

    daemon_threads = True

    def __init__(self, content: bytes, *script: tuple[str, int | None]) -> None:
        super().__init__(("127.0.0.1", 0), FtpHandler)
        self.content = content
        self.script = chain(script, repeat(script[-1]))
        self.num_connections = 0
        self.lock = Lock()
        self.url = f"ftp://127.0.0.1:{self.server_address[1]}/0.tar"
        Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients that hang up
