"""The line of the report about tokens of massive norm."""

from pathlib import Path
from typing import Any

from crosscoders.dictionary.metrics import Evaluation
from crosscoders.training.log import evaluation_rows
from diffing.report.data import Latents, Run
from diffing.report.summary import measures, outlier_sentence

SHARES = {"top_share": [0.041, 0.04], "outlying_share": [0.963, 0.962]}
FOUND = Evaluation([0.998, 0.997], 24.0, 0.1, 5000, [0.62, 0.63], [4881, 4880])


def run_of(inputs: dict[str, Any], evaluation: list[dict[str, Any]]) -> Run:
    return Run(Path("run"), {"inputs": {"cache": inputs}}, [], [], evaluation, Latents(0, 0, {}, {"latent": []}), {})


def test_the_shares_of_the_cache_and_the_fve_of_the_rest_are_said() -> None:
    said = outlier_sentence(run_of(SHARES, evaluation_rows(FOUND)))
    assert "4.1% and 4.0% lie in the 0.1% of tokens" in said
    assert "96.3% and 96.2% in those beyond 5 times the median" in said
    assert said.endswith("On held-out tokens of ordinary norm the FVE is 0.620 and 0.630.")


def test_a_run_of_an_older_version_says_nothing() -> None:
    assert outlier_sentence(run_of({}, [])) == ""


def test_fve_on_the_rest_counts_the_tokens_of_ordinary_norm() -> None:
    found = measures(run_of({}, evaluation_rows(FOUND)))
    assert (found["fve_rest.base"].n, found["fve_rest.tuned"].n, found["fve.base"].n) == (4881, 4880, 5000)
