"""An OpenAI-compatible service: one question, one answer, `POST {url}/chat/completions`.

The key goes into one header and nowhere else: no message holds it, nor the words of the service, which may repeat it.
"""

import http.client
import json
import time
import urllib.error
import urllib.request
from typing import Any

from crosscoders.common.errors import EnvironmentFault
from diffing.interpretation.prompts import Question

TRIES = 3
PAUSE_SECONDS = 2.0
"""Before the second try; twice as long before the third."""
LARGEST_ANSWER = 1 << 20
"""Bytes that are read of a reply."""
PASSING = (408, 429, 500, 502, 503, 504)
"""HTTP states after which another try may succeed."""


class EndpointFault(EnvironmentFault):
    """The endpoint does not answer."""


class Endpoint:
    """Where questions go."""

    def __init__(self, url: str, model: str, *, key: str | None, timeout_seconds: float) -> None:
        self.url = f"{url.rstrip('/')}/chat/completions"
        self.model, self.timeout_seconds = model, timeout_seconds
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._opener = urllib.request.build_opener(_NoRedirect())

    def ask(self, question: Question) -> str:
        """Return the answer; an empty one where the reply holds no text.

        Raises:
            EndpointFault: no reply after `TRIES`, or a refusal.
        """
        messages = [{"role": "system", "content": question.system}, {"role": "user", "content": question.user}]
        body = {"model": self.model, "messages": messages, "temperature": 0}
        for number in range(TRIES):
            if number:
                time.sleep(PAUSE_SECONDS * number)
            try:
                return _text(self._post(json.dumps(body).encode()))
            except urllib.error.HTTPError as error:
                error.close()
                fault, is_passing = f"HTTP status {error.code}", error.code in PASSING
            except TimeoutError:
                fault, is_passing = f"no reply within {self.timeout_seconds:g} s", True
            except (OSError, ValueError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", None)
                timed_out = isinstance(reason, TimeoutError)
                fault = f"no reply within {self.timeout_seconds:g} s" if timed_out else _kind(reason or error)
                is_passing = not isinstance(error, ValueError)  # such as a key that no header can hold
            if not is_passing:
                break
        raise EndpointFault(f"endpoint {self.url!r} does not answer ({fault}). Check URL, model and key.")

    def _post(self, body: bytes) -> bytes:
        request = urllib.request.Request(self.url, data=body, headers=self._headers, method="POST")
        with self._opener.open(request, timeout=self.timeout_seconds) as reply:
            return bytes(reply.read(LARGEST_ANSWER))


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Another address would get the key: a redirect is an error."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _kind(error: object) -> str:
    """Return the words of the system for a network error, and only the name of another: its words may hold the key."""
    return str(getattr(error, "strerror", None) or type(error).__name__)


def _text(reply: bytes) -> str:
    try:
        content = json.loads(reply)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return ""
    return content if isinstance(content, str) else ""
