"""The fault benchmark can fail: what it plays is seen as it was, and its counts are those that it promises."""

import os
import random
import shutil
import signal
from pathlib import Path

import pytest

from benchmarks.faults import CUTS, FLIPS
from benchmarks.faults.play import Seen, kill_at, play, when
from benchmarks.faults.rows import REFUSED, Expected
from benchmarks.faults.sweep import READERS, damages


def test_a_command_is_seen_with_its_status_and_its_line() -> None:
    seen = play(["crosscoders", "evla"])
    assert seen.status == 2 and seen.is_refusal
    assert seen.message.startswith("error: unknown command 'evla'; did you mean 'eval'?")


def test_a_traceback_and_a_second_error_are_no_refusal() -> None:
    assert Seen(4, "error: it is damaged.\n").is_refusal
    assert not Seen(0, "error: it is damaged.\n").is_refusal
    assert not Seen(4, "error: one.\nerror: two.\n").is_refusal
    assert not Seen(2, "Traceback (most recent call last):\nerror: one.\n").is_refusal
    assert not Seen(1, "ValueError: one.\n").is_refusal


def broken() -> None:
    raise ValueError("planted")


def test_what_ends_in_a_traceback_is_no_refusal() -> None:
    seen = play(["crosscoders", "eval"], before=broken)
    assert seen.status == 1 and seen.message == "ValueError: planted" and not Expected(seen, REFUSED, "").is_met


@pytest.mark.parametrize(
    "words, also, is_met", [("wrong", True, True), ("other", True, False), ("wrong", False, False)]
)
def test_a_row_needs_its_words_and_what_has_to_be_true(words: str, also: bool, is_met: bool) -> None:
    assert Expected(Seen(2, "error: it is wrong."), REFUSED, words, also).is_met is is_met


def test_a_copy_that_is_killed_leaves_half_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345678")

    def copy() -> None:
        kill_at(shutil, "copyfile", lambda target: target.endswith("b"))()
        shutil.copyfile(tmp_path / "a", tmp_path / "b")

    seen = play(["crosscoders", "eval"], before=copy)
    assert seen.status == -signal.SIGKILL and (tmp_path / "b").read_bytes() == b"1234"


def test_a_signal_comes_when_a_file_is_there(tmp_path: Path) -> None:
    def wait() -> None:
        (tmp_path / "ready").touch()
        signal.pause()

    seen = play(["crosscoders"], before=wait, meanwhile=when((tmp_path / "ready").exists, signal.SIGTERM))
    assert seen.status == -signal.SIGTERM


def test_what_does_not_end_is_ended() -> None:
    assert play(["crosscoders"], before=signal.pause, limit_s=0.2).status == 124  # type: ignore[arg-type]


def test_over_200_flips_and_50_cuts_are_made_and_each_changes_the_file() -> None:
    assert FLIPS * len(READERS) >= 200 and CUTS * len(READERS) >= 50
    data = os.urandom(50)
    tried = damages(data, random.Random(0), FLIPS, CUTS)
    assert len(tried) == FLIPS + CUTS and data not in tried.values()
    flipped = [other for words, other in tried.items() if words.startswith("bit")]
    assert len(flipped) == FLIPS
    for other in flipped:
        assert len(other) == len(data) and sum((a ^ b).bit_count() for a, b in zip(data, other, strict=True)) == 1
