"""Takes the pictures of the documents from a run: python tests/pictures.py RUN [FOLDER], by default into docs/img.

RUN is that of `diffing demo`, with the results of `diffing causal` and `lens`, and inside it those of `topk-lora fit`,
`sae`, `decompose` and `compare`. Needs playwright and Chromium.
"""

import base64
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

from browsers import chromium
from documents import ROOT

from diffing import Session
from diffing.explorer.crosscoder import CrosscoderKind
from diffing.explorer.server import ExplorerServer
from diffing.report.publishing import write_report

PROMPT = [{"role": "user", "content": "How do I pick a lock?"}]
SIZES = {"": (1400, 900), "-phone": (420, 1200)}
SCHEMES = {"": "light", "-dark": "dark"}
TO_WEBP = """async png => {
  const image = await createImageBitmap(await (await fetch("data:image/png;base64," + png)).blob());
  const canvas = Object.assign(document.createElement("canvas"), {width: image.width, height: image.height});
  canvas.getContext("2d").drawImage(image, 0, 0);
  return canvas.toDataURL("image/webp", 0.6).split(",")[1];
}"""


class View(NamedTuple):
    """What a picture shows."""

    name: str
    address: str
    ready: str
    """What is there once the page is complete."""
    at: str = "body"
    """What stands at the top."""


def first(session: Session, context: str) -> int:
    """Return the most specific latent that fires mostly in a context."""
    kind = session.kind("crosscoder")
    assert isinstance(kind, CrosscoderKind)
    table = kind.evidence.table
    return int(table[table["main_context"] == context].nsmallest(1, "rank").index[0])


def views(session: Session, report: str, server: str) -> Iterator[View]:
    """Yield every view: the report's first screen and a card, and in the explorer each kind that the run has."""
    refusal, gap, identity = (first(session, context) for context in ("refusal", "gap", "identity"))
    yield View("report", report, "nav")
    yield View("report-latent", f"{report}#latent-{identity}", f"#latent-{identity}", f"#latent-{identity}")

    def view(name: str, ready: str, **state: Any) -> View:
        words = {key: value if isinstance(value, str) else json.dumps(value) for key, value in state.items()}
        return View(f"explore-{name}", f"{server}#{urlencode(words)}", ready)

    answered = "#answers article:not(.running) >> nth=2"
    changes = [{"latent": refusal, "do": "ablate"}, {"latent": gap, "do": "steer", "strength": 1}]
    asked = {"chat": PROMPT, "token": 18, "length": 24, "answers": True}
    yield view("prompt", answered, **asked, changes=changes)
    yield view("latent", ".example", view="latent", latent=identity)
    yield view("directions", answered, **asked, changes=[{"latent": 0, "do": "ablate"}], show="topk-lora")
    yield view("sae", ".example", view="latent", latent=session.latents(PROMPT, show="sae")[18].latents[0], show="sae")
    yield view("pieces", ".item", view="latents", show="decompose")


def take(browser: Any, view: View, size: str, scheme: str) -> bytes:
    """Return the picture of a view, as PNG."""
    width, height = SIZES[size]
    page = browser.new_page(
        viewport={"width": width, "height": height}, color_scheme=SCHEMES[scheme], reduced_motion="reduce"
    )
    page.set_default_timeout(200_000)
    page.goto(view.address, timeout=200_000)
    page.locator(view.ready).first.wait_for()
    page.locator("#answers .running").first.wait_for(state="detached")
    page.locator(view.at).first.evaluate("e => e.scrollIntoView()")
    picture: bytes = page.screenshot()
    page.close()
    return picture


def main(run: Path, folder: Path) -> None:
    """Take every picture, as WebP: a third of the bytes of PNG."""
    session = Session(run)
    report = write_report(run).html.resolve().as_uri()
    with ExplorerServer(session) as server, chromium() as browser:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        converter = browser.new_page()
        for view in views(session, report, server.address):
            for size in SIZES:
                for scheme in SCHEMES:
                    png = base64.b64encode(take(browser, view, size, scheme)).decode()
                    webp = base64.b64decode(converter.evaluate(TO_WEBP, png))
                    (folder / f"{view.name}{size}{scheme}.webp").write_bytes(webp)
        server.shutdown()
        thread.join()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else ROOT / "docs/img")
