"""What the page shows, as plain data, and what it may ask for.

Texts of tokens and names are anybody's, so `shown` makes every character of them visible. The page puts them in as text
and never as markup.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from crosscoders.common.errors import InputError
from crosscoders.common.records import first_fault
from diffing.explorer.session import Prompt, Session
from diffing.report.summary import headline, pair_names, verdict_counts
from diffing.report.text import visible

COLUMNS = (
    "latent", "rank", "verdict", "relative_decoder_norm", "decoder_cosine", "nu_error", "nu_reconstruction",
    "n_active", "max_activation", "main_context", "main_context_share",
)  # fmt: skip
"""Columns of the table that the page lists."""
CONTEXT = 12
"""Tokens before the peak of an example that stand for a latent in the list."""


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

    def given(self) -> dict[str, Any]:
        """Return the arguments of the session's function."""
        return self.model_dump()


class AnswerAsked(ReadAsked):
    """A prompt to answer."""

    model: str = "tuned"
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
    """Return what the page says of the run."""
    run = session.evidence.run
    base, tuned = pair_names(run)
    return {
        "headline": shown(headline(run)),
        "base": shown(base),
        "tuned": shown(tuned),
        "hook_point": session.hook_point,
        "n_latents": len(run.latents),
        "n_tokens": run.latents.n_tokens,
        "verdicts": verdict_counts(run),
        "context": session.context,
        "has_template": bool(session.template or session.info.tokenizer.chat_template),
    }


def table_view(session: Session) -> dict[str, Any]:
    """Return the columns of the list of latents, best rank first, with names, the text around each peak, and
    `Session.lengths`."""
    run, interpreted = session.evidence.run, session.evidence.interpreted
    columns: dict[str, Any] = {name: [run.latents.columns[name][i] for i in run.latents.order] for name in COLUMNS}
    for name, lengths in zip(("length_base", "length_tuned", "length_difference"), session.lengths.T, strict=True):
        columns[name] = lengths[columns["latent"]].tolist()
    columns["text"] = [_peak(run.examples.get(latent, [])) for latent in columns["latent"]]
    columns["name"] = [interpreted.get(str(latent), {}).get("name") for latent in columns["latent"]]
    return dict(shown(columns))


def _peak(examples: list[Any]) -> list[str]:
    """Return the tokens before the peak of the strongest example, the peak, and those after it, as three texts."""
    if not examples:
        return []
    tokens, peak = examples[0].tokens, examples[0].peak
    return ["".join(tokens[max(0, peak - CONTEXT) : peak]), tokens[peak], "".join(tokens[peak + 1 : peak + 5])]


def tokens_view(session: Session, prompt: Prompt, is_plain: bool) -> dict[str, Any]:
    """Return the readings of the tokens of a prompt."""
    readings = session.latents(prompt, is_plain=is_plain)
    return {
        "tokens": [
            shown(reading._asdict() | {"base": list(reading.base), "tuned": list(reading.tuned)})
            for reading in readings
        ]
    }


def shown(value: Any) -> Any:
    """Return plain data with every text made visible."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, dict):
        return {key: shown(item) for key, item in value.items()}
    return [shown(item) for item in value] if isinstance(value, list | tuple) else value
