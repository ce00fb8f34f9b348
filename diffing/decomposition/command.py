"""`diffing decompose`, as a function of its settings that returns a JSON object.

Models and sites are checked, the KL that embeddings and the like keep is measured, the pieces are trained (or a run
goes on), and what they do is read on held-out documents beside the baselines.
"""

import time
from pathlib import Path
from typing import Any

import torch

from crosscoders.common import files
from crosscoders.common.checks import config_of, to_dict
from crosscoders.common.progress import say
from crosscoders.common.provenance import environment
from crosscoders.common.results import result, say_closing
from crosscoders.models.pair import inspect_pair
from crosscoders.models.skeleton import skeleton
from crosscoders.text.tokens import tokenize_prompt
from crosscoders.training.checkpoint import start_run
from diffing.decomposition.build import fresh
from diffing.decomposition.graph import prompt_graph, write_graph
from diffing.decomposition.language import Kept, deltas_of, kept, problem_of
from diffing.decomposition.loop import train
from diffing.decomposition.model import Decomposition
from diffing.decomposition.report import report, summary
from diffing.decomposition.saving import DESCRIPTION, load_, read_description, save
from diffing.decomposition.settings import DecomposeSettings, DecompositionConfig
from diffing.decomposition.sites import Delta, find_sites
from diffing.topk_lora.distil import PLACES, Setting, contents, open_setting

READOUT_ONLY = ("out", "compare", "top", "device", "prompt", "attack_steps")
"""Settings that may differ when a run goes on."""


def decompose(settings: DecomposeSettings) -> dict[str, Any]:
    """Run `diffing decompose`."""
    started, out = time.perf_counter(), Path(settings.out)
    for other in settings.compare:
        read_description(Path(other))
    config = config_of(DecompositionConfig, settings)
    info = inspect_pair(settings.base, settings.tuned, ["blocks.0.hook_resid_post"])
    find_sites(skeleton(settings.base if info.adapter else settings.tuned), settings.sites)
    setting = open_setting(settings)
    deltas = deltas_of(setting.base, setting.tuned, settings.sites)
    device = next(setting.tuned.parameters()).device
    with files.exclusive(out):
        inputs = _inputs(settings, setting)
        start_run(out, settings, inputs, environment(settings.device), "decompose", (*READOUT_ONLY, *PLACES))
        decomposition = fresh(setting.tuned, deltas, config, is_relative=True).to(device)
        of_rest = kept(setting, decomposition)
        say(kept_line(of_rest, len(deltas)))
        if (out / DESCRIPTION).is_file():
            say(f"{out} is complete already")
            load_(decomposition, out)
        else:
            train(problem_of(setting, decomposition, config.seed), config, out)
            save(decomposition, out, config, inputs)
        others = [_other(setting, deltas, Path(other)) for other in settings.compare]
        read = report(setting, decomposition, deltas, of_rest, others, settings)
        read.table.to_parquet(out / "pieces.parquet")
        files.write_json(out / "eval.json", {"rows": read.rows, "pieces": read.pieces})
        if settings.prompt is not None:
            ids = torch.tensor([tokenize_prompt(setting.tokenizer, settings.prompt)]).to(device)
            graph = prompt_graph(decomposition, ids, setting.tokenizer)
            write_graph(graph, decomposition.names, out / "graph.html")
    say_closing(started, f"pieces in {out / DESCRIPTION}, read-outs in {out / 'eval.json'}")
    return result("decompose", to_dict(settings), read.rows) | {"pieces": read.pieces, "text": summary(read)}


def _inputs(settings: DecomposeSettings, setting: Setting) -> dict[str, Any]:
    """Return what identifies models and tokens, wherever they lie."""
    names = {"base": {"name": settings.base}, "tuned": {"name": settings.tuned}}
    hashes = contents(settings, setting.rows, setting.train_rows)
    return {part: names.get(part, {}) | {"hash": value} for part, value in hashes.items()}


def _other(setting: Setting, deltas: dict[str, Delta], folder: Path) -> Decomposition:
    config, _ = read_description(folder)
    decomposition = fresh(setting.tuned, deltas, config, is_relative=True)
    load_(decomposition, folder)
    return decomposition.to(next(setting.tuned.parameters()).device)


def kept_line(of_rest: Kept, n_sites: int) -> str:
    """Say what there is to explain."""
    return (
        f"KL(tuned || base) {of_rest.base:.3f} nats/token, of which {of_rest.explainable:.3f} to explain by {n_sites} "
        f"sites; embeddings, norms, biases and other maps alone cause {of_rest.rest:.3f}, and stay tuned throughout"
    )
