"""Cards of what is pushed to the hub, made from a run: what it is, how to load it, how it was made, figures.

`read_sharing` finds out what a folder holds and which of its files are pushed; `card` writes the text. No path of this
machine gets into a card; of a local folder only its name.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from crosscoders.common.errors import InputError
from crosscoders.common.files import hash_file, read_model
from crosscoders.common.records import Record
from crosscoders.common.results import ResultRecord, row

PLACES = ("out", "cache", "eval_cache", "store", "device", "devices", "overwrite", "resume")
"""Settings of a recipe that say where, not what."""
LOADING = {
    "crosscoder": (
        "from crosscoders import load_crosscoder\n"
        'crosscoder = load_crosscoder("{repo}")\n'
        "latents = crosscoder.encode(x)  # x: (tokens, 2, d_model) at {place}, base first, then tuned"
    ),
    "sae": (
        "from sae_lora import load_dictionary\n"
        'sae = load_dictionary("{repo}")\n'
        "latents = sae.encode(x)  # x: (tokens, d_model) at {place}"
    ),
    "adapter": (
        "from sae_lora import load_corrector, load_dictionary, splice\n"
        "dictionaries = [{dictionaries}]\n"
        'fitted = load_corrector(model, "{repo}", dictionaries)  # model: {base}, of transformers'
    ),
    "topk-lora": (
        "from transformers import AutoModelForCausalLM\n"
        "from sae_lora.lora.topk import TopKLoRA\n"
        'adapter = TopKLoRA.load(AutoModelForCausalLM.from_pretrained("{base}"), "{repo}")'
    ),
}
TITLES = {
    "crosscoder": "Crosscoder of {base} and {tuned}",
    "sae": "SAE {sae}, fine-tuned to {base}",
    "adapter": "{corrector} around a dictionary in {base}",
    "topk-lora": "TopKLoRA: {tuned} as sparse directions on {base}",
}


class Sharing(NamedTuple):
    """The files of a folder that are pushed, and what their card says."""

    kind: str
    """crosscoder, sae, adapter or topk-lora."""
    files: list[Path]
    names: dict[str, str]
    """base, tuned and the like, as they are loaded."""
    recipe: dict[str, Any]
    rows: list[dict[str, Any]]


def read_sharing(folder: Path) -> Sharing:
    """Find out what a folder holds.

    Raises:
        InputError: nothing that is pushed.
        CorruptData: a file of it cannot be read.
    """
    adapter = folder / "adapter" if (folder / "adapter").is_dir() else folder
    rows = read_model(folder / "eval.json", ResultRecord)["rows"] if (folder / "eval.json").is_file() else []
    run = read_model(folder / "run.json", Record) if (folder / "run.json").is_file() else {}
    if (folder / "topk-run.json").is_file():
        recipe = read_model(folder / "topk-run.json", Record)["config"]
        names = {key: str(recipe[key]) for key in ("base", "tuned")}
        return Sharing("topk-lora", _files(adapter, "topk_lora.json", "topk_lora.safetensors", "adapter_config.json")
                       + _files(folder, "directions.parquet"), names, recipe, rows)  # fmt: skip
    if (folder / "finetune.json").is_file():
        made = read_model(folder / "finetune.json", Record)
        place = read_model(folder / "cfg.json", Record).get("metadata", {}).get("hook_name")
        names = {"base": made["model"]["name"], "sae": str(made["config"]["sae"]), "place": str(place)}
        return Sharing(
            "sae", _files(folder, "cfg.json", "sae_weights.safetensors"), names, made["config"], made["rows"]
        )
    if (adapter / "splice.json").is_file():
        splice = read_model(adapter / "splice.json", Record)
        paths = ", ".join(f'load_dictionary("{_named(entry["path"])}")' for entry in splice["dictionaries"])
        names = {"base": splice["model"]["name"], "dictionaries": paths, "corrector": splice["corrector"]}
        parts = ("splice.json", "adapter_config.json", "adapter_model.safetensors", "corrector.safetensors")
        return Sharing("adapter", _files(adapter, *parts), names, run.get("config", {}), rows)
    if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
        cache = run.get("inputs", {}).get("cache") or {}
        names = {side: str((cache.get(side) or {}).get("name", side)) for side in ("base", "tuned")}
        names["place"] = str(cache.get("hook_point", "the hook point"))
        recipe = {**run.get("config", {}), "cache_tokens": cache.get("n_tokens"), "hook_point": names["place"]}
        return Sharing("crosscoder", _files(folder, "latents.parquet"), names, recipe, rows + _evidence(folder))
    raise InputError(
        f"{str(folder)!r} holds nothing to push: no crosscoder, SAE of `sae-lora finetune-sae`, adapter of `sae-lora "
        "fit` or run of `diffing topk-lora fit`. Name such a folder once it is finished."
    )


def card(shared: Sharing, repo: str) -> str:
    """Return the text of README.md."""
    names = {key: value if key == "dictionaries" else _named(value) for key, value in shared.names.items()}
    of_hub = [name for key, name in shared.names.items() if key in ("base", "tuned") and _is_of_hub(name)]
    models = "".join(f"\n- {name}" for name in of_hub)
    recipe = _without_paths({key: value for key, value in shared.recipe.items() if key not in PLACES})
    return f"""---
library_name: model-diffing
tags: [{shared.kind}, model-diffing]
{f"base_model:{models}" + chr(10) if of_hub else ""}---
# {TITLES[shared.kind].format(**names)}

## Load

```python
{LOADING[shared.kind].format(repo=repo, **names)}
```

## Figures

{_figures(shared.rows)}

## Recipe

```json
{json.dumps(recipe, indent=1)}
```
"""


def _files(folder: Path, *names: str) -> list[Path]:
    return [folder / name for name in names if (folder / name).is_file()]


def _evidence(folder: Path) -> list[dict[str, Any]]:
    """Return the count of each verdict of a latent table, and the shares of KL closed that are about this table."""
    if not (folder / "latents.json").is_file():
        return []
    words: list[str] = read_model(folder / "latents.json", Record)["columns"]["verdict"]
    rows = [row(f"verdict.{word}", words.count(word), "latents", len(words)) for word in sorted(set(words))]
    causal = read_model(folder / "causal.json", Record) if (folder / "causal.json").is_file() else {}
    if causal.get("latents") != hash_file(folder / "latents.json"):
        return rows
    return rows + [
        entry
        for entry in causal["rows"]
        if re.fullmatch(r"causal\.\w+\.(all|top_\d+\.\w+)\.share_closed", entry["name"])
    ]


def _figures(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "None: the run has not been evaluated."
    lines = ["| figure | value | 95% interval | n | unit |", "|---|---|---|---|---|"]
    for entry in rows:
        low, high = entry.get("low"), entry.get("high")
        value = "not defined" if entry["value"] is None else f"{entry['value']:.4g}"
        interval = "" if low is None or high is None else f"{low:.4g} to {high:.4g}"
        lines.append(f"| {entry['name']} | {value} | {interval} | {entry['n']:,} | {entry['unit']} |")
    return "\n".join(lines)


def _is_of_hub(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()


def _named(name: str) -> str:
    """Return a name of the hub as it is, and of a path its last part."""
    return Path(name).name if Path(name).is_absolute() or name.startswith((".", "~")) or Path(name).exists() else name


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    return _named(value) if isinstance(value, str) and "/" in value else value
