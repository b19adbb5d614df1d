"""Servers on this machine: a scripted one that remembers its requests, a real one with a model."""

from __future__ import annotations

import importlib.util
import json
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import DIALOGUES, ROOT, embedded_installed

from modeling.models import embedded_model_dir

FOUR = DIALOGUES[0]["candidates"]


def listed(*texts: str) -> str:
    return "\n".join(f"{i}. {text}" for i, text in enumerate(texts, 1))


def ok(content: str | None = None, **body) -> tuple:
    """A 200 with a list of four replies, or other content, or other fields."""
    message = {"role": "assistant", "content": listed(*FOUR) if content is None else content}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    return 200, {"model": "served-1", "choices": [choice], **body}


def rated(rating: object, **body) -> tuple:
    """A 200 with a judge's answer."""
    return ok(f"It takes up what was said.\nRating: {rating}", **body)


def error(status: int, message: str = "no", headers: dict | None = None, **fields) -> tuple:
    return status, {"error": {"message": message, **fields}}, headers or {}


BAD = {
    "500": error(500), "502": (502, b"<html>Bad gateway</html>", {"Content-Type": "text/html"}),
    "408": error(408), "409": error(409), "reset": "reset", "half a body": "half",
    "no JSON": (200, b'{"choices": ['), "a JSON string": (200, b'"hello"'),
    "html": (200, b"<p>hi</p>", {"Content-Type": "text/html"}), "an empty body": (200, b""),
    "null": (200, b"null"), "not UTF-8": (200, b'{"\xff": 1}'), "no choices": ok(choices=[]),
    "odd choices": ok(choices=[7]), "blank": ok(" \n"),
    "content null": ok(choices=[
        {"message": {"content": None}, "finish_reason": "content_filter"}]),
    "an error in a 200": (200, {"error": {"message": "overloaded"}}),
}


@pytest.fixture
def serve():
    """serve(*answers) starts a server that gives the answers one by one, then `then` for ever.

    An answer is (status, body, headers), a function of the request's body that returns one, or
    "hang", "reset" or "half". then: ok() if it is not given. The server has url and seen, a list of
    (path, Authorization header, body); answers may be changed while it runs.
    """
    servers, done = [], threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.server.seen.append((self.path, self.headers["Authorization"], body))
            answer = self.server.answers.pop(0) if self.server.answers else self.server.then
            if callable(answer):
                answer = answer(body)
            if answer == "hang":
                done.wait(60)
            elif answer == "reset":
                # an unread connection that is closed without lingering sends RST
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                                           struct.pack("ii", 1, 0))
            else:
                half = answer == "half"
                status, body, headers = (*(ok() if half else answer), {})[:3]
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                headers = {"Content-Type": "application/json", "Content-Length": len(data),
                           **headers}
                for name, value in headers.items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2] if half else data)

        def log_message(self, *args):
            pass

    def start(*answers, then=None):
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.answers, server.seen, server.then = list(answers), [], then or ok()
        server.url = f"http://127.0.0.1:{server.server_port}"
        server.handle_error = lambda *args: None
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return server

    yield start
    done.set()
    for server in servers:
        server.shutdown()
        server.server_close()


def wait_for(is_true, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, f"nothing after {seconds} s"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def real_server(tmp_path_factory):
    """(address, model folder) of `transformers serve` with the embedded model."""
    serving = all(importlib.util.find_spec(name) for name in ("fastapi", "uvicorn"))
    if not embedded_installed() or not serving:
        pytest.skip(
            'needs requirements-models.txt and pip install "transformers[serving]==5.23.0"')
    folder = str(embedded_model_dir(ROOT / "checkpoints"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = open(tmp_path_factory.mktemp("serve") / "log.txt", "w")  # noqa: SIM115
    command = [Path(sys.executable).with_name("transformers"), "serve", folder,
               "--host", "127.0.0.1", "--port", str(port), "--device", "cpu",
               "--default-seed", "0"]
    process = subprocess.Popen(command, stdout=log, stderr=log)

    def healthy() -> bool:
        assert process.poll() is None, Path(log.name).read_text()[-2000:]
        with suppress(OSError):
            health = urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
            return health.status == 200
        return False

    try:
        wait_for(healthy, 45)
        yield f"http://127.0.0.1:{port}", folder
    finally:
        process.terminate()
        process.wait(10)
        log.close()
