"""The local server of the explorer: one page, plain data, answers as they come.

It listens on 127.0.0.1 only, and every address begins with a random token; a request without it is refused. Each
request has a thread, and the session lets one of them at a time use the models, between two tokens of an answer too. A
browser that goes away, or reads nothing for `PATIENCE` seconds, ends its own request.

    GET  /TOKEN/                       the page, and the files beside it
    GET  /TOKEN/api/run                what the run is
    GET  /TOKEN/api/table              columns of the list of latents
    GET  /TOKEN/api/latent/NUMBER      what is known of a latent; both of ?show=NAME in place of the first of the run
    POST /TOKEN/api/tokens             {prompt, is_plain, show} -> tokens with latents and KL
    POST /TOKEN/api/answer             {prompt, model, ...} -> events {"piece": TEXT}, then {"end": true} or {"error"}
"""

import hmac
import json
import secrets
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from crosscoders.common.errors import EnvironmentFault, InputError
from crosscoders.common.progress import say
from diffing.explorer.session import Session
from diffing.explorer.views import AnswerAsked, ReadAsked, parse, run_view, shown, table_view, tokens_view

HOST = "127.0.0.1"
PATIENCE = 30.0
"""Seconds that a browser may keep a thread waiting."""
LONGEST = 1 << 20
"""Bytes of a request's body."""
PAGE = Path(__file__).parent / "page"
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
}
STATIC = {file.name: KINDS[file.suffix] for file in PAGE.iterdir()}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
GONE = (BrokenPipeError, ConnectionResetError, ConnectionAbortedError, TimeoutError)
"""What writing to a browser that is no longer there raises."""


class ExplorerServer(ThreadingHTTPServer):
    """Serves one session. port: 0 for any that is free.

    Raises:
        EnvironmentFault: the port is in use, or not ours to take.
    """

    daemon_threads = True

    def __init__(self, session: Session, port: int = 0) -> None:
        self.session, self.token = session, secrets.token_urlsafe(16)
        try:
            super().__init__((HOST, port), Handler)
        except OSError as error:
            raise EnvironmentFault(
                f"port {port} of {HOST} cannot be had: {error.strerror}. Give another one with --port, or 0 for any."
            ) from None

    @property
    def address(self) -> str:
        """Return the address of the page."""
        return f"http://{HOST}:{self.server_port}/{self.token}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say in one line what ended a request that nobody was told about."""
        import sys

        error = sys.exception()
        if not isinstance(error, GONE):
            say(f"explore: {_one_line(error)}")


class Refusal(Exception):
    """A request that is not answered: its status, and a line that says why."""

    def __init__(self, status: int, line: str) -> None:
        super().__init__(line)
        self.status = status


class Handler(BaseHTTPRequestHandler):
    """Answers one request and closes the connection."""

    server: ExplorerServer
    timeout = PATIENCE
    server_version, sys_version = "diffing", ""

    def do_GET(self) -> None:
        """Answer with the page or with plain data."""
        self._answered(self._get)

    def do_POST(self) -> None:
        """Answer what needs a prompt."""
        self._answered(self._post)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the address holds the token."""

    def _answered(self, respond: Any) -> None:
        """Respond, or say in one line why not; nothing but the line where the answer has begun."""
        try:
            respond(self._path())
        except GONE:
            self.close_connection = True
        except Refusal as refusal:
            self._send_json({"error": str(refusal)}, refusal.status)
        except InputError as error:
            self._send_json({"error": _one_line(error)}, 400)
        except Exception as error:
            say(f"explore: {_one_line(error)}")
            self._send_json({"error": _one_line(error)}, 500)

    def _path(self) -> str:
        """Return what follows the token.

        Raises:
            Refusal: the token is missing or wrong, or the request was made to another host's name.
        """
        host = urlsplit(f"//{self.headers.get('Host', '')}").hostname
        _, token, *rest = [*urlsplit(self.path).path.split("/", 2), ""]
        known = hmac.compare_digest(token.encode(), self.server.token.encode())
        if not known or host not in (HOST, "localhost"):
            raise Refusal(403, "this address lacks the token. Open the one that `diffing explore` printed.")
        return rest[0]

    def _get(self, path: str) -> None:
        session = self.server.session
        name = path or "page.html"
        if name in STATIC:
            self._send((PAGE / name).read_bytes(), STATIC[name])
        elif path == "api/run":
            self._send_json(run_view(session))
        elif path == "api/table":
            self._send_json(table_view(session, self._show()))
        elif path.startswith("api/latent/") and path.removeprefix("api/latent/").isdecimal():
            self._send_json(shown(session.latent(int(path.removeprefix("api/latent/")), show=self._show())))
        else:
            raise Refusal(404, f"there is nothing at {path!r}.")

    def _show(self) -> str | None:
        """Return the value of `show` in the address."""
        return parse_qs(urlsplit(self.path).query).get("show", [None])[0]

    def _post(self, path: str) -> None:
        body = self._body()
        if path == "api/tokens":
            self._send_json(tokens_view(self.server.session, **parse(ReadAsked, body)))
        elif path == "api/answer":
            self._stream(self.server.session.answer(**parse(AnswerAsked, body)))
        else:
            raise Refusal(404, f"there is nothing at {path!r}.")

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > LONGEST:
            self.rfile.read(min(int(length), 16 * LONGEST) if length.isdecimal() else 0)  # or the line is not read
            raise Refusal(413, f"a request holds at most {LONGEST:,} bytes, and says how many.")
        return self.rfile.read(int(length))

    def _send(self, data: bytes, kind: str, status: int = 200) -> None:
        self._send_head(kind, status, len(data))
        self.wfile.write(data)

    def _send_json(self, value: Any, status: int = 200) -> None:
        self._send(json.dumps(value, allow_nan=False).encode(), "application/json", status)

    def _send_head(self, kind: str, status: int = 200, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if length is not None:
            self.send_header("Content-Length", str(length))
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.end_headers()

    def _stream(self, pieces: Iterator[str]) -> None:
        """Send each piece as an event when it is there; what fails on the way is the last event."""
        self._send_head("text/event-stream")
        try:
            for piece in pieces:
                self._event({"piece": piece})
            self._event({"end": True})
        except GONE:
            raise
        except Exception as error:
            say(f"explore: {_one_line(error)}")
            self._event({"error": _one_line(error)})

    def _event(self, value: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(value)}\n\n".encode())
        self.wfile.flush()


def _one_line(error: BaseException | None) -> str:
    """Return an error of ours as its line, any other with its kind before it."""
    line = " ".join(str(error).split())
    return line if isinstance(error, InputError) else f"{type(error).__name__}: {line}".removesuffix(": ")
