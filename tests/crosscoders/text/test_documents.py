"""Documents: every format, mixing, shuffling, and one line for what is wrong with data."""

import gzip
import json
import random
from pathlib import Path

import pytest
from conftest import TEXTS, Pair

from crosscoders import CacheConfig, DataSource, InputError
from crosscoders.text.documents import Document, read_documents, read_source, shuffled


def refuse(config: CacheConfig, match: str) -> None:
    from crosscoders import cache_activations

    with pytest.raises(InputError, match=match):
        cache_activations(config)


def contents(path: Path, **settings: str) -> list[object]:
    return [document.content for document in read_source(DataSource(path=str(path), **settings))]


def test_text_jsonl_gzip_parquet_and_folders_give_the_same_documents(tmp_path: Path) -> None:
    import pandas

    texts = ["One document.", "Another\none.", "Third."]
    lines = "".join(json.dumps({"text": t}) + "\n" for t in texts)
    (tmp_path / "a.txt").write_text("\n\n".join(texts) + "\n\n \n")
    (tmp_path / "b.jsonl").write_text(lines + "\n")
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write(lines)
    pandas.DataFrame({"text": texts}).to_parquet(tmp_path / "d.parquet")
    for name in ("a.txt", "b.jsonl", "c.jsonl.gz", "d.parquet"):
        assert [str(c).strip() for c in contents(tmp_path / name)] == texts, name
    assert len(contents(tmp_path)) == 12


def test_a_datasets_id_is_read_by_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(path: str, name: str | None, **settings: object) -> list[dict[str, str]]:
        asked.append((path, name, settings))
        return [{"text": "from the hub"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [d for d in read_source(DataSource(path="owner/set", name="en", split="test"))] == [
        Document("from the hub", "owner/set", "row 1 of 'owner/set'")
    ]
    assert asked == [("owner/set", "en", {"split": "test", "streaming": True})]


def test_sources_are_mixed_by_tokens_in_proportion_to_their_weights(tmp_path: Path) -> None:
    for name, n in (("a", 400), ("b", 400)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": f"{name}{i}"}) + "\n" for i in range(n)))
    sources = [DataSource(path=str(tmp_path / "a.jsonl")), DataSource(path=str(tmp_path / "b.jsonl"), weight=3.0)]
    cost = random.Random(0)
    costs = {f"{name}{i}": cost.randint(1, 9) for name in "ab" for i in range(400)}
    mixed = read_documents(sources, shuffle_window=0, seed=0, count_tokens=lambda d: costs[str(d.content)])
    spent = {"a": 0, "b": 0}
    for _, document in zip(range(300), mixed, strict=False):
        spent[document.group] += costs[str(document.content)]
    assert 2.9 < spent["b"] / spent["a"] < 3.1


def test_shuffling_is_a_function_of_the_seed_and_loses_nothing() -> None:
    documents = [Document(str(i), "g") for i in range(10)]
    once, again = (list(shuffled(documents, 4, "0")) for _ in range(2))
    assert once == again != documents and sorted(once) == documents
    assert list(shuffled(documents, 0, "0")) == documents


def test_a_missing_column_is_named_with_those_that_are_there(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"txt": "a", "id": 1}\n')
    refuse(
        pair.config(tmp_path / "c", data=str(tmp_path / "d.jsonl")),
        r"row 1 of .* has no column 'text' and no 'messages'; its columns are id, txt; did you mean 'txt'\? Set text",
    )


@pytest.mark.parametrize(
    "name, text, match",
    [
        ("e.jsonl", "", "the data holds no text"),
        ("e.jsonl", '{"text": "  "}\n', "the data holds no text"),
        ("e.jsonl", '{"text": "a"\n', "line 1 of .* is not JSON"),
        ("e.jsonl", "[1]\n", "line 1 of .* is not a JSON object"),
        ("e.jsonl", '{"messages": [{"role": "user"}]}\n', "column 'messages' in row 1 of .* is not a list of"),
        ("e.csv", "a,b\n", "is of no known kind; use one of .txt"),
    ],
)
def test_empty_or_broken_data_is_refused(pair: Pair, tmp_path: Path, name: str, text: str, match: str) -> None:
    (tmp_path / name).write_text(text)
    refuse(pair.config(tmp_path / "c", data=str(tmp_path / name)), match)


def test_data_that_is_not_there_or_too_short_is_refused(pair: Pair, tmp_path: Path) -> None:
    refuse(pair.config(tmp_path / "c", data=str(tmp_path / "no.jsonl")), "no.jsonl' does not exist. Check the path")
    (tmp_path / "s.jsonl").write_text(json.dumps({"text": TEXTS[0]}) + "\n")
    refuse(
        pair.config(tmp_path / "c", data=str(tmp_path / "s.jsonl")),
        r"has only \d+ scored tokens in 1 documents but n_tokens is 600. Set --n-tokens \d+, or add data",
    )


def test_files_that_are_not_what_they_claim_name_file_and_row(pair: Pair, tmp_path: Path) -> None:
    for name, data, match in [
        ("l.txt", "café".encode("latin-1"), "l.txt' cannot be read as its name says"),
        ("b.jsonl.gz", b"not gzip", "b.jsonl.gz' cannot be read as its name says"),
        ("p.parquet", b"not parquet", "p.parquet' cannot be read as its name says"),
        ("n.jsonl", b'{"text": "a"}\n{"text": 5}\n', "row 2 of .*n.jsonl' holds 5, not text"),
        ("s.jsonl", b'{"text": "\\ud800"}\n', "row 1 of .*s.jsonl'.* half a character"),
        ("m.jsonl", b'{"messages": []}\n', "row 1 of .*m.jsonl' is not a list of"),
        ("t.jsonl", b'{"text": "a", "group": "template"}\n', "is the name of chat-template tokens"),
    ]:
        (tmp_path / name).write_bytes(data)
        refuse(pair.config(tmp_path / "c", data=str(tmp_path / name)), match)
