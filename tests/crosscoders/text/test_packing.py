"""Packed documents do not run into each other: the next begins with BOS, or EOS stands between."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Pair
from transformers import AutoTokenizer

from crosscoders import InputError
from crosscoders.text.packing import separated
from crosscoders.text.settings import DataConfig
from crosscoders.text.tokens import Rows, tokenize_documents
from diffing.null.models import text_rows

TEXTS = ["the first name", "A second file", "third size"]


@pytest.fixture
def without_bos(pair: Pair) -> Any:
    """A tokenizer as Qwen's: EOS, and no BOS."""
    from tokenizers import processors

    tokenizer = AutoTokenizer.from_pretrained(pair.tuned)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    tokenizer.bos_token = None
    return tokenizer


def rows_of(tokenizer: Any, path: Path, texts: list[str]) -> Rows:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    length = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    return tokenize_documents(DataConfig(data=str(path), n_tokens=length, shuffle_documents=0, skip_first=0), tokenizer)


def test_eos_stands_between_documents_where_there_is_no_bos(without_bos: Any, tmp_path: Path) -> None:
    rows = separated(rows_of(without_bos, tmp_path / "d.jsonl", TEXTS), without_bos)
    assert without_bos.decode(rows.ids.tolist()) == "<eos>".join(TEXTS)
    assert not rows.scored[rows.ids == 1].any() and rows.scored[rows.ids != 1].all()
    spans = [rows.ids[i:j].tolist() for i, j in zip(rows.offsets, rows.offsets[1:], strict=False)]
    assert [without_bos.decode(span) for span in spans] == ["the first name<eos>", "A second file<eos>", "third size"]
    whole = rows.packed(1, 8)
    assert whole.n_scored == int(whole.scored.sum()) == int((rows.ids[:8] != 1).sum())


def test_a_document_that_ends_with_eos_gets_no_second_one(without_bos: Any, tmp_path: Path) -> None:
    texts = ["one<eos>", "two", "three"]
    rows = separated(rows_of(without_bos, tmp_path / "d.jsonl", texts), without_bos)
    assert without_bos.decode(rows.ids.tolist()) == "one<eos>two<eos>three"


def test_documents_with_bos_are_left_as_they_are(pair: Pair, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pair.tuned)
    rows = rows_of(tokenizer, tmp_path / "d.jsonl", TEXTS)
    assert np.array_equal(separated(rows, tokenizer).ids, rows.ids)
    assert tokenizer.decode(rows.ids.tolist()) == "".join(f"<bos>{text}" for text in TEXTS)


def test_documents_that_nothing_can_separate_are_refused(without_bos: Any, tmp_path: Path) -> None:
    rows = rows_of(without_bos, tmp_path / "d.jsonl", TEXTS)
    without_bos.eos_token = None
    with pytest.raises(InputError, match="the tokenizer has no EOS to put between packed documents"):
        separated(rows, without_bos)


def test_a_placebo_reads_the_same_borders(without_bos: Any, pair: Pair, tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    n = len(separated(rows_of(without_bos, data, TEXTS), without_bos).ids)
    assert without_bos.decode(text_rows(without_bos, str(data), n, 1)[0].tolist()) == "<eos>".join(TEXTS)
    with_bos = text_rows(AutoTokenizer.from_pretrained(pair.tuned), str(data), 10, 1000)
    assert with_bos[0, 0] == 2 and not (with_bos == 1).any()
