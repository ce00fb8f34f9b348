"""`diffing explore`, as a function of its settings that returns a JSON object."""

import time
from typing import Any

from crosscoders.common.checks import to_dict
from crosscoders.common.errors import Stopped
from crosscoders.common.progress import say
from crosscoders.common.results import result
from diffing.explorer.server import ExplorerServer
from diffing.explorer.session import Session
from diffing.explorer.settings import ExploreSettings


def explore(settings: ExploreSettings) -> dict[str, Any]:
    """Run `diffing explore` until Ctrl-C."""
    started = time.perf_counter()
    say(f"explore {settings.run}: both models and what the run found are loaded")
    session = Session(settings.run, settings.cache, device=settings.device, model_dtype=settings.model_dtype)
    with ExplorerServer(session, settings.port) as server:
        say(f"ready in {time.perf_counter() - started:.1f} s; open this in a browser, Ctrl-C ends it")
        say(server.address)
        try:
            server.serve_forever()
        except KeyboardInterrupt as stop:
            if isinstance(stop, Stopped):
                raise
    return result("explore", to_dict(settings), [])
