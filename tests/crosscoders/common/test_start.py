"""The start of a console command: how its threads wait, unless the caller said it."""

import os
import types

import pytest

from crosscoders.common import start


@pytest.mark.parametrize(
    "given, then",
    [
        ({}, {"GOMP_SPINCOUNT": start.SPINS}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
    ],
)
def test_threads_sleep_soon_where_nothing_else_is_said(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], then: dict[str, str]
) -> None:
    environment = dict(given)
    monkeypatch.setattr(start.os, "environ", environment)
    seen: list[dict[str, str]] = []
    program = types.SimpleNamespace(main=lambda: seen.append(dict(os.environ)) or 0)
    monkeypatch.setattr("importlib.import_module", lambda name: program)
    assert start.run_program("crosscoders.cli") == 0 and seen == [then]
