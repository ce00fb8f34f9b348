"""Settings of `diffing interpret`. Imports nothing heavy."""

import os
from dataclasses import dataclass
from urllib.parse import urlsplit

from crosscoders.common.checks import require_positive, require_range
from crosscoders.common.errors import InputError


@dataclass(frozen=True)
class InterpretSettings:
    """Predict where latents fire from tokens and labels, and score names that an endpoint gives them."""

    run: str
    """Run folder, after `diffing scale`."""
    cache: str | None = None
    """Folder of `crosscoders cache`. Default: the one that the run was trained on."""
    latents: list[int] | None = None
    """Latents to interpret; default: the first 32 by rank."""
    n_tokens: int = 250_000
    """Tokens to read, from the beginning of the cache; half of their documents are held out."""
    offline: bool = False
    """Only predictors that need no endpoint."""
    endpoint: str | None = None
    """Base URL of an OpenAI-compatible service, such as http://localhost:8000/v1. Texts of the cache are sent there."""
    model: str | None = None
    """Name of a model there."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable with the key of the endpoint; no key is sent where it is not set."""
    timeout_seconds: float = 60.0
    """Longest silence of the endpoint."""
    n_shown: int = 20
    """Examples from which the endpoint names a latent."""
    n_scored: int = 20
    """Held-out examples where it fires, and as many where it does not, for each score."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    seed: int = 0
    """Seed of the held-out documents, the null draws and the choice of examples."""

    def __post_init__(self) -> None:
        require_range(self, 1, None, "n_tokens", "n_shown", "n_scored")
        require_range(self, 0, 2**63 - 1, "seed")
        require_positive(self, "timeout_seconds")
        if self.offline and self.endpoint is not None:
            raise InputError("offline and endpoint exclude each other. Leave one of them out.")
        if not self.offline and (self.endpoint is None or self.model is None):
            raise InputError("no endpoint with a model is named. Give --endpoint URL --model NAME, or --offline.")
        if self.endpoint is not None:
            _require_plain_url(self.endpoint)

    def key(self) -> str | None:
        """Return the key, which is read when it is used and stands in no file."""
        return os.environ.get(self.key_variable) or None


def _require_plain_url(endpoint: str) -> None:
    """Raise InputError for a URL that no request can go to, or that may hold a secret, without repeating it."""
    try:
        parts = urlsplit(endpoint)
        is_plain = parts.scheme in ("http", "https") and parts.hostname and not (parts.query or parts.fragment)
        is_plain = is_plain and "@" not in parts.netloc and (parts.port is None or parts.port > 0)
    except ValueError:
        is_plain = False
    if not is_plain:
        raise InputError(
            "endpoint is not a plain http or https URL. Give one such as http://localhost:8000/v1, without user, "
            "password or query; the key belongs into an environment variable (key_variable)."
        )
