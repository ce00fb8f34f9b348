"""What the page shows, as plain data, and what it may ask for.

Texts of tokens and names are anybody's, so `shown` makes every character of them visible. The page puts them in as text
and never as markup.
"""

from collections import Counter
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from crosscoders.common.errors import InputError
from crosscoders.common.records import first_fault
from diffing.explorer.crosscoder import CrosscoderKind
from diffing.explorer.opening import title_of
from diffing.explorer.session import Prompt, Session
from diffing.report.summary import headline
from diffing.report.text import model_name, visible


class Asked(BaseModel):
    """A request; a key that is not one of its own is refused."""

    model_config = ConfigDict(strict=True, extra="forbid")


class MessageAsked(Asked):
    """One message of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


class ReadAsked(Asked):
    """A prompt to read."""

    prompt: str | list[MessageAsked]
    is_plain: bool = False
    show: str | None = None

    def given(self) -> dict[str, Any]:
        """Return the arguments of the session's function."""
        return self.model_dump()


class AnswerAsked(ReadAsked):
    """A prompt to answer."""

    model: str | None = None
    steer: dict[str, float] = {}
    ablate: list[int] = []
    exchange: list[int] = []
    decoder: str = "tuned"
    amplify: float = 0.0
    max_new_tokens: int = 64

    def given(self) -> dict[str, Any]:
        """Return the arguments of the session's function; JSON has texts for keys."""
        wrong = [latent for latent in self.steer if not latent.isdecimal()]
        if wrong:
            raise InputError(f"steer names latent {wrong[0]!r}; give a number.")
        return self.model_dump() | {"steer": {int(latent): strength for latent, strength in self.steer.items()}}


def parse(form: type[ReadAsked], data: bytes) -> dict[str, Any]:
    """Return the arguments that a request holds.

    Raises:
        InputError: it is not of that form.
    """
    try:
        return form.model_validate_json(data).given()
    except ValidationError as error:
        raise InputError(f"the request {first_fault(error)}.") from None


def run_view(session: Session) -> dict[str, Any]:
    """Return what there is to look at, and whether prompts may be chats."""
    titles = [title_of(name, folder) for name, folder in session.folders.items()]
    return {
        "kinds": [
            {"name": name, "title": shown(title if titles.count(title) == 1 else f"{title} ({name})")}
            for name, title in zip(session.kinds, titles, strict=True)
        ],
        "has_template": bool(session.kind().data.chat_template or session.info.tokenizer.chat_template),
    }


def table_view(session: Session, show: str | None) -> dict[str, Any]:
    """Return the columns of the list, in its order, the words of the kind, and one line about it."""
    kind = session.kind(show)
    if isinstance(kind, CrosscoderKind):
        line = headline(kind.evidence.run)
    else:
        base, tuned = model_name(session.source.base), model_name(session.source.tuned)
        line = f"{tuned} against {base}: {kind.n:,} {kind.form.word}s"
    form, listing = kind.form, kind.listing()
    words = {"headline": line, "form": form._asdict(), "tags": dict(Counter(listing.tag).most_common())}
    return dict(shown(words | listing._asdict()))


def tokens_view(session: Session, prompt: Prompt, is_plain: bool, show: str | None) -> dict[str, Any]:
    """Return the readings of the tokens of a prompt."""
    readings = session.latents(prompt, is_plain=is_plain, show=show)
    return {"tokens": [shown(reading._asdict()) for reading in readings]}


def shown(value: Any) -> Any:
    """Return plain data with every text made visible."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, dict):
        return {key: shown(item) for key, item in value.items()}
    return [shown(item) for item in value] if isinstance(value, list | tuple) else value
