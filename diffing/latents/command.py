"""What the commands of `diffing` do, each as one function of its settings that returns a JSON object."""

import shlex
import time
from typing import Any

from crosscoders.common import files, memory
from crosscoders.common.checks import to_dict
from crosscoders.common.progress import say
from crosscoders.common.results import result, row, say_closing
from crosscoders.dictionary.health import warning
from diffing.latents.contexts import MAX_GROUPS, OTHER, n_folded
from diffing.latents.nulls import NULL, counts_beside, read_nulls
from diffing.latents.readable import run_reasons
from diffing.latents.records import TwinRecord
from diffing.latents.runs import open_run_and_cache
from diffing.latents.settings import ScaleSettings, StabilitySettings
from diffing.latents.stability import TOP, read_runs, returns, write_returns
from diffing.latents.stability import stability as survival_rows
from diffing.latents.table import scale_run
from diffing.latents.verdict import VERDICTS


def scale(settings: ScaleSettings) -> dict[str, Any]:
    """Run `diffing scale`."""
    started = time.perf_counter()
    run, cache = open_run_and_cache(settings.run, settings.cache)
    n_bytes = sum(file.stat().st_size for file in run.glob("*.safetensors"))
    need = memory.Need(memory.PROCESS_BYTES + 2 * n_bytes)  # weights are checked and read from the mapped file
    needed = memory.require([need], "Free some.", force=True)
    n_tokens = min(settings.n_tokens or len(cache), len(cache))
    say(f"scale {run} on {n_tokens:,} tokens of {cache.path}; needs {needed}")
    table = scale_run(run, cache, n_tokens=settings.n_tokens, n_examples=settings.n_examples, device=settings.device)
    counts = {verdict: int((table["verdict"] == verdict).sum()) for verdict in VERDICTS}
    nulls = read_nulls(run)
    beside = {verdict: f" (on nulls: {text})" for verdict, text in counts_beside(nulls).items()}
    words = [f"{verdict} {n}{beside.get(verdict, '')}" for verdict, n in counts.items() if n]
    say(f"{'  '.join(words)}  of {len(table):,} latents")
    if against := run_reasons(run, table):
        say(warning(against))
    if folded := n_folded(cache.manifest["groups"]):
        say(f"{folded:,} groups of documents are counted together as {OTHER!r}; the {MAX_GROUPS} largest are not")
    if not nulls:
        say(f"these counts have no false-positive rate yet: {NULL.format(run=run)}")
    twins = files.read_model(run / "twins.json", TwinRecord)
    if twins["twins"]:
        say(f"{len(twins['twins'])} pairs of twins, a tuned-only and a base-only latent of one direction: twins.json")
    say_closing(started, f"latent table in {run / 'latents.json'}")
    say(f"next: diffing report {shlex.quote(str(run))}")
    rows = [row(f"scale.verdict.{verdict}.count", n, "latents", len(table)) for verdict, n in counts.items()]
    rows.append(row("scale.twins.count", len(twins["twins"]), "pairs", len(table)))
    for name in ("twins", "control"):
        apart = [pair["divergence"] for pair in twins[name]]
        if apart:
            rows.append(row(f"scale.{name}.divergence", sum(apart) / len(apart), "fraction", len(apart)))
    return result("scale", to_dict(settings), rows)


def stability(settings: StabilitySettings) -> dict[str, Any]:
    """Run `diffing stability`; what came back of the first run lies in its stability.json."""
    runs = read_runs(settings.runs)
    rows = survival_rows(runs, seed=settings.seed)
    lines = [f"{entry['name']:<44}{entry['value']:>8.1%}  n {entry['n']:,}" for entry in rows]
    table = returns(runs)
    path = write_returns(settings.runs, table)
    first = runs[0].table.loc[table.index].nsmallest(TOP, "rank")
    lines += [
        "",
        f"first {len(first)} of {settings.runs[0]}: rank, verdict; came back, with the same verdict, in others",
    ]
    for latent, rank, verdict in zip(first.index, first["rank"], first["verdict"], strict=True):
        back, same = table.loc[latent, ["came_back", "same_verdict"]]
        lines.append(f"  {rank:>4}  latent {latent:<7} {verdict:<16} {back} of {len(runs) - 1}, {same}")
    lines.append(f"all latents: {path}")
    return result("stability", to_dict(settings), rows) | {"text": "\n".join(lines)}
