"""The page in a browser: what a person types, clicks and copies. Needs the system's Chromium and playwright."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsers import NEEDS_CHROMIUM, chromium
from conftest import Pair
from explorer_runs import explorer_run, latents_of, run_of_every_kind, serving

from diffing import Session
from diffing.explorer.crosscoder import FORM
from diffing.explorer.server import ExplorerServer

pytestmark = [NEEDS_CHROMIUM, pytest.mark.whole]
PROMPT = "What does it do?"
SCRIPT = "<script>document.title = 'hacked'</script><img src=x onerror=\"document.title = 'hacked'\">"


@pytest.fixture(scope="module")
def session(cache_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Session:
    return Session(explorer_run(tmp_path_factory.mktemp("browser") / "run", cache_folder), cache_folder)


@pytest.fixture(scope="module")
def server(session: Session) -> Iterator[ExplorerServer]:
    with serving(session) as served:
        yield served


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


@pytest.fixture
def faults() -> list[str]:
    """What the page complained of."""
    return []


@pytest.fixture
def page(browser: Any, server: ExplorerServer, faults: list[str]) -> Iterator[Any]:
    """An open page; at the end it has complained of nothing, and asked nobody but the server."""
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    opened = context.new_page()
    opened.set_default_timeout(30_000)
    asked: list[str] = []
    opened.on("request", lambda request: asked.append(request.url))
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    opened.goto(server.address)
    yield opened
    context.close()
    assert faults == []
    assert [url for url in asked if not url.startswith((server.address, "data:"))] == []


def read(page: Any, text: str = PROMPT) -> Any:
    """Type a prompt, read it, return its tokens."""
    page.get_by_label("message", exact=True).fill(text)
    page.get_by_role("button", name="Read").click()
    page.locator("#tokens span").first.wait_for()
    return page.locator("#tokens span")


def waited(page: Any) -> list[str]:
    """The texts of the answers, once all have ended."""
    page.locator("#answers article:not(.running)").last.wait_for()
    page.locator("#answers .running").first.wait_for(state="detached")
    return [text.strip() for text in page.locator("#answers pre").all_text_contents()]


def test_a_prompt_is_read_into_tokens_coloured_by_kl(page: Any, session: Session) -> None:
    tokens, readings = read(page), session.latents(PROMPT)
    assert tokens.count() == len(readings)
    strengths = [float(span.evaluate("e => e.style.getPropertyValue('--a')")) for span in tokens.all()]
    kls = [reading.kl for reading in readings]
    assert strengths == pytest.approx([0.75 * kl / max(kls) for kl in kls], abs=1e-3)


def test_a_prompt_can_be_typed_and_read_without_a_click(page: Any) -> None:
    page.locator("#messages textarea:focus").wait_for()
    page.keyboard.type(PROMPT)
    page.keyboard.press("Control+Enter")
    page.locator("#tokens span").first.wait_for()


def test_a_token_leads_to_its_latents_and_a_latent_to_its_page(page: Any, session: Session) -> None:
    token = 5
    read(page).nth(token).click()
    listed = page.locator(".firing a").all_text_contents()
    expected = session.latents(PROMPT)[token].latents
    assert listed == [f"latent {j}" for j in expected[:8]]
    page.locator(".firing a").first.click()
    page.locator(".example").first.wait_for()
    assert page.locator("#latent h2").inner_text().startswith(f"Latent {expected[0]} ")
    assert page.locator("#latent svg").count() == 2


def test_a_prompt_is_coloured_by_one_latent(page: Any, session: Session) -> None:
    tokens, readings = read(page), session.latents(PROMPT)
    latent = readings[5].latents[0]
    page.get_by_label("Colour by").select_option("latent")
    page.get_by_role("spinbutton", name="number").fill(str(latent))
    page.get_by_role("spinbutton", name="number").press("Enter")
    lit = [float(span.evaluate("e => e.style.getPropertyValue('--a')")) > 0 for span in tokens.all()]
    assert lit == [latent in reading.latents for reading in readings]


def test_answers_stand_side_by_side_with_a_steered_one(page: Any, session: Session) -> None:
    read(page)
    page.get_by_label("at most").fill("6")
    page.get_by_role("button", name="Change a latent").click()
    page.get_by_label("latent", exact=True).fill("3")
    page.get_by_label("latent", exact=True).press("Tab")
    page.get_by_label("what is done to it").select_option("exchange")
    page.get_by_role("button", name="Answer").click()
    expected = [
        "".join(session.answer(PROMPT, max_new_tokens=6, **changes)).strip()
        for changes in ({"model": "base"}, {"model": "tuned"}, {"exchange": [3]})
    ]
    assert waited(page) == expected


def test_a_slider_steers_and_another_amplifies(page: Any, session: Session) -> None:
    read(page)
    page.get_by_label("at most").fill("6")
    page.get_by_role("button", name="Change a latent").click()
    page.get_by_label("latent", exact=True).fill("3")
    page.get_by_label("latent", exact=True).press("Tab")
    page.get_by_label("strength").fill("8")
    page.get_by_label("amplify").fill("2.5")
    page.get_by_role("button", name="Answer").click()
    expected = "".join(session.answer(PROMPT, steer={3: 8.0}, amplify=2.5, max_new_tokens=6)).strip()
    assert waited(page)[2] == expected
    assert page.locator("#answers h3").last.inner_text() == "tuned, latent 3 steered × 8, amplified × 2.5"


def test_a_copied_address_opens_the_same_view(page: Any) -> None:
    read(page).nth(4).click()
    page.get_by_label("at most").fill("4")
    page.get_by_role("button", name="Answer").click()
    answers = waited(page)
    page.get_by_role("button", name="Copy address").click()
    page.get_by_role("button", name="Copied").wait_for()
    address = page.evaluate("navigator.clipboard.readText()")
    other = page.context.new_page()
    other.goto(address)
    assert waited(other) == answers
    assert (
        other.locator("#tokens [aria-selected=true]").inner_text() == page.locator("#tokens span").nth(4).inner_text()
    )
    assert other.get_by_label("message", exact=True).input_value() == PROMPT


def test_the_back_button_returns_to_the_prompt(page: Any) -> None:
    read(page)
    page.get_by_role("link", name="Latents").click()
    page.locator(".item").first.click()
    page.locator(".example").first.wait_for()
    page.go_back()
    page.locator(".item").first.wait_for()
    page.go_back()
    assert page.locator("#tokens span").first.is_visible()


def test_the_list_sorts_filters_and_finds(page: Any, session: Session) -> None:
    table = latents_of(session).evidence.table
    page.get_by_role("link", name="Latents").click()
    page.get_by_label("sort by").select_option("n_active")
    assert page.locator(".item b").first.inner_text() == str(table["n_active"].idxmax())
    word = str(table["verdict"].value_counts().idxmin())
    page.get_by_label("verdict").select_option(word)
    assert page.locator(".item").count() == int((table["verdict"] == word).sum())
    page.get_by_label("verdict").select_option("")
    page.get_by_label("Find").fill("1")
    assert page.locator(".item b").all_text_contents() == ["1"]  # exactly, and not 10 to 19


def test_a_list_of_100_000_latents_has_only_those_in_sight(page: Any, server: ExplorerServer) -> None:
    n = 100_000
    column: list[Any] = list(range(n))
    words = {"tag": ["shared"] * n, "text": [[]] * n, "name": [None] * n, "label": [""] * n}
    form = {**FORM._asdict(), "sorts": {"rank": ["rank", 1]}, "cells": {"n_active": "tokens"}}
    values = dict.fromkeys(("rank", "n_active"), column)
    table = {"form": form, "tags": {"shared": n}, "number": column, "unit": column, "values": values, **words}
    page.route("**/api/table*", lambda route: route.fulfill(json=table))
    page.goto("about:blank")
    page.goto(f"{server.address}#view=latents")
    page.locator(".item").first.wait_for()
    assert page.locator(".item").count() < 60
    page.locator("#list").focus()
    page.keyboard.press("End")
    page.locator(".item b", has_text=str(n - 1)).wait_for()
    assert page.locator(".item").count() < 60


def test_keys_lead_through_the_page(page: Any) -> None:
    page.get_by_label("message", exact=True).fill(PROMPT)
    page.keyboard.press("Control+Enter")
    page.locator("#tokens span").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.locator("#tokens [aria-selected=true]").get_attribute("data-token") == "1"
    page.keyboard.press("/")
    assert page.get_by_label("Find").evaluate("e => e === document.activeElement")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    second = page.locator(".item b").nth(1).inner_text()
    page.keyboard.press("Enter")
    page.locator("#latent h2", has_text=f"Latent {second} ").wait_for()
    page.keyboard.press("k")
    page.locator("#latent h2", has_text=f"Latent {second} ").wait_for(state="detached")
    page.keyboard.press("j")
    page.locator("#latent h2", has_text=f"Latent {second} ").wait_for()
    page.keyboard.press("Escape")
    assert page.locator("#tokens").is_visible()


def test_markup_in_tokens_names_and_answers_stays_text(
    page: Any, server: ExplorerServer, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = [reading._replace(text=SCRIPT) for reading in session.latents(PROMPT)]
    table, found = latents_of(session).evidence.table, dict(session.latent(0))
    shown = [entry | {"tokens": [SCRIPT] * len(entry["tokens"]), "group": SCRIPT} for entry in found["examples"]]
    found |= {"name": SCRIPT, "examples": shown}
    monkeypatch.setattr(session, "latents", lambda *_, **__: readings)
    monkeypatch.setattr(session, "latent", lambda _, **__: found)
    monkeypatch.setattr(session, "answer", lambda *_, **__: iter([SCRIPT]))
    names = {str(j): {"name": SCRIPT} for j in range(len(table))}
    monkeypatch.setattr(latents_of(session), "evidence", latents_of(session).evidence._replace(interpreted=names))
    page.reload()
    assert read(page, SCRIPT).first.inner_text() == SCRIPT
    page.locator("#tokens span").nth(3).click()
    page.get_by_role("button", name="Answer").click()
    assert waited(page) == [SCRIPT, SCRIPT]
    page.get_by_role("link", name="Latents").click()
    assert SCRIPT in page.locator(".item").first.inner_text()
    page.locator(".item").first.click()
    page.locator(".example").first.wait_for()
    assert SCRIPT in page.locator("#latent h2").inner_text()
    assert page.locator("body script, body img").count() == 0
    assert "hacked" not in page.title()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_off_the_screen_of_a_phone(
    browser: Any, server: ExplorerServer, session: Session, scheme: str
) -> None:
    latent = session.latents(PROMPT)[5].latents[0]
    chat = json.dumps([{"role": "user", "content": PROMPT + " " + "w" * 60}])
    page = browser.new_page(viewport={"width": 420, "height": 860}, color_scheme=scheme)
    for view, shown in (
        ("", "#tokens span"),
        ("&view=latents", ".item"),
        (f"&view=latent&latent={latent}", ".example"),
    ):
        page.goto("about:blank")
        page.goto(f"{server.address}#chat={chat}&token=5{view}")
        page.locator(shown).first.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= 420
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 24, 28)"
    page.close()
    assert dark == (scheme == "dark")


def test_what_fails_is_one_line_on_the_page(page: Any, session: Session, faults: list[str]) -> None:
    page.get_by_label("message", exact=True).fill("it does " * 3000)
    page.get_by_role("button", name="Read").click()
    page.get_by_role("alert").filter(has_text="Shorten it.").wait_for()
    read(page)
    assert page.get_by_role("alert").count() == 0
    assert all("400" in fault for fault in faults)  # the browser's own line about the refused request
    faults.clear()


def test_an_answer_can_be_stopped(page: Any, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()

    def endless(*_: Any, **__: Any) -> Iterator[str]:
        try:
            while not ended.wait(0.01):
                yield "again "
        finally:
            ended.set()

    read(page)
    monkeypatch.setattr(session, "answer", endless)
    page.get_by_role("button", name="Answer").click()
    page.locator("#answers pre", has_text="again").first.wait_for()
    page.get_by_role("button", name="Stop").click()
    page.locator("#answers", has_text="stopped").wait_for()
    assert ended.wait(timeout=20)


@pytest.fixture(scope="module")
def every_kind(cache_folder: Path, pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ExplorerServer]:
    run = run_of_every_kind(tmp_path_factory.mktemp("every-kind") / "run", cache_folder, pair)
    with serving(Session(run, cache_folder)) as served:
        yield served


@pytest.mark.parametrize(
    "show, word, models, changed",
    [
        ("topk-lora", "direction", 3, "adapted, direction 1 ablated"),
        ("sae", "latent", 2, "tuned, latent 1 ablated"),
        ("pieces", "piece", 2, "tuned, piece 1 ablated"),
    ],
)
def test_what_is_shown_is_chosen_and_then_read_listed_and_changed(
    browser: Any, every_kind: ExplorerServer, show: str, word: str, models: int, changed: str
) -> None:
    session, page = every_kind.session, browser.new_page(viewport={"width": 420, "height": 860})
    page.goto(every_kind.address)
    page.locator("#show").select_option(show)
    page.get_by_role("link", name=f"{word.title()}s").wait_for()
    readings = session.latents(PROMPT, show=show)
    read(page).last.click()
    assert page.locator(".firing a").first.inner_text() == f"{word} {readings[-1].latents[0]}"
    assert page.locator(".guesses > div").count() == models
    page.get_by_label("at most").fill("4")
    page.get_by_role("button", name=f"Change a {word}").click()
    page.get_by_label(word, exact=True).fill("1")
    page.get_by_label(word, exact=True).press("Tab")
    page.get_by_label("what is done to it").select_option("ablate")
    page.get_by_role("button", name="Answer").click()
    expected = "".join(session.answer(PROMPT, show=show, ablate=[1], max_new_tokens=4)).strip()
    assert waited(page)[models] == expected
    assert page.locator("#answers h3").last.inner_text() == changed
    page.get_by_role("link", name=f"{word.title()}s").click()
    tag, label = (page.locator(".item").first.locator(part) for part in (".verdict", ".where small"))
    if label.count():
        assert tag.bounding_box()["x"] + tag.bounding_box()["width"] <= label.bounding_box()["x"]
    page.locator(".item").first.click()
    page.locator(".example").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 420
    page.close()


def test_a_server_that_is_gone_is_said(browser: Any, session: Session) -> None:
    with ExplorerServer(session) as own:
        thread = threading.Thread(target=own.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        page = browser.new_page()
        page.goto(own.address)
        read(page)
        own.shutdown()
        thread.join()
    page.get_by_label("message", exact=True).fill("Another one")
    page.get_by_role("button", name="Read").click()
    page.get_by_role("alert").filter(has_text="Is diffing explore still running?").wait_for()
    page.close()
