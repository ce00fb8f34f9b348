"""A damaged `.pt` file is one line, and takes no more memory than the file has bytes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from crosscoders import CorruptData, InputError
from crosscoders.formats.weights import read_weights


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    path = tmp_path / "ae.pt"
    torch.save({"encoder.weight": torch.ones(3, 50), "encoder.bias": torch.zeros(50)}, path)
    return path


def flipped(data: bytes) -> bytes:
    """One bit of the ones: their bytes in float32 are 00 00 80 3f."""
    at = data.index(torch.ones(8).numpy().tobytes()) + 9
    return data[:at] + bytes([data[at] ^ 64]) + data[at + 1 :]


@pytest.mark.parametrize(
    "damage, match",
    [
        (lambda data: b"", "ae.pt is empty. Download it again"),
        (lambda data: data[: len(data) // 2], "ae.pt is damaged: its archive is not whole"),
        (lambda data: data[:-1], "ae.pt is damaged: its archive is not whole"),
        (flipped, r"ae.pt is damaged: its archive is not whole \(ae/data/0\)"),
    ],
)
def test_a_cut_or_a_bit_of_an_archive_is_told(whole: Path, damage: Callable[[bytes], bytes], match: str) -> None:
    whole.write_bytes(damage(whole.read_bytes()))
    with pytest.raises(CorruptData, match=match):
        read_weights(whole)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_tensor_of_strides_that_is_larger_than_its_file_is_refused(tmp_path: Path, device: str) -> None:
    torch.save({"encoder.weight": torch.zeros(1).expand(2, 128, 10**7)}, tmp_path / "ae.pt")
    with pytest.raises(CorruptData, match=r"ae.pt: 'encoder.weight' would take 10.2 GB of a file of [\d.]+ kB"):
        read_weights(tmp_path / "ae.pt", device)


@pytest.mark.parametrize("data", [b"no pickle", b"\x80\x02", b"\x80\x02}q\x00X\xff"])
def test_what_is_no_pickle_of_tensors_is_one_line(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "ae.pt").write_bytes(data)
    with pytest.raises(InputError, match=r"ae.pt is refused: it needs unpickling of more than tensors, or is damaged"):
        read_weights(tmp_path / "ae.pt")
