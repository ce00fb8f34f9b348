"""Progress off a terminal."""

from types import SimpleNamespace

import pytest

from crosscoders.common import progress


def test_a_line_says_how_far_the_work_is_once_nothing_was_said_for_a_while(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([10.0, 16.0, 16.0, 20.0, 30.0, 31.0])  # update, update and its line, three updates
    monkeypatch.setattr(progress, "_said_at", 0.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    for _ in progress.watched([300] * 5, "eval", total=1500, unit="seq", size=lambda n: n):
        pass
    assert capsys.readouterr().err.splitlines() == ["eval  600 of 1,500 seq"]


def test_a_bar_says_what_its_work_is_about_as_long_as_that_goes_on(bar_labels: list[str]) -> None:
    with progress.about("placebo"), progress.about("seed 1"):
        progress.Progress("train", total=1).close()
    progress.Progress("train", total=1).close()
    assert bar_labels == ["train, placebo, seed 1", "train"]
