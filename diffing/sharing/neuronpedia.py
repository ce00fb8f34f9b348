"""A run as Neuronpedia's public exports have it, one source for each model of the pair.

    FOLDER/MODEL/SOURCE/{features,activations,explanations}/batch-N.jsonl.gz   1,024 latents a batch, by number
    FOLDER/MODEL/SOURCE/{model,release,sourceset,source}.jsonl

Features are all latents. The latents that have examples also have activations, an explanation, and of their model the
decoder (`vector`) and the tokens of largest and smallest logit. Fields: `FEATURE`, `ACTIVATION`, `EXPLANATION`, the
lists of Neuronpedia's own script (export-data.py of hijohnnylin/neuronpedia), with what is left empty.
"""

import datetime
import gzip
import hashlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int

from crosscoders.activations.cache import ActivationCache
from crosscoders.common.files import write_bytes
from crosscoders.dictionary import selection
from crosscoders.dictionary.crosscoder import Crosscoder
from crosscoders.models.pair import ModelPair
from crosscoders.models.points import layer_of
from crosscoders.models.resume import read_out
from crosscoders.text.decoding import token_text
from diffing.explorer.pages import HISTOGRAM_TOKENS, N_BINS, Evidence
from diffing.latents.latent_scaling import MODELS
from diffing.report.data import finite

BATCH = 1024
N_TOKENS = 10
"""Tokens of largest logit, and as many of smallest."""
CREATOR = "clkht01d40000jv08hvalcvly"
"""Id of the user to whom a local Neuronpedia gives what it imports."""
FEATURE: dict[str, Any] = {
    "modelId": "", "layer": "", "index": "", "maxActApprox": 0.0, "creatorId": CREATOR, "frac_nonzero": 0.0,
    "freq_hist_data_bar_heights": [], "freq_hist_data_bar_values": [], "logits_hist_data_bar_heights": [],
    "logits_hist_data_bar_values": [], "neuron_alignment_indices": [], "neuron_alignment_l1": [],
    "neuron_alignment_values": [], "correlated_neurons_indices": [], "correlated_neurons_l1": [],
    "correlated_neurons_pearson": [], "decoder_weights_dist": [], "neg_str": [], "neg_values": [], "pos_str": [],
    "pos_values": [], "sourceSetName": "", "topkCosSimIndices": [], "topkCosSimValues": [], "vector": [],
    "vectorLabel": None, "hookName": None, "vectorDefaultSteerStrength": None, "hasVector": False,
}  # fmt: skip
ACTIVATION: dict[str, Any] = {
    "id": "", "modelId": "", "layer": "", "index": "", "creatorId": CREATOR, "dataSource": None, "tokens": [],
    "maxValue": 0.0, "minValue": 0.0, "values": [], "maxValueTokenIndex": 0, "dfaValues": [], "dfaMaxValue": None,
    "dfaTargetIndex": None, "binContains": None, "binMin": None, "binMax": None,
}  # fmt: skip
EXPLANATION: dict[str, Any] = {
    "id": "", "modelId": "", "layer": "", "index": "", "authorId": CREATOR, "description": "", "embedding": None,
    "typeName": None, "explanationModelName": None, "umap_x": 0.0, "umap_y": 0.0, "umap_cluster": 0,
    "umap_log_feature_sparsity": 0.0,
}  # fmt: skip


class Source(NamedTuple):
    """Where the features of one model belong."""

    model: str
    """Id of the model."""
    name: str
    """Id of the source: layer and source set."""
    source_set: str

    def of(self, latent: int) -> dict[str, Any]:
        """Return the fields that say which feature a row is about."""
        return {"modelId": self.model, "layer": self.name, "index": str(latent)}

    def id(self, *parts: object) -> str:
        """Return an id in the form of a cuid, the same for the same row."""
        text = "/".join(map(str, (self.model, self.name, *parts)))
        return f"c{hashlib.sha256(text.encode()).hexdigest()[:24]}"


