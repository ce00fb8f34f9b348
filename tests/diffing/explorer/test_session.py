"""A session against slow routes: what fires, how far predictions differ, and answers with changed latents."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Pair
from explorer_runs import explorer_run, latents_of, slow_answer
from torch import Tensor

from crosscoders import InputError
from crosscoders.text.tokens import tokenize_prompt
from diffing import Session
from diffing.causal.steering import answer, steered, steering_vector
from diffing.explorer.answers import Pieces

PROMPT = "What does it do?"
N_NEW = 8


@pytest.fixture(scope="module")
def session(cache_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Session:
    return Session(explorer_run(tmp_path_factory.mktemp("explorer") / "run", cache_folder), cache_folder)


def prompt_ids(session: Session) -> list[int]:
    return tokenize_prompt(session.info.tokenizer, PROMPT)


def activations(session: Session, ids: list[int]) -> tuple[Tensor, list[Tensor]]:
    """At the hook point, (seq, 2, d_model), and the log-probabilities of both models, from plain passes."""
    seen, logs = [], []
    for model in session.pair.models:
        with torch.no_grad():
            out = model(torch.tensor([ids]), output_hidden_states=True, use_cache=False)
        seen.append(out.hidden_states[2][0])  # after the second layer
        logs.append(out.logits[0].log_softmax(-1))
    return torch.stack(seen, dim=1), logs


def test_each_token_lists_the_latents_that_fire_on_it(session: Session) -> None:
    ids = prompt_ids(session)
    expected = latents_of(session).crosscoder.encode(activations(session, ids)[0])
    readings = session.latents(PROMPT)
    assert [reading.id for reading in readings] == ids
    assert sum(len(reading.latents) for reading in readings) > 10
    for reading, row in zip(readings[1:], expected[1:], strict=True):
        assert sorted(reading.latents) == row.nonzero().squeeze(1).tolist()
        torch.testing.assert_close(torch.tensor(reading.activations), row[reading.latents], rtol=1e-4, atol=1e-5)


def test_latents_are_listed_by_how_differently_they_write(session: Session) -> None:
    decoder = latents_of(session).crosscoder.W_dec / latents_of(session).crosscoder.input_scale[:, None]
    lengths = (decoder[:, 1] - decoder[:, 0]).norm(dim=1)
    for reading in session.latents(PROMPT):
        written = [f * float(lengths[j]) for j, f in zip(reading.latents, reading.activations, strict=True)]
        assert written == sorted(written, reverse=True)


def test_the_beginning_of_sequence_is_read_by_the_models_and_not_by_the_crosscoder(session: Session) -> None:
    first = session.latents(PROMPT)[0]
    assert (first.is_scored, first.latents) == (False, [])
    assert first.kl > 0


def test_kl_is_that_of_what_follows_the_token(session: Session) -> None:
    base, tuned = activations(session, prompt_ids(session))[1]
    expected = (tuned.exp() * (tuned - base)).sum(dim=1)
    kls = torch.tensor([reading.kl for reading in session.latents(PROMPT)])
    torch.testing.assert_close(kls, expected, rtol=1e-4, atol=1e-6)


def test_guesses_are_the_likeliest_next_tokens(session: Session) -> None:
    _, tuned = activations(session, prompt_ids(session))[1]
    probabilities = [guess.probability for guess in session.latents(PROMPT)[-1].tuned]
    np.testing.assert_allclose(probabilities, np.sort(tuned[-1].exp().numpy())[::-1][:5], rtol=1e-4)


def said(session: Session, **changes: Any) -> str:
    return "".join(session.answer(PROMPT, max_new_tokens=N_NEW, **changes))


def decoded(session: Session, ids: list[int]) -> str:
    ends = [place for place, token in enumerate(ids) if token == session.info.tokenizer.eos_token_id]
    return str(session.info.tokenizer.decode(ids[: ends[0]] if ends else ids, skip_special_tokens=True))


@pytest.mark.parametrize("model, side", [("base", 0), ("tuned", 1)])
def test_an_answer_without_changes_is_the_greedy_one(session: Session, model: str, side: int) -> None:
    expected = answer(session.pair.models[side], session.info.tokenizer, PROMPT, max_new_tokens=N_NEW)
    assert said(session, model=model).strip() == expected


def test_steering_is_that_of_diffing_steer(session: Session) -> None:
    largest = float(latents_of(session).evidence.table["max_activation"][3])
    vector = steering_vector(latents_of(session).crosscoder, 3, side=1, activation=40 * largest)
    with steered(session.pair.models[0], latents_of(session).hook_point, vector):
        expected = answer(session.pair.models[0], session.info.tokenizer, PROMPT, max_new_tokens=N_NEW)
    assert said(session, model="base", steer={3: 40.0}).strip() == expected != said(session, model="base").strip()


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("ablated, exchanged", [(list(range(24)), []), ([], list(range(24))), ([2, 5], [0, 7, 9])])
def test_changed_latents_follow_their_definition(
    session: Session, side: int, ablated: list[int], exchanged: list[int]
) -> None:
    crosscoder = latents_of(session).crosscoder
    decoder = crosscoder.W_dec / crosscoder.input_scale[:, None]

    def edit(x: Tensor) -> Tensor:
        f, own = crosscoder.encode(x), x[:, side].clone()
        f[0] = 0.0  # the beginning of sequence is not scored
        for j in ablated:
            own -= f[:, j, None] * decoder[j, side]
        for j in exchanged:
            own += f[:, j, None] * (decoder[j, 1 - side] - decoder[j, side])
        return own

    ids = slow_answer(session.pair.models, side, prompt_ids(session), N_NEW, edit)
    changed = said(session, model=("base", "tuned")[side], ablate=ablated, exchange=exchanged)
    assert changed == decoded(session, ids)


def test_changes_of_all_latents_change_the_answer(session: Session) -> None:
    every = list(range(24))
    plain, ablated, exchanged = said(session), said(session, ablate=every), said(session, exchange=every)
    assert len({plain, ablated, exchanged}) == 3


def test_amplified_answers_take_the_likeliest_token_of_the_amplified_distribution(session: Session) -> None:
    ids = slow_answer(session.pair.models, 1, prompt_ids(session), N_NEW, lambda x: x[:, 1], amplify=3.0)
    assert said(session, amplify=3.0) == decoded(session, ids)


def test_a_chat_goes_through_the_template_and_plain_text_does_not(session: Session) -> None:
    chat = [{"role": "user", "content": PROMPT}]
    templated, plain = session.latents(PROMPT), session.latents(PROMPT, is_plain=True)
    assert session.latents(chat) == templated
    assert "".join(reading.text for reading in plain if reading.is_scored).strip() == PROMPT
    assert len(templated) > len(plain)


def test_a_chat_may_end_with_an_answer_to_read_and_not_to_answer(session: Session) -> None:
    chat = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": "The loop does."}]
    assert "loop" in "".join(reading.text for reading in session.latents(chat))
    with pytest.raises(InputError, match="ends with an answer"):
        session.answer(chat)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": "tunde"}, "model is 'tunde'; give one of base, tuned"),
        ({"ablate": [24]}, "there is no latent 24: there are latents 0 to 23"),
        ({"ablate": [1], "exchange": [1]}, "latent 1 is both ablated and exchanged"),
        ({"ablate": [1, 1]}, "latent 1 is ablated twice"),
        ({"steer": {1: float("nan")}}, "a strength is nan"),
        ({"steer": {1: 1.0}, "decoder": "both"}, "decoder is 'both'"),
        ({"amplify": -1.0}, "amplify is -1.0; give a number from 0 to 100"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; give a number from 1"),
    ],
)
def test_what_cannot_be_done_is_said_before_a_token_is_asked_for(
    session: Session, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        session.answer(PROMPT, **changes)


@pytest.mark.parametrize("prompt", ["", []])
def test_an_empty_prompt_is_refused(session: Session, prompt: Any) -> None:
    with pytest.raises(InputError, match="the prompt is empty"):
        session.latents(prompt)


def test_a_prompt_beyond_the_context_is_refused_and_an_answer_ends_with_it(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, n = said(session), len(prompt_ids(session))
    monkeypatch.setattr(session, "context", n)
    with pytest.raises(InputError, match=f"the prompt has {n} tokens, but the models read {n} and one is for"):
        session.latents(PROMPT)
    monkeypatch.setattr(session, "context", n + 3)
    assert whole.startswith(said(session)) and len(said(session)) < len(whole)


def test_two_answers_at_once_are_those_that_each_has_alone(session: Session) -> None:
    alone = [said(session, ablate=list(range(24))), said(session)]
    together = ["", ""]
    streams = [session.answer(PROMPT, max_new_tokens=N_NEW, ablate=list(range(24))), None]
    streams[1] = session.answer(PROMPT, max_new_tokens=N_NEW)

    def collect(number: int) -> None:
        together[number] = "".join(streams[number] or [])

    threads = [threading.Thread(target=collect, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert together == alone


def test_a_model_that_fails_leaves_the_session_as_it_was(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    before = said(session)
    stream = session.answer(PROMPT, ablate=[1], max_new_tokens=N_NEW)
    with monkeypatch.context() as patched:
        patched.setattr(session.pair.models[1].lm_head, "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            list(stream)
    assert not session.lock.locked()
    assert said(session) == before


def test_an_answer_that_nobody_waits_for_leaves_no_hook(session: Session) -> None:
    before = said(session)
    next(session.answer(PROMPT, ablate=list(range(24))))
    assert said(session) == before


def test_pieces_hold_whole_characters_and_join_to_the_text() -> None:
    class Bytes:
        """A tokenizer with one token for each byte."""

        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return bytes(ids).decode("utf-8", errors="replace")

    pieces = Pieces(Bytes())
    given = [pieces.add(token) for token in "a\u00e9\u20ac".encode()]
    assert given == ["a", "", "\u00e9", "", "", "\u20ac"]
    assert [pieces.add(0xE2), pieces.rest()] == ["", "\ufffd"]


def test_a_session_needs_the_cache_that_the_run_fits(pair: Pair, session: Session, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        Session(tmp_path / "none")
