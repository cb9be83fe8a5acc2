"""A `vllm serve` as an engine: the routes that it gets, and what becomes of its answers."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any, Iterator

import pytest

from tests.support.drive_rig import UPDATE, drive_client
from weightd import errors
from weightd._adapters import take_over


class _Server(BaseHTTPRequestHandler):
    """Answers as ``vllm serve`` and notes every request."""

    requests: list[tuple]
    answers: dict[str, tuple[int, Any]]

    def do_POST(self) -> None:
        """Answers one request."""
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length) or b"null")
        self.requests.append((self.path, body))
        status, answer = self.answers.get(self.path.split("?")[0], (200, {"message": "ok"}))
        if status == 0:
            self.connection.close()
            return
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        """Says nothing."""


@pytest.fixture
def server() -> Iterator[SimpleNamespace]:
    """A server with its ``url``, ``requests`` so far and ``answers`` by route."""
    kind = type("Server", (_Server,), {"requests": [], "answers": {}})
    kind.answers["/collective_rpc"] = (200, {"results": ["e7", "e7"]})
    kind.answers["/reset_prefix_cache"] = (200, {"success": True})
    http = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    yield SimpleNamespace(
        url=f"http://127.0.0.1:{http.server_port}", requests=kind.requests, answers=kind.answers
    )
    http.shutdown()
    thread.join()
    http.server_close()


def test_server_gets_the_routes_of_its_development_mode(server: SimpleNamespace) -> None:
    (engine,) = take_over([server.url + "/"], 0, 5.0)
    assert server.requests == [("/init_weight_transfer_engine", {"init_info": {}})]
    assert engine.label == server.url + "/"
    server.requests.clear()
    assert drive_client(engine.client, "abort") == ("prefix",)
    assert engine.name == "e7", "the instance name is asked anew in every sync"
    assert server.requests == [
        ("/collective_rpc", {"method": "weightd_engine"}),
        ("/pause?mode=abort&clear_cache=false", None),
        ("/start_weight_update", None),
        ("/update_weights", {"update_info": UPDATE}),
        ("/finish_weight_update", {"weight_version": "7"}),
        ("/reset_prefix_cache?reset_running_requests=true&reset_external=true", None),
        ("/reset_mm_cache", None),
        ("/reset_encoder_cache", None),
        ("/resume", None),
    ]
    engine.client.finish_weight_update(None)
    assert server.requests[-1] == ("/finish_weight_update", None)


def test_server_without_development_mode_is_told_what_to_set(server: SimpleNamespace) -> None:
    server.answers["/init_weight_transfer_engine"] = (404, {"detail": "Not Found"})
    with pytest.raises(errors.EngineError, match="no route") as caught:
        take_over([server.url], 0, 5.0)
    assert "VLLM_SERVER_DEV_MODE=1" in caught.value.remedy
    assert caught.value.peer == f"engine {server.url}"


def test_answers_of_a_server_become_the_text_of_the_error(server: SimpleNamespace) -> None:
    (engine,) = take_over([server.url], 0, 5.0)
    server.answers["/start_weight_update"] = (500, {"error": "already active"})
    with pytest.raises(RuntimeError, match="POST /start_weight_update: 500 .*already active"):
        engine.client.start_weight_update()
    server.answers["/reset_prefix_cache"] = (200, {"success": False})
    with pytest.raises(RuntimeError, match="did not reset"):
        engine.client.reset_caches()
    server.answers["/resume"] = (0, None)
    with pytest.raises(OSError):
        engine.client.resume()


def test_server_that_is_not_there_is_named() -> None:
    with pytest.raises(errors.EngineError, match="ConnectionRefused") as caught:
        take_over(["http://127.0.0.1:9"], 0, 5.0)
    assert caught.value.reason == "ENGINE_CALL" and caught.value.peer == "engine http://127.0.0.1:9"


@pytest.mark.parametrize("url", ["localhost:8000", "unix:/x", "http://", "ftp://host"])
def test_malformed_url_is_refused(url: str) -> None:
    with pytest.raises(errors.LayoutError, match="http://HOST:PORT"):
        take_over([url], 0, 1.0)
