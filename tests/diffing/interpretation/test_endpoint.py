"""Names and scores from a stand-in service on this machine: answers by script, malformed ones, silence, refusals."""

import http.server
import json
import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Pair

from crosscoders import ActivationCache, Crosscoder, CrosscoderConfig, cache_activations
from crosscoders.common import files
from crosscoders.common.errors import InputError
from crosscoders.training.feed import cache_inputs
from diffing import cli
from diffing.interpretation import endpoint as endpoints
from diffing.interpretation.command import InterpretationRecord
from diffing.interpretation.endpoint import Endpoint, EndpointFault
from diffing.interpretation.examples import ExampleSets, Readout, example_sets, heldout
from diffing.interpretation.prompts import Question, marked, read_name, read_verdicts
from diffing.interpretation.scores import detection_texts, fuzzing_texts, interpret, judge
from diffing.interpretation.settings import InterpretSettings
from diffing.latents.table import scale_run

KEY = "sk-not-to-be-seen"


class Service:
    """A server that answers by `reply`: request -> status and bytes; keeps what it was asked."""

    def __init__(self, reply: Callable[[dict[str, Any]], tuple[int, bytes]]) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        service = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                service.requests.append(asked)
                service.headers.append(dict(self.headers))
                status, body = reply(asked)
                self.send_response(status)
                self.send_header("Location", "http://127.0.0.1:9/elsewhere")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Service]]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(endpoints, "PAUSE_SECONDS", 0.0)
    services: list[tuple[Service, threading.Thread]] = []

    def start(reply: Callable[[dict[str, Any]], tuple[int, bytes]]) -> Service:
        service = Service(reply)
        thread = threading.Thread(target=service.server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        services.append((service, thread))
        return service

    yield start
    for service, thread in services:
        service.server.shutdown()
        service.server.server_close()
        thread.join()


def said(text: str) -> tuple[int, bytes]:
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


def texts_of(user: str) -> list[str]:
    return re.split(r"\n*Text \d+: ", user)[1:]


def scripted(question: Question) -> str:
    """Name the letter that is marked; tell texts by whether the letter of the name stands, or is marked, in them."""
    if "Example 1" in question.user:
        return f"They share a letter.\n[interpretation]: the letter {re.findall('<<(.)', question.user)[0]}"
    name = re.findall(r"Interpretation: the letter (.)", question.user)[0]
    wanted = f"<<{name}>>" if "marked" in question.system else name
    return str([int(wanted in text) for text in texts_of(question.user)])


def letters() -> tuple[Readout, dict[int, ExampleSets]]:
    """Feature 0 fires on every x, 1 on every y, each in half of 80 documents of ten letters, never beside another."""
    rng = np.random.default_rng(0)
    ids = rng.integers(10, size=(80, 10))  # a to j
    for row, feature in ((row, int(rng.integers(2))) for row in range(80)):
        ids[row, rng.integers(10)] = 23 + feature
    flat = ids.ravel()
    activations = np.stack([flat == 23, flat == 24], axis=1) * 2.0
    documents = np.repeat(np.arange(80), 10)
    readout = Readout([0, 1], flat, documents, np.zeros(800, dtype=int), ["text"], activations)
    side = heldout(documents, 0)
    decode = lambda tokens: [chr(97 + t) for t in tokens]  # noqa: E731
    return readout, {i: example_sets(readout, i, side, decode, n_shown=6, n_scored=10, seed=0) for i in range(2)}


def test_examples_are_balanced_and_those_that_are_judged_are_held_out() -> None:
    readout, sets = letters()
    side = heldout(readout.documents, 0)
    for i, examples in sets.items():
        assert len(examples.firing) == len(examples.silent) == 10 and len(examples.shown) == 6
        assert not any(side[e.document * 10] for e in examples.shown)
        assert all(side[e.document * 10] for e in examples.firing + examples.silent)
        assert all("xy"[i] in e.tokens for e in examples.shown + examples.firing)
        assert not any("xy"[i] in e.tokens for e in examples.silent)


def test_right_names_tell_everything_and_the_names_of_others_nothing() -> None:
    _, sets = letters()
    asked = interpret(sets, scripted)
    assert asked.names == {0: "the letter x", 1: "the letter y"} and asked.fault is None
    for i in (0, 1):
        for task in ("detection", "fuzzing"):
            assert (asked.scores[i][task].n_right, asked.scores[i][task].n) == (20, 20)
            assert asked.control[i][task].n == 20 and asked.control[i][task].n_right <= 10


def test_a_judge_that_says_yes_to_all_gets_one_half() -> None:
    _, sets = letters()
    scores = judge(sets[0], "anything", lambda question: str([1] * len(texts_of(question.user))))
    assert {task: (s.n_right, s.n) for task, s in scores.items()} == {"detection": (10, 20), "fuzzing": (10, 20)}


def test_malformed_answers_are_counted_and_in_no_share() -> None:
    _, sets = letters()
    answers = iter(["[1, 0", "[1, 0, 1]", "certainly", "[1, 1, 1, 1, 1]"] * 2)
    scores = judge(sets[0], "x", lambda _: next(answers))
    assert all((s.n, s.n_unreadable) == (5, 15) for s in scores.values())
    assert interpret(sets, lambda _: "I cannot say.").names == {}


def test_wrong_marks_are_as_many_as_right_ones_elsewhere() -> None:
    _, sets = letters()
    fuzzed = fuzzing_texts(sets[0], 0)
    assert all(text.count("<<") == text.count(">>") == 1 for text, _ in fuzzed)
    assert all(("<<x>>" in text) == is_right for text, is_right in fuzzed)
    assert [re.sub("<<|>>", "", text) for text, _ in fuzzed] == [text for text, _ in detection_texts(sets[0])]


@pytest.mark.parametrize(
    "answer, n, verdicts",
    [
        ("[1, 0]", 2, [True, False]),
        ("Text 1 [yes].\n**[0,1,1]**", 3, [False, True, True]),
        ("[10, 1]", 2, None),
        ("[]", 1, None),
        ("", 1, None),
    ],
)
def test_verdicts_are_the_last_list_of_the_right_length(answer: str, n: int, verdicts: list[bool] | None) -> None:
    assert read_verdicts(answer, n) == verdicts


def test_a_name_is_one_printable_line() -> None:
    assert read_name("so\n**[Interpretation]:** ends\x1b[2J of words\nbye") == "ends [2J of words"
    assert read_name("interpretation") is None


def test_neighbouring_active_tokens_stand_between_one_pair_of_marks() -> None:
    assert marked(["a", "b", "c", "d"], [0, 1, 3]) == "<<ab>>c<<d>>"


# ------------------------------------------------------------------------------------------------------- the service


def test_an_endpoint_gets_model_messages_and_key(serve: Callable[..., Service]) -> None:
    service = serve(lambda _: said("[1]"))
    asked = Endpoint(f"{service.url}/", "tiny", key=KEY, timeout_seconds=5).ask(Question("s", "u"))
    assert asked == "[1]" and service.requests[0]["model"] == "tiny"
    assert service.requests[0]["messages"] == [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert service.headers[0]["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("body", [b"", b"not JSON", b"[]", b'{"choices": []}', b'{"choices": [{"message": null}]}'])
def test_a_reply_without_text_is_an_empty_answer(serve: Callable[..., Service], body: bytes) -> None:
    assert Endpoint(serve(lambda _: (200, body)).url, "m", key=None, timeout_seconds=5).ask(Question("", "")) == ""


@pytest.mark.parametrize("status, n_tries", [(401, 1), (302, 1), (429, 3), (503, 3)])
def test_a_refusal_names_the_status_and_only_a_passing_one_is_tried_again(
    serve: Callable[..., Service], status: int, n_tries: int
) -> None:
    service = serve(lambda _: (status, f"wrong key {KEY}".encode()))
    with pytest.raises(EndpointFault, match=rf"does not answer \(HTTP status {status}\)") as caught:
        Endpoint(service.url, "m", key=KEY, timeout_seconds=5).ask(Question("", ""))
    assert KEY not in str(caught.value) and len(service.requests) == n_tries


def test_a_service_that_recovers_is_asked_again(serve: Callable[..., Service]) -> None:
    replies = iter([(503, b""), said("well")])
    assert (
        Endpoint(serve(lambda _: next(replies)).url, "m", key=None, timeout_seconds=5).ask(Question("", "")) == "well"
    )


def test_silence_ends_with_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(endpoints, "PAUSE_SECONDS", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(EndpointFault, match=r"no reply within 0\.05 s"):
            Endpoint(url, "m", key=None, timeout_seconds=0.05).ask(Question("", ""))


def test_a_key_that_no_header_can_hold_is_not_repeated() -> None:
    with pytest.raises(EndpointFault) as caught:
        Endpoint("http://127.0.0.1:9", "m", key=f"{KEY}\n", timeout_seconds=1).ask(Question("", ""))
    assert KEY not in str(caught.value)


def test_what_was_asked_before_an_endpoint_fails_stays() -> None:
    _, sets = letters()
    n = 0

    def failing(question: Question) -> str:
        nonlocal n
        n += 1
        if n > 12:
            raise EndpointFault("gone")
        return scripted(question)

    asked = interpret(sets, failing)
    assert asked.fault == "gone" and len(asked.names) == 2 and list(asked.scores) == [0]


# ------------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def scaled(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interpret")
    cache = cache_activations(pair.config(folder / "cache"))
    crosscoder = Crosscoder(CrosscoderConfig(dict_size=12, activation="relu", d_model=16)).requires_grad_(False)
    crosscoder.init_weights_(norm=1.0, generator=torch.Generator().manual_seed(0))
    crosscoder.b_enc -= 3.0
    crosscoder.save(folder / "run", provenance=cache_inputs(cache))
    scale_run(folder / "run", ActivationCache(folder / "cache"))
    return folder


@pytest.fixture
def run(scaled: Path, tmp_path: Path) -> list[str]:
    """Words of the command on a run of its own."""
    return ["interpret", str(shutil.copytree(scaled / "run", tmp_path / "run")), "--cache", str(scaled / "cache")]


def written(run: list[str]) -> dict[str, Any]:
    return files.read_model(Path(run[1]) / "interpretation.json", InterpretationRecord)


def test_offline_needs_no_endpoint_and_names_nothing(run: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*run, "--offline", "--latents", "[0, 3, 5]"]) == 0
    known = written(run)
    assert set(known["latents"]) == {"0", "3", "5"} and known["fault"] is None
    assert any(latent["predictors"] for latent in known["latents"].values())
    assert all(latent["name"] is None and not latent["scores"] for latent in known["latents"].values())
    assert "predicted beyond the null of 199 draws" in capsys.readouterr().out


def test_names_and_scores_are_written_and_the_key_nowhere(
    run: list[str], serve: Callable[..., Service], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)

    def reply(asked: dict[str, Any]) -> tuple[int, bytes]:
        user = asked["messages"][1]["content"]
        n = len(texts_of(user))
        return said(str([1] * n) if n else "[interpretation]: letters")

    service = serve(reply)
    words = ["--endpoint", service.url, "--model", "tiny", "--key-variable", "MY_KEY", "--n-scored", "2"]
    assert cli.main([*run, *words, "--json"]) == 0
    named = [latent for latent in written(run)["latents"].values() if latent["name"]]
    assert named and all(latent["name"] == "letters" for latent in named)
    assert all(latent["scores"]["detection"]["accuracy"] == 0.5 for latent in named)
    assert service.headers[0]["Authorization"] == f"Bearer {KEY}"
    output = capsys.readouterr()
    stored = "".join(path.read_text(errors="replace") for path in Path(run[1]).iterdir() if path.is_file())
    assert KEY not in output.out + output.err + stored


def test_the_run_goes_on_without_an_endpoint_that_does_not_answer(
    run: list[str], serve: Callable[..., Service], capsys: pytest.CaptureFixture[str]
) -> None:
    service = serve(lambda _: (503, b""))
    assert cli.main([*run, "--endpoint", service.url, "--model", "tiny"]) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: endpoint")]
    assert len(warnings) == 1 and "does not answer (HTTP status 503)" in warnings[0]
    known = written(run)
    assert "503" in known["fault"] and any(latent["predictors"] for latent in known["latents"].values())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({}, "no endpoint with a model is named"),
        ({"endpoint": "http://a/v1"}, "no endpoint with a model is named"),
        ({"offline": True, "endpoint": "http://a/v1", "model": "m"}, "exclude each other"),
        ({"endpoint": "ftp://a", "model": "m"}, "not a plain http or https URL"),
        ({"endpoint": f"http://u:{KEY}@a", "model": "m"}, "not a plain http or https URL"),
        ({"endpoint": f"http://a/v1?key={KEY}", "model": "m"}, "not a plain http or https URL"),
        ({"endpoint": "http://a:port", "model": "m"}, "not a plain http or https URL"),
    ],
)
def test_settings_that_cannot_work_are_refused_without_repeating_a_secret(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        InterpretSettings("run", **changes)
    assert KEY not in str(caught.value)


def test_a_latent_that_is_not_there_is_one_line(run: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*run, "--offline", "--latents", "[99]"]) == 2
    assert "there is no latent 99" in capsys.readouterr().err
