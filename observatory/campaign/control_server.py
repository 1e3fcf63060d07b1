"""Commands to the captures of one command from outside its terminal: a loopback port, and a signal.

The port takes ``POST /start``, ``/stop``, ``/flush``, ``/status`` and ``/mark`` (body ``{"name": "..."}``)
and nothing else. A web page cannot use it: a request with an ``Origin``, or with a ``Host`` that is not this
machine by a loopback name (DNS rebinding), is refused.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from observatory.campaign.control import Controlled, control_run
from observatory.errors import CaptureError, ObservatoryError, RunError
from observatory.run.bounded import parse_json
from observatory.run.control import ACTIONS, Action, read_answer
from observatory.run.documents.printed import printed_document
from observatory.run.files import os_reason

_LOOPBACK = "127.0.0.1"
_NAMES = frozenset({_LOOPBACK, "localhost", "[::1]"})
_MOST_BODY_BYTES = 4096
#: A client that sends nothing for so long is left.
_CLIENT_S = 10.0
#: Requests that are answered at the same time.
_MOST_REQUESTS = 8


@dataclass(frozen=True, slots=True)
class RunsControl:
    """All captures of one command.

    Attributes:
        runs: finds their run directories, as far as they exist by now.
        wait_s: how long to wait for the answers of each.
    """

    runs: Callable[[], Sequence[Path]]
    wait_s: float = 10.0

    def do(self, action: Action, name: str | None = None) -> tuple[list[Controlled], list[RunError]]:
        """Have every capture do something; what became of it, and why others did not."""
        done: list[Controlled] = []
        refused: list[RunError] = []
        for run in self.runs():
            try:
                done.append(control_run(run, action, name=name, wait_s=self.wait_s))
            except RunError as error:
                refused.append(error)
        if not done and not refused:
            refused.append(RunError("nothing is captured yet", remedy="wait for the first step of a model"))
        return done, refused

    def toggle(self) -> tuple[Action, list[Controlled], list[RunError]]:
        """Stop the captures if one of them runs, or is about to; else start them."""
        answers = [answer for run in self.runs() if (answer := read_answer(run, 0)) is not None]
        runs = any(
            answer.next_action == "start" or (answer.state == "capturing" and answer.next_action is None)
            for answer in answers
        )
        action: Action = "stop" if runs else "start"
        return action, *self.do(action)


@contextlib.contextmanager
def control_port(port: int, control: RunsControl) -> Iterator[int]:
    """Take commands on a port of the loopback interface while the block runs; yields the port.

    Raises:
        CaptureError: it cannot be opened.
    """

    class Handler(_Handler):
        runs_control = control
        room = threading.BoundedSemaphore(_MOST_REQUESTS)

    try:
        server = ThreadingHTTPServer((_LOOPBACK, port), Handler)
    except OSError as error:
        raise CaptureError(
            f"no commands are taken on port {port} of {_LOOPBACK}: {os_reason(error)}",
            remedy="choose another --control-port",
        ) from error
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, name="observatory-port", daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


class _RefusedError(Exception):
    """A request that is not answered as it wants; ``status`` and one line."""

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    runs_control: RunsControl
    room: threading.BoundedSemaphore
    timeout = _CLIENT_S
    server_version = "observatory"
    sys_version = ""

    def do_POST(self) -> None:
        """One command."""
        if not self.room.acquire(blocking=False):
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, {"error": "too many commands at the same time"})
            return
        try:
            action, name = self._asked()
            done, refused = self.runs_control.do(action, name)
            status = HTTPStatus.OK if done else HTTPStatus.CONFLICT
            document = {
                "action": action,
                "runs": [one.document() for one in done],
                "problems": [str(error) for error in refused],
            }
            self._answer(status, printed_document("control", document))
        except _RefusedError as refusal:
            self._answer(refusal.status, {"error": str(refusal)})
        except ObservatoryError as error:
            self._answer(HTTPStatus.CONFLICT, {"error": str(error)})
        finally:
            self.room.release()

    def _asked(self) -> tuple[Action, str | None]:
        host = self.headers.get("Host", "")
        if host.rpartition(":")[0] not in _NAMES and host not in _NAMES:
            raise _RefusedError(HTTPStatus.FORBIDDEN, f"Host is none of {', '.join(sorted(_NAMES))}")
        if self.headers.get("Origin") is not None:
            raise _RefusedError(
                HTTPStatus.FORBIDDEN, "web pages give no commands (the request has an Origin)"
            )
        action = next((word for word in ACTIONS if self.path == f"/{word}"), None)
        if action is None:
            paths = ", ".join(f"/{word}" for word in ACTIONS)
            raise _RefusedError(HTTPStatus.NOT_FOUND, f"no such command; expected one of {paths}")
        body = self._body()
        if action != "mark":
            return action, None
        try:
            document = parse_json(body)
        except ValueError:
            document = None
        name = document.get("name") if isinstance(document, dict) else None
        if not isinstance(name, str):
            raise _RefusedError(HTTPStatus.BAD_REQUEST, 'a mark has a body such as {"name": "warm"}')
        return action, name

    def _body(self) -> bytes:
        """The body, of bounded size.

        Raises:
            _RefusedError: it is too large, or its size is not stated.
        """
        if self.headers.get("Transfer-Encoding") is not None:
            raise _RefusedError(HTTPStatus.LENGTH_REQUIRED, "state the Content-Length of the body")
        length = self.headers.get("Content-Length", "0")
        if not (length.isascii() and length.isdigit()) or len(length) > 4 or int(length) > _MOST_BODY_BYTES:
            raise _RefusedError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a body has {_MOST_BODY_BYTES} bytes at most"
            )
        return self.rfile.read(int(length))

    def _answer(self, status: HTTPStatus, document: dict[str, Any]) -> None:
        content = json.dumps(document).encode() + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Nothing: stderr is the command's."""
