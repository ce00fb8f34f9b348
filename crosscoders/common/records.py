"""Forms of the JSON files that we write, so that a damaged one is one line and no traceback.

A subclass of `Record` stands beside the code that writes the file, and names what readers rely on, with its type. Keys
that it does not name are let through: a file of a later version may have more. `files.read_model` reads and checks.
"""

import json
import reprlib
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from crosscoders.common.errors import CorruptData, InputError
from crosscoders.common.seals import unsealed


class Record(BaseModel):
    """A JSON object; by itself one with any keys."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    version: ClassVar[int | None] = None
    """The only `format_version` that is read; None: the file has none, or its reader compares it."""
    again: ClassVar[str] = "make it again"
    """What to do about a file that cannot be read."""

    @classmethod
    def checked(cls, data: bytes, name: str) -> dict[str, Any]:
        """Return the object in `data`, the bytes of the file `name`, as plain data without its checksum.

        Raises:
            InputError: it has another format version.
            CorruptData: it is not JSON, not of this form, or not what its checksum says.
        """
        try:
            value = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise CorruptData(f"{name} is not valid JSON ({error}). Restore it, or {cls.again}.") from None
        try:
            content = unsealed(value) if isinstance(value, dict) else value
        except ValueError as error:
            raise CorruptData(f"{name} {error}. Restore it, or {cls.again}.") from None
        version = value.get("format_version") if isinstance(value, dict) else None
        if cls.version is not None and type(version) is int and version != cls.version:
            raise InputError(
                f"{name} has format_version {version}; this version reads {cls.version}. {cls.again.capitalize()}."
            )
        if b"\\u" in data:  # half of a surrogate pair, which tokens may be, is JSON to Python and not to pydantic
            data = json.dumps(value, ensure_ascii=False).encode(errors="replace")
        try:
            cls.model_validate_json(data)
        except ValidationError as error:
            raise CorruptData(f"{name} {first_fault(error)}, so it is damaged. Restore it, or {cls.again}.") from None
        return dict(content)


class FileRecord(Record):
    """What identifies a published file, as `files.Written`."""

    n_bytes: int
    checksum: str


class Named(Record):
    """What is recorded of a model, wherever it lies: the name that was given, and the hash of its files."""

    name: str
    hash: str


def first_fault(error: ValidationError) -> str:
    """Return what is wrong, and where, of the first fault that was found."""
    fault = error.errors(include_url=False)[0]
    where = ".".join(map(str, fault["loc"]))
    if fault["type"] == "missing":
        return f"has no {where!r}"
    said = fault["msg"].removeprefix("Input ").removeprefix("Value error, ").rstrip(".")
    return f"has {where} = {reprlib.repr(fault['input'])} ({said})" if where else f"holds no such object ({said})"
