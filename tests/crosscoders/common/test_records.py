"""What is said of a JSON file that is not of the form that its writer gave it."""

from pathlib import Path

import pytest

from crosscoders import CorruptData, EnvironmentFault, InputError
from crosscoders.common import files
from crosscoders.common.records import Record


class Inner(Record):
    n: int


class Outer(Record):
    version = 2
    again = "bake again"
    format_version: int
    parts: list[Inner]
    scale: float = 1.0


@pytest.mark.parametrize(
    "text, line",
    [
        ('{"format_version": 2}', "has no 'parts', so it is damaged. Restore it, or bake again."),
        ('{"format_version": 2, "parts": [{"n": 1}, {}]}', "has no 'parts.1.n'"),
        ('{"format_version": 2, "parts": [{"n": "1"}]}', "has parts.0.n = '1' (should be a valid integer), so it is"),
        ('{"format_version": 2, "parts": [{"n": 1.5}]}', "has parts.0.n = 1.5 ("),
        ('{"format_version": 2, "parts": [{"n": true}]}', "has parts.0.n = True ("),
        ('{"format_version": 2, "parts": {}}', "has parts = {} (should be a valid array)"),
        ('{"format_version": "2", "parts": []}', "has format_version = '2' ("),
        ("[1]", "holds no such object ("),
        ('{"format_version": 2, "pa', "is not valid JSON ("),
        ("", "is not valid JSON ("),
        ("[" * 100_000, "is not valid JSON ("),
    ],
)
def test_a_damaged_file_is_named_with_the_key_and_what_stands_there(tmp_path: Path, text: str, line: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(CorruptData) as caught:
        files.read_model(path, Outer)
    assert str(caught.value).startswith(f"{path} {line}") and "\n" not in str(caught.value)


def test_keys_of_a_later_version_are_let_through_and_returned(tmp_path: Path) -> None:
    value = {"format_version": 2, "parts": [{"n": 1, "colour": "red"}], "scale": 3, "more": None}
    files.write_json(tmp_path / "a.json", value)
    assert files.read_model(tmp_path / "a.json", Outer) == value


def test_another_format_version_is_told_before_the_form_is_looked_at(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"format_version": 3})
    with pytest.raises(InputError, match=r"a\.json has format_version 3; this version reads 2\. Bake again\.$"):
        files.read_model(tmp_path / "a.json", Outer)


def test_half_of_a_surrogate_pair_is_text(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"token": "\\ud83d", "face": "\\ud83d\\ude00"}')
    assert files.read_model(tmp_path / "a.json", Record) == {"token": "\ud83d", "face": "\U0001f600"}


def test_a_file_that_is_not_there_or_cannot_be_read_is_no_damage(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no .*/b\.json\. Check the folder's name\."):
        files.read_model(tmp_path / "b.json", Record)
    with pytest.raises(EnvironmentFault, match=r"cannot read .*: Is a directory"):
        files.read_model(tmp_path, Record)
