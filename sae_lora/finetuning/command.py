"""`sae-lora finetune-sae`: SAE and model -> a folder in SAELens's layout, with finetune.json beside the weights."""

import shutil
import time
from pathlib import Path
from typing import Any

from crosscoders.common import files
from crosscoders.common.checks import to_dict
from crosscoders.common.devices import choose_device
from crosscoders.common.errors import InputError
from crosscoders.common.progress import say
from crosscoders.common.results import result, row, say_closing
from crosscoders.models.names import hash_model
from sae_lora.dictionaries.loading import read_dictionary
from sae_lora.finetuning.layout import as_sae_lens
from sae_lora.finetuning.settings import FinetuneSaeSettings
from sae_lora.finetuning.training import activation_blocks, finetune_sae, require_a_step
from sae_lora.fitting.inputs import load_model, make_plan

FORMAT, FORMAT_VERSION = "model-diffing/finetuned-sae", 1


def finetune_sae_command(settings: FinetuneSaeSettings) -> dict[str, Any]:
    """Run `sae-lora finetune-sae`.

    Raises:
        InputError: a dictionary of another width or place, no data, an `out` that is there already.
    """
    started, out = time.perf_counter(), Path(settings.out)
    if out.exists() and any(out.iterdir()) and not settings.overwrite:
        raise InputError(f"{settings.out!r} is there already. Name another folder, or say --overwrite.")
    plan = make_plan(settings, settings.model, [(settings.sae, settings.hook_point)], foreign=True)
    require_a_step(plan.rows.n_scored, settings.batch_tokens)
    device = choose_device(settings.device)
    source = read_dictionary(plan.infos[0])
    sae = as_sae_lens(source).to(device)
    n_tokens = plan.rows.n_scored
    say(f"fine-tune {settings.sae} at {sae.hook_point} to {settings.model}: {n_tokens:,} tokens, to {out}")
    model = load_model(plan, settings, device)
    tuned = finetune_sae(sae, activation_blocks(plan, model, settings, device), n_tokens, settings)
    n = tuned.before.n_tokens
    rows = [row("finetune-sae.tokens", tuned.n_tokens, "tokens", tuned.n_tokens)]
    for name, evaluation in (("before", tuned.before), ("after", tuned.after)):
        rows.append(row(f"finetune-sae.{name}.fve", evaluation.fve[0], "fraction", n))
        rows.append(row(f"finetune-sae.{name}.l0", evaluation.l0, "latents/token", n))
    described = {
        "format": FORMAT, "format_version": FORMAT_VERSION, **result("finetune-sae", to_dict(settings), rows),
        "sae": source.identity(), "model": {"name": plan.model, "hash": hash_model(plan.model)},
        "tokens": {"hash": plan.token_hash(), "n": n_tokens},
    }  # fmt: skip
    _publish(sae, settings, out, described)
    say_closing(started, f"twin in {out}")
    say(f"next: diffing sae --sae {settings.sae} --tuned-sae {settings.out} ...")
    before, after = tuned.before, tuned.after
    text = (
        f"FVE {before.fve[0]:.3f} -> {after.fve[0]:.3f}, L0 {before.l0:.1f} -> {after.l0:.1f} ({n:,} tokens held out)"
    )
    return described | {"text": text}


def _publish(sae: Any, settings: FinetuneSaeSettings, out: Path, described: dict[str, Any]) -> None:
    """Write the folder beside its place, then move it there whole."""
    making = out.with_name(f".{out.name}.making")
    shutil.rmtree(making, ignore_errors=True)
    sae.sae.cfg.metadata.model_name = settings.model
    sae.sae.cpu().save_model(making)
    files.write_json(making / "finetune.json", described)
    if out.exists():
        shutil.rmtree(out)
    making.rename(out)