def write_neuronpedia(
    folder: Path,
    evidence: Evidence,
    crosscoder: Crosscoder,
    cache: ActivationCache,
    pair: ModelPair,
    *,
    source_set: str,
    creator: str,
) -> list[Source]:
    """Write the folder and return its sources; `pair` holds whole models."""
    hook_point = cache.manifest["hook_point"]
    counts = histograms(crosscoder, cache, evidence)
    described = [latent for latent in sorted(evidence.run.examples) if evidence.run.examples[latent]]
    decoder = crosscoder.fold().W_dec.detach()
    sources = []
    for m, model in enumerate(model_ids((pair.info.base, pair.info.adapter or pair.info.tuned))):
        source = Source(model, f"{layer_of(hook_point)}-{source_set}", source_set)
        at = folder / source.model / source.name
        vectors = decoder[described, m]
        effects = dict(zip(described, logit_effects(pair, m, vectors), strict=True))
        features = []
        for latent, row in sorted(evidence.row_of.items()):
            feature = FEATURE | source.of(latent) | _firing(evidence, row, counts[latent]) | effects.get(latent, {})
            if latent in effects:
                strength = {"hookName": hook_point, "vectorDefaultSteerStrength": feature["maxActApprox"]}
                vector = [round(value, 6) for value in decoder[latent, m].tolist()]
                feature |= {"vector": vector, "hasVector": True, **strength}
            features.append(feature | {"sourceSetName": source_set})
        write_batches(at / "features", features)
        write_batches(
            at / "activations", [row for latent in described for row in activations(evidence, latent, source)]
        )
        write_batches(at / "explanations", [explanation(evidence, latent, source) for latent in described])
        for name, place in _places(evidence, pair, m, source, creator).items():
            write_bytes(at / f"{name}.jsonl", _line(place))
        sources.append(source)
    return sources


def model_ids(names: tuple[str, str]) -> list[str]:
    """Return an id for each model: the last part of its name, of which two that are the same get their side."""
    ids = [re.sub(r"[^a-z0-9_-]+", "-", Path(name).name.lower()).strip("-") or side
           for name, side in zip(names, MODELS, strict=True)]  # fmt: skip
    return ids if ids[0] != ids[1] else [f"{name}-{side}" for name, side in zip(ids, MODELS, strict=True)]


@torch.no_grad()
def histograms(crosscoder: Crosscoder, cache: ActivationCache, evidence: Evidence) -> Int[np.ndarray, "latents bins"]:
    """Return how often each latent has an activation in each of equal bins from 0 to its largest in the table, on the
    first tokens of the cache."""
    columns = evidence.run.latents.columns
    largest = torch.zeros(crosscoder.config.dict_size, dtype=torch.float64)
    largest[columns["latent"]] = torch.tensor(
        [value or 0.0 for value in columns["max_activation"]], dtype=torch.float64
    )
    counts = torch.zeros(crosscoder.config.dict_size * N_BINS, dtype=torch.int64)
    device, gate_at = crosscoder.b_enc.device, crosscoder.gate_at()
    for tokens in cache.batches(4096, 0, min(HISTOGRAM_TOKENS, len(cache))):
        x = tokens.activations.to(device).float()
        active = selection.active(crosscoder.pre_acts(crosscoder.normalise(x)), gate_at)
        latents = active.latents.cpu()
        bins = (active.values.cpu().double() / largest[latents].clamp_min(1e-30) * N_BINS).long().clamp(max=N_BINS - 1)
        counts += torch.bincount(latents * N_BINS + bins, minlength=len(counts))
    return counts.view(-1, N_BINS).numpy()


def _firing(evidence: Evidence, row: int, counts: Int[np.ndarray, " bins"]) -> dict[str, Any]:
    columns = evidence.run.latents.columns
    largest = columns["max_activation"][row] or 0.0
    centres = (np.arange(N_BINS) + 0.5) * largest / N_BINS
    fires = largest > 0
    return {
        "maxActApprox": largest,
        "frac_nonzero": columns["frequency"][row] or 0.0,
        "freq_hist_data_bar_heights": counts.tolist() if fires else [],
        "freq_hist_data_bar_values": [round(float(value), 5) for value in centres] if fires else [],
    }


@torch.no_grad()
def logit_effects(pair: ModelPair, side: int, vectors: Float[torch.Tensor, "latents d_model"]) -> list[dict[str, Any]]:
    """Return the fields about the logits that each decoder gives, read with the model's own final norm and
    unembedding as `diffing lens` reads them."""
    tokenizer: Any = pair.info.tokenizer
    weight = next(pair.models[side].parameters())
    effects = []
    for start in range(0, len(vectors), 64):
        chunk = vectors[start : start + 64].to(weight.device, weight.dtype)
        for logits in read_out(pair.models[side], chunk)[:, : len(tokenizer)].float():
            fields: dict[str, Any] = {}
            for sign, name in ((1, "pos"), (-1, "neg")):
                best = (sign * logits).topk(min(N_TOKENS, len(logits)))
                fields[f"{name}_str"] = [token_text(tokenizer, int(token)) for token in best.indices]
                fields[f"{name}_values"] = [round(sign * float(value), 4) for value in best.values]
            heights, edges = np.histogram(logits.cpu().numpy(), bins=N_BINS)
            fields["logits_hist_data_bar_heights"] = heights.tolist()
            fields["logits_hist_data_bar_values"] = [round(float(value), 5) for value in (edges[1:] + edges[:-1]) / 2]
            effects.append(fields)
    return effects


