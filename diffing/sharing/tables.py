"""Every table of a run folder as a data frame: `read_tables`, and `write_tables` as CSV or Parquet.

The JSON files that commands write hold tables in few forms, which are told apart by their shape alone, so that a file
of a later command is exported too:

    columns: {name: [...]}                 NAME of the file
    rows: [{...}], and any list of objects NAME for `rows`, else NAME-key
    {key: [{...}]}, such as examples       NAME-key, the inner key in a column of its own
    {key: {...}}, such as interpretations  NAME-key, likewise
"""

import io
import json
from pathlib import Path
from typing import Any

import pandas

from crosscoders.common.errors import InputError
from crosscoders.common.files import read_model, write_bytes
from crosscoders.common.records import Record

LEFT_OUT = ("report", "config", "run", "manifest")
"""Files that hold no table, or other tables again."""
NO_TABLE = ("config", "environment", "inputs", "provenance", "files")
"""Keys of a file that say where it comes from."""
FOLDERS = ("adapter", "step-*", "seed-*", "cache*", "*-cache")
"""Folders inside a run that hold no table."""


def read_tables(run: Path) -> dict[str, pandas.DataFrame]:
    """Return the tables of a run folder and of those directly inside it, by name; of those inside it after the name of
    the folder and a dot.

    Raises:
        InputError: it is no folder, or holds no table.
        CorruptData: a file of it cannot be read.
    """
    if not run.is_dir():
        raise InputError(f"{str(run)!r} is not a folder. Name a run folder.")
    inside = sorted(path for path in run.iterdir() if path.is_dir() and not any(path.match(p) for p in FOLDERS))
    tables: dict[str, pandas.DataFrame] = {}
    for folder in (run, *inside):
        prefix = "" if folder is run else f"{folder.name}."
        for path in sorted(folder.iterdir()):
            if path.stem not in LEFT_OUT and path.is_file():
                tables |= {f"{prefix}{name}": table for name, table in _of_file(path).items()}
    if not tables:
        raise InputError(f"{str(run)!r} holds no table yet. Run: diffing scale {run}")
    return tables


def write_tables(tables: dict[str, pandas.DataFrame], folder: Path, kind: str) -> list[Path]:
    """Write each table into a file of its own and return the files; kind: csv or parquet. Lists and objects in a cell
    are JSON text."""
    paths = []
    for name, table in tables.items():
        flat = table.copy()
        for column in flat.columns[[not pandas.api.types.is_numeric_dtype(dtype) for dtype in flat.dtypes]]:
            flat[column] = _plain(flat[column])
        data = io.BytesIO()
        if kind == "csv":
            flat.to_csv(data, index=False)
        else:
            flat.to_parquet(data, index=False)
        paths.append(folder / f"{name}.{kind}")
        write_bytes(paths[-1], data.getvalue())
    return paths


def _of_file(path: Path) -> dict[str, pandas.DataFrame]:
    if path.suffix == ".parquet" and path.name != "latents.parquet":  # latents.json is the same table
        return {path.stem: pandas.read_parquet(path).reset_index()}
    if path.suffix == ".json":
        has_twin = path.stem != "latents" and path.with_suffix(".parquet").is_file()
        return _of_json(path, "-rows" if has_twin else "")
    if path.name == "train.jsonl":
        lines = [_object(line) for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
        return {"train": pandas.DataFrame([line for line in lines if line])}
    return {}


def _object(line: str) -> dict[str, Any]:
    """Return the object of a line; none of a line that a killed run left half."""
    try:
        return dict(json.loads(line))
    except ValueError:
        return {}


def _of_json(path: Path, rows: str = "") -> dict[str, pandas.DataFrame]:
    """Return the tables of one JSON file; rows: what is added to its name for its rows."""
    tables = {}
    # half of a surrogate pair, which a token may be, is no UTF-8
    content = json.loads(json.dumps(read_model(path, Record), ensure_ascii=False).encode("utf-8", "replace"))
    for key, value in content.items():
        table = None if key in NO_TABLE else _of_value(key, value, content)
        if table is not None and len(table):
            tables[path.stem + {"columns": "", "rows": rows}.get(key, f"-{key}")] = table
    return tables


def _of_value(key: str, value: Any, content: dict[str, Any]) -> pandas.DataFrame | None:
    if key == "columns":
        return pandas.DataFrame(value)
    if isinstance(value, list):
        return pandas.DataFrame(value) if all(isinstance(item, dict) for item in value) else None
    if not (isinstance(value, dict) and value):
        return None
    inner, kinds = key.removesuffix("s"), {type(item) for item in value.values()}
    if kinds == {dict}:
        return pandas.DataFrame([{inner: name, **item} for name, item in value.items()])
    if kinds != {list}:
        return None
    if all(isinstance(item, dict) for items in value.values() for item in items):
        inner = "of" if any(inner in item for items in value.values() for item in items) else inner
        return pandas.DataFrame([{inner: name, **item} for name, items in value.items() for item in items])
    names = content.get("places")  # of positions.json
    if names is not None and {len(items) for items in value.values()} == {len(names)}:
        table = pandas.DataFrame.from_dict(value, orient="index", columns=names)
        return table.rename_axis("latent").reset_index()
    return None


def _plain(column: "pandas.Series[Any]") -> list[Any]:
    """Return cells as one type, which a column of Parquet has to have: text where any of them is none of a number."""
    cells = [json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value for value in column]
    if any(isinstance(value, str) for value in cells):
        missing = [value is None or value != value for value in cells]
        return [None if gone else str(value) for gone, value in zip(missing, cells, strict=True)]
    return cells
