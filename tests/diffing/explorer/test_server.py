"""The local server: who is answered, with what, and what happens when a model, a browser or a request fails."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from explorer_runs import explorer_run, latents_of, serving

from crosscoders import EnvironmentFault
from diffing import Session, cli
from diffing.explorer.command import explore
from diffing.explorer.server import HOST, ExplorerServer
from diffing.explorer.settings import ExploreSettings

PROMPT = "What does it do?"


@pytest.fixture(scope="module")
def run(cache_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return explorer_run(tmp_path_factory.mktemp("server") / "run", cache_folder)


@pytest.fixture(scope="module")
def session(run: Path, cache_folder: Path) -> Session:
    return Session(run, cache_folder)


@pytest.fixture
def server(session: Session) -> Iterator[ExplorerServer]:
    with serving(session) as served:
        yield served


def asked(
    server: ExplorerServer, path: str, body: Any = None, *, token: str | None = None, host: str | None = None
) -> http.client.HTTPResponse:
    """The response to one request; a body that is no bytes is sent as JSON."""
    connection = http.client.HTTPConnection(HOST, server.server_port, timeout=30)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    headers = {} if host is None else {"Host": host}
    token = server.token if token is None else token
    connection.request("GET" if data is None else "POST", f"/{token}/{path}", data, headers)
    return connection.getresponse()


def said(server: ExplorerServer, path: str, body: Any = None, **changes: Any) -> tuple[int, Any]:
    response = asked(server, path, body, **changes)
    return response.status, json.loads(response.read())


def events(response: http.client.HTTPResponse) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix(b"data: ")) for line in response.read().splitlines() if line]


def test_it_listens_on_this_machine_only(server: ExplorerServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert server.address == f"http://127.0.0.1:{server.server_port}/{server.token}/"


@pytest.mark.parametrize("path", ["", "page.js", "api/run", "api/latent/3"])
@pytest.mark.parametrize("token", ["", "another", "%C3%A9"])
def test_a_request_without_the_token_is_refused(server: ExplorerServer, path: str, token: str) -> None:
    status, answer = said(server, path, token=token)
    assert (status, "lacks the token" in answer["error"]) == (403, True)


def test_a_post_without_the_token_is_refused(server: ExplorerServer) -> None:
    assert said(server, "api/tokens", {"prompt": PROMPT}, token="another")[0] == 403


def test_a_request_to_the_name_of_another_host_is_refused_and_one_through_a_tunnel_is_not(
    server: ExplorerServer,
) -> None:
    assert said(server, "api/run", host="evil.example")[0] == 403
    assert said(server, "api/run", host="localhost:9000")[0] == 200


def test_another_server_has_another_token(session: Session, server: ExplorerServer) -> None:
    with ExplorerServer(session) as other:
        assert other.token != server.token and len(other.token) >= 20


def test_the_page_may_load_nothing_from_elsewhere(server: ExplorerServer) -> None:
    response = asked(server, "")
    assert response.status == 200
    policy = dict(part.strip().split(" ", 1) for part in response.headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert {policy[f"{kind}-src"] for kind in ("script", "style", "connect")} == {"'self'"}


def test_tokens_are_those_of_the_session(server: ExplorerServer, session: Session) -> None:
    status, answer = said(server, "api/tokens", {"prompt": PROMPT})
    readings = session.latents(PROMPT)
    assert status == 200
    assert [token["latents"] for token in answer["tokens"]] == [reading.latents for reading in readings]
    assert [token["kl"] for token in answer["tokens"]] == [reading.kl for reading in readings]
    assert answer["tokens"][-1]["expects"]["tuned"][0][1] == readings[-1].tuned[0].probability


def test_a_chat_is_read_as_the_session_reads_it(server: ExplorerServer, session: Session) -> None:
    chat = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": "The loop."}]
    _, answer = said(server, "api/tokens", {"prompt": chat})
    assert [token["id"] for token in answer["tokens"]] == [reading.id for reading in session.latents(chat)]


def test_the_list_has_every_latent_best_rank_first(server: ExplorerServer, session: Session) -> None:
    _, table = said(server, "api/table")
    ranked = latents_of(session).evidence.table.sort_values("rank")
    assert table["number"] == ranked.index.tolist()
    assert table["tag"] == ranked["verdict"].tolist()
    assert any(table["text"])


def test_the_page_of_a_latent_is_that_of_the_session(server: ExplorerServer, session: Session) -> None:
    status, page = said(server, "api/latent/3")
    assert (status, page["histogram"]) == (200, session.latent(3)["histogram"])


def test_an_answer_comes_in_pieces(server: ExplorerServer, session: Session) -> None:
    changes = {"model": "base", "steer": {"3": 40.0}, "ablate": [1], "max_new_tokens": 6}
    response = asked(server, "api/answer", {"prompt": PROMPT, **changes})
    assert response.headers["Content-Type"] == "text/event-stream"
    *pieces, end = events(response)
    expected = list(session.answer(PROMPT, model="base", steer={3: 40.0}, ablate=[1], max_new_tokens=6))
    assert ([event["piece"] for event in pieces], end) == (expected, {"end": True})


def test_a_piece_is_sent_before_the_next_is_made(
    server: ExplorerServer, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    was_read = threading.Event()

    def slow(prompt: Any, **_: Any) -> Iterator[str]:
        yield "first"
        assert was_read.wait(timeout=20)
        yield "second"

    monkeypatch.setattr(session, "answer", slow)
    response = asked(server, "api/answer", {"prompt": PROMPT})
    assert b"first" in response.readline()
    was_read.set()
    assert [event.get("piece") for event in events(response)] == ["second", None]


def test_two_requests_at_once_are_both_answered(server: ExplorerServer, session: Session) -> None:
    bodies = [{"prompt": PROMPT, "max_new_tokens": 8}, {"prompt": PROMPT, "max_new_tokens": 8, "model": "base"}]
    alone = ["".join(session.answer(**body)) for body in bodies]  # type: ignore[arg-type]
    responses = [asked(server, "api/answer", body) for body in bodies]
    texts = ["".join(event.get("piece", "") for event in events(response)) for response in responses]
    assert texts == alone


def test_a_model_that_fails_is_one_line(
    server: ExplorerServer, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("the device\nis gone")

    with monkeypatch.context() as patched:
        patched.setattr(session.pair.models[1].lm_head, "forward", broken)
        line = {"error": "RuntimeError: the device is gone"}
        assert said(server, "api/tokens", {"prompt": PROMPT}) == (500, line)
        assert events(asked(server, "api/answer", {"prompt": PROMPT})) == [line]
    assert said(server, "api/tokens", {"prompt": PROMPT})[0] == 200


def test_a_browser_that_goes_away_ends_its_answer_and_no_other(
    server: ExplorerServer, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()

    def endless(prompt: Any, **_: Any) -> Iterator[str]:
        try:
            while True:
                time.sleep(0.001)
                yield "again "
        finally:
            ended.set()

    with monkeypatch.context() as patched:
        patched.setattr(session, "answer", endless)
        response = asked(server, "api/answer", {"prompt": PROMPT})
        response.readline()
        response.close()
        assert ended.wait(timeout=20)
    assert said(server, "api/tokens", {"prompt": PROMPT})[0] == 200


def test_a_browser_that_sends_half_a_request_keeps_nobody_waiting(server: ExplorerServer) -> None:
    with socket.create_connection((HOST, server.server_port)) as idle:
        idle.sendall(
            f"POST /{server.token}/api/tokens HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n".encode()
        )
        assert said(server, "api/tokens", {"prompt": PROMPT})[0] == 200


@pytest.mark.parametrize("path", ["api/tokens", "api/answer"])
@pytest.mark.parametrize(
    "body, status, line",
    [
        ({"prompt": "it does " * 3000}, 400, "Shorten it."),
        ({"prompt": ""}, 400, "the prompt is empty"),
        ({}, 400, "the request has no 'prompt'"),
        ({"prompt": 3}, 400, "the request has prompt.str = 3"),
        ({"prompt": PROMPT, "colour": "red"}, 400, "the request has colour = 'red'"),
        ({"prompt": [{"role": "robot", "content": "x"}]}, 400, "'robot'"),
        (b"{", 400, "the request"),
        (b" " * (1 << 20) + b"  ", 413, "a request holds at most 1,048,576 bytes"),
    ],
)
def test_what_cannot_be_answered_is_one_line(
    server: ExplorerServer, path: str, body: Any, status: int, line: str
) -> None:
    answered, answer = said(server, path, body)
    assert (answered, line in answer["error"], "\n" in answer["error"]) == (status, True, False)


def test_a_steered_latent_must_be_a_number(server: ExplorerServer) -> None:
    _, answer = said(server, "api/answer", {"prompt": PROMPT, "steer": {"third": 1.0}})
    assert answer["error"] == "steer names latent 'third'; give a number."


@pytest.mark.parametrize("path", ["api/latent/24", "api/latent/x", "../settings.py", "page/page.js"])
def test_an_address_that_leads_nowhere_is_one_line(server: ExplorerServer, path: str) -> None:
    status, answer = said(server, path)
    assert status in (400, 404) and list(answer) == ["error"]


def test_a_port_that_is_taken_is_said(server: ExplorerServer, session: Session) -> None:
    with pytest.raises(EnvironmentFault, match=f"port {server.server_port} of 127.0.0.1 cannot be had"):
        ExplorerServer(session, server.server_port)


def test_the_command_prints_the_address_and_ends_with_ctrl_c(
    run: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(self: ExplorerServer) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ExplorerServer, "serve_forever", interrupted)
    assert explore(ExploreSettings(str(run), str(cache_folder)))["name"] == "explore"
    assert "http://127.0.0.1:" in capsys.readouterr().err


def test_a_folder_without_a_table_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explore", str(tmp_path)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