def activations(evidence: Evidence, latent: int, source: Source) -> list[dict[str, Any]]:
    """Return one row per example of a latent."""
    return [
        ACTIVATION
        | source.of(latent)
        | {
            "id": source.id(latent, "activation", number),
            "dataSource": example.group,
            "tokens": example.tokens,
            "values": example.values,
            "maxValue": max(example.values),
            "minValue": min(example.values),
            "maxValueTokenIndex": int(np.argmax(example.values)),
        }
        for number, example in enumerate(evidence.run.examples[latent])
    ]


def explanation(evidence: Evidence, latent: int, source: Source) -> dict[str, Any]:
    """Return the name of a latent from `diffing interpret`, or its verdict and where it fires."""
    columns, row = evidence.run.latents.columns, evidence.row_of[latent]
    name = evidence.interpreted.get(str(latent), {}).get("name")
    context, share = columns["main_context"][row], columns["main_context_share"][row]
    where = f", {share:.0%} of its activation on {context}" if context and share is not None else ""
    described = name or f"{columns['verdict'][row]}{where}"
    return EXPLANATION | source.of(latent) | {"id": source.id(latent, "explanation"), "description": described}


def write_batches(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows by the number of their latent; a batch without any has no file, since an importer reads the columns
    from its first line."""
    batches: dict[int, list[bytes]] = {}
    for row in rows:
        batches.setdefault(int(row["index"]) // BATCH, []).append(_line(row))
    for number, lines in batches.items():
        write_bytes(folder / f"batch-{number}.jsonl.gz", gzip.compress(b"".join(lines), mtime=0))


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(finite(row), allow_nan=False).encode() + b"\n"


def _places(evidence: Evidence, pair: ModelPair, side: int, source: Source, creator: str) -> dict[str, dict[str, Any]]:
    """Return the rows that a feature needs above it: its model, the release, the source set and the source."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    config, info = pair.models[side].config, pair.info
    name = (info.base, info.adapter or info.tuned)[side]
    title = f"Crosscoder of {info.base} and {info.adapter or info.tuned}, {MODELS[side]} side"
    created = {"creatorId": CREATOR, "createdAt": now}
    shown = {"visibility": "PUBLIC", **created}
    release = f"{source.model}-{source.source_set}"
    return {
        "model": {
            "id": source.model, "displayNameShort": source.model, "displayName": source.model, "tlensId": name,
            "dimension": info.d_model, "defaultSourceSetName": None, "defaultSourceId": None,
            "inferenceEnabled": False, "instruct": bool(info.tokenizer.chat_template), "layers": info.n_layers,
            "neuronsPerLayer": int(getattr(config, "intermediate_size", 0) or 0), "owner": creator, "website": None,
            "updatedAt": now, **shown,
        },
        "release": {
            "name": release, "description": title, "descriptionShort": title, "urls": [], "creatorName": creator,
            "creatorNameShort": creator, "creatorEmail": None, "isNewUi": False, "featured": False,
            "defaultSourceSetName": source.source_set, "defaultSourceId": source.name, "defaultUmapSourceIds": [],
            **shown,
        },
        "sourceset": {
            "modelId": source.model, "name": source.source_set, "description": title, "type": "", "urls": [],
            "creatorName": creator, "creatorEmail": None, "releaseName": release, "hasDashboards": True,
            "allowInferenceSearch": False, "defaultRange": 1, "defaultShowBreaks": True, "showDfa": False,
            "showCorrelated": False, "showHeadAttribution": False, "showUmap": False, **shown,
        },
        "source": {
            "id": source.name, "modelId": source.model, "setName": source.source_set, "hasDashboards": True,
            "inferenceEnabled": False, "saelensConfig": None, "saelensRelease": None, "saelensSaeId": None,
            "hfRepoId": None, "hfFolderId": None, "hasUmap": False, "hasUmapLogSparsity": False,
            "hasUmapClusters": False, "num_prompts": None, "num_tokens_in_prompt": None, "dataset": None,
            "notes": f"{evidence.run.latents.n_tokens} tokens", **shown,
        },
    }  # fmt: skip
