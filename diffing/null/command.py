"""`diffing null`, as a function of its settings that returns a JSON object."""

import time
from typing import Any

from crosscoders.common.checks import to_dict
from crosscoders.common.progress import say
from crosscoders.common.results import result, say_closing
from diffing.latents.runs import open_run_and_cache
from diffing.null.pipeline import calibrate_run
from diffing.null.settings import NullSettings
from diffing.null.summary import null_summary, result_rows


def null(settings: NullSettings) -> dict[str, Any]:
    """Run `diffing null`."""
    started = time.perf_counter()
    run, cache = open_run_and_cache(settings.run, settings.cache)
    calibration = calibrate_run(settings, cache)
    say_closing(started, f"calibration in {run / 'null.json'}")
    say(f"next: diffing report {run}")
    return result("null", to_dict(settings), result_rows(calibration)) | {"text": null_summary(calibration)}
