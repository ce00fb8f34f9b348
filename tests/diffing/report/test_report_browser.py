"""The report in a browser, from its file: sort, filter, search, cards, addresses. Needs Chromium and playwright."""

from collections.abc import Iterator
from typing import Any

import pytest
from browsers import NEEDS_CHROMIUM, chromium
from report_pages import put, write_run

from diffing.report.publishing import write_report

pytestmark = [NEEDS_CHROMIUM, pytest.mark.whole]
SCRIPT = "<img src=x onerror=\"document.title = 'hacked'\">"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The open page of a run; it complains of nothing and asks for nothing but its file."""
    run = write_run(tmp_path_factory.mktemp("browser") / "run", n_examples=12, tokens=[" zebra", SCRIPT, "\n"])
    with_card = {"histograms": {"1": [0, 16, 1, 4]}, "neighbours": {"1": [[2, 0.81], [39, 0.5]]}}
    put(run, "cards.json", {"format_version": 1} | with_card)
    put(run, "lens.json", {"latents": {"1": {"base": [" the", SCRIPT], "tuned": [" cannot"]}}})
    address = write_report(run).html.as_uri()
    with chromium() as browser:
        opened = browser.new_page(viewport={"width": 1400, "height": 900})
        faults: list[str] = []
        asked: list[str] = []
        opened.on("pageerror", lambda error: faults.append(str(error)))
        opened.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        opened.on("request", lambda request: asked.append(request.url))
        opened.set_default_timeout(120_000)
        opened.goto(address)
        yield opened
        assert faults == [] and opened.title() != "hacked"
        assert [url for url in asked if url.split("#")[0] != address and not url.startswith("data:")] == []


@pytest.fixture(autouse=True)
def fresh(page: Any) -> None:
    """No filter, no place in the address."""
    page.evaluate("location.hash = ''")
    page.locator("#filter").fill("")


def shown(page: Any) -> list[str]:
    return [row.get_attribute("id") for row in page.locator("#table tbody tr:visible").all()]


def test_a_heading_sorts_and_sorts_back(page: Any) -> None:
    head = page.locator("#table thead th", has_text="latent").first.get_by_role("button")
    head.click()
    first = shown(page)
    head.click()
    assert shown(page) == first[::-1] and len(first) == 40


def test_a_number_finds_its_latent_alone_and_words_are_found_in_examples(page: Any) -> None:
    page.locator("#filter").fill("3")
    assert shown(page) == ["row-3"]
    page.locator("#filter").fill("zebra")
    found = shown(page)
    assert 0 < len(found) < 40 and {f"latent-{row[4:]}" for row in found} == {
        card.get_attribute("id") for card in page.locator("details[id^=latent-]").all()
    }


def test_a_row_opens_its_latent_and_the_address_opens_it_again(page: Any) -> None:
    page.locator("#row-1").click()
    assert page.evaluate("location.hash") == "#latent-1" and page.locator("#latent-1").get_attribute("open") is not None
    page.locator("#latent-1 >> text=next").click()
    following = page.evaluate("location.hash")
    assert following != "#latent-1" and page.locator(following).get_attribute("open") is not None


def test_a_card_draws_its_histogram_and_says_how_high_it_is(page: Any) -> None:
    page.locator("#row-1").click()
    card = page.locator("#latent-1")
    drawn = card.locator("svg.spread path").bounding_box()
    assert (drawn["width"], drawn["height"]) == pytest.approx((4 * 8, 28), abs=1)
    assert "at most 16 tokens a bin" in card.inner_text()


def test_a_card_has_the_tokens_of_both_decoders_as_text(page: Any) -> None:
    page.locator("#row-1").click()
    lines = page.locator("#latent-1 p", has_text="decoder writes for:").all()
    assert [line.locator("code").all_inner_texts() for line in lines] == [[" the", SCRIPT], [" cannot"]]


def test_a_card_leads_to_its_neighbours_with_and_without_a_card(page: Any) -> None:
    for neighbour, opened in (("2", "#latent-2"), ("39", "#row-39")):
        page.locator("#row-1").click()
        page.locator("#latent-1 p", has_text="nearest decoders").get_by_role("link", name=neighbour, exact=True).click()
        assert page.evaluate("location.hash") == opened and page.locator(opened).is_visible()


def test_previous_leads_back_from_next(page: Any) -> None:
    page.locator("#row-1").click()
    page.locator("#latent-1 >> text=next").click()
    page.locator(page.evaluate("location.hash")).get_by_text("previous").click()
    assert page.evaluate("location.hash") == "#latent-1"


def test_a_click_on_a_point_opens_its_latent(page: Any) -> None:
    page.evaluate("document.getElementById('figure-nu').emit('plotly_click', {points: [{text: 'latent 2'}]})")
    assert page.evaluate("location.hash") == "#latent-2"


def test_nothing_is_wider_than_a_phone(page: Any) -> None:
    page.set_viewport_size({"width": 420, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= 420
    page.set_viewport_size({"width": 1400, "height": 900})
