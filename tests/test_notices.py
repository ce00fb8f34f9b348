"""Notices of packages that others import are kept back, and only those."""

import logging

import pytest

from crosscoders.common.notices import without_notices
from crosscoders.models.names import quiet_transformers


@pytest.mark.parametrize("quiet", [without_notices, quiet_transformers])
def test_warnings_of_torchao_are_kept_back_inside_and_seen_again_after(
    quiet: object, caplog: pytest.LogCaptureFixture
) -> None:
    names = ("torchao", "torch.utils._pytree")
    with quiet():  # type: ignore[operator]
        for name in names:
            logging.getLogger(name).warning("Failed to load _C_mxfp8")
        logging.getLogger("torchao").error("a fault")
    assert [record.getMessage() for record in caplog.records] == ["a fault"]
    for name in names:
        logging.getLogger(name).warning("seen")
    assert [record.getMessage() for record in caplog.records] == ["a fault", "seen", "seen"]
