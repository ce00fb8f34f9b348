"""Checksums: of bytes, and of a JSON object, which carries its own.

`sealed` adds the entry `content_checksum` to an object before it is written, and `unsealed` takes it out and compares.
It covers keys and values and no white space, so an object that was indented anew is the same one. Objects of earlier
versions have no such entry and are taken as they are.
"""

import json
import mmap
from typing import Any

SEAL = "content_checksum"


def checksum(data: bytes | mmap.mmap) -> str:
    """Return xxh3-128 of bytes, hexadecimal; it guards against accident, not against an attacker."""
    import xxhash

    return str(xxhash.xxh3_128_hexdigest(data))


def sealed(value: Any) -> Any:
    """Return a JSON object with its checksum as the last entry; other values as they are."""
    if not isinstance(value, dict):
        return value
    content = {key: inner for key, inner in value.items() if key != SEAL}
    return content | {SEAL: _checksum_of(content)}


def unsealed(value: dict[str, Any]) -> dict[str, Any]:
    """Return an object that was read without its checksum.

    Raises:
        ValueError: it is not the one that was written.
    """
    content = {key: inner for key, inner in value.items() if key != SEAL}
    if SEAL in value and value[SEAL] != _checksum_of(content):
        raise ValueError(f"does not match its {SEAL}: at least one value has changed")
    return content


def _checksum_of(content: dict[str, Any]) -> str:
    return checksum(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())
