r"""Distil: a TopKLoRA on the base that predicts what the tuned model predicts.

    loss = KL(tuned || base + adapter)
         + hidden_weight   * mean over layers l of  ||x_l^tuned - x_l||^2 / ||x_l^tuned - mean x_l^tuned||^2
         + cutover_weight  * KL(tuned || tuned from layer l on, run on x_l of base + adapter), l random

KL in nats, mean over the predicted scored tokens of a batch. The tuned model's data are not needed: what both models
read may be any text. `distil` trains; `measure` gives the held-out KL and, layer by layer, how far the residual stream
follows: small KL alone can be reached by another route inside, and then the adapter is no diff.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from crosscoders.common import files
from crosscoders.common.errors import InputError
from crosscoders.common.progress import Progress
from crosscoders.models import hooks
from crosscoders.models.names import hash_model, require_two_models
from crosscoders.models.pair import ModelPair, PairInfo, inspect_pair, load_pair
from crosscoders.models.predictions import ce, kl, log_probs
from crosscoders.text.chats import RESPONSE
from crosscoders.text.padding import Batch, pad, padding_id
from crosscoders.text.tokens import Rows, pad_rows, tokenize_documents
from diffing.finetuning import Schedule, finetune
from diffing.topk_lora.settings import DistilConfig, PairData
from sae_lora.lora.settings import TopKLoRAConfig
from sae_lora.lora.topk import TopKLoRA

WARMUP_STEPS = 20
PLACES = ("base", "tuned", "data", "eval_data", "chat_template")
"""Settings that say where models and documents lie, of which `contents` says what they hold."""


class Setting(NamedTuple):
    """Both models and the batches that they read."""

    base: Any
    tuned: Any
    tokenizer: Any
    rows: Rows
    """Of the held-out documents."""
    train_rows: Rows
    train: list[Batch]
    held_out: list[Batch]

    @property
    def points(self) -> list[str]:
        """The residual stream after every layer."""
        return [f"blocks.{layer}.hook_resid_post" for layer in range(len(hooks.decoder_layers(self.base)))]


class Faithfulness(NamedTuple):
    """Sums over the held-out tokens of each document."""

    kl: Float[np.ndarray, "models documents"]
    """KL(tuned || base + adapter) and KL(tuned || base), nats."""
    n_tokens: Float[np.ndarray, " documents"]
    labels: list[str]
    """Group of each document."""
    error: Float[np.ndarray, " layers"]
    """Sum of ||x_tuned - x_adapted||^2 over all tokens, by layer."""
    change: Float[np.ndarray, " layers"]
    """Sum of ||x_tuned - x_base||^2."""
    spread: Float[np.ndarray, " layers"]
    """Sum of ||x_tuned - mean x_tuned||^2."""


def open_setting(config: PairData) -> Setting:
    """Read the documents, then load both models whole.

    Raises:
        InputError: models that do not fit each other or are one, too few tokens.
    """
    info = inspect_pair(config.base, config.tuned, ["blocks.0.hook_resid_post"])
    require_two_models(config.base, config.tuned)
    read = read_batches(config, info)
    pair = load_pair(config.base, config.tuned, "blocks.0.hook_resid_post", device=config.device, info=info, whole=True)
    return setting_of(pair, *read)


def read_batches(config: PairData, info: PairInfo) -> tuple[Rows, Rows, list[Batch], list[Batch]]:
    """Return held-out and training documents, then the batches of training and those held out.

    Raises:
        InputError: too few tokens.
    """
    pad_id = padding_id(info.tokenizer, info.n_ids)

    def batches(rows: Rows) -> list[Batch]:
        return [pad_rows(rows, numbers, pad_id) for numbers in rows.batches(config.batch_rows)]

    rows = train_rows = tokenize_documents(config.data_config(), info.tokenizer)
    train, eval_config = batches(rows), config.eval_config()
    if eval_config is not None:
        rows = tokenize_documents(eval_config, info.tokenizer)
        held_out = batches(rows)
    else:
        n_held_out = max(1, round(config.holdout_share * len(train)))
        train, held_out = train[:-n_held_out], train[-n_held_out:]
    if not train:
        raise InputError(f"{rows.n_scored:,} tokens make one batch; give more text, or lower batch_rows.")
    return rows, train_rows, train, held_out


def contents(config: PairData, rows: Rows, train_rows: Rows) -> dict[str, str]:
    """Return the hashes of both models and of the tokens that are read."""
    tokens = files.hash_json([rows.token_hash(), train_rows.token_hash()])
    return {"base": hash_model(config.base), "tuned": hash_model(config.tuned), "tokens": tokens}


def setting_of(pair: ModelPair, rows: Rows, train_rows: Rows, train: list[Batch], held_out: list[Batch]) -> Setting:
    """Return a loaded pair, whole, with what `read_batches` gives on its device."""
    moved = ([batch.to(pair.device) for batch in part] for part in (train, held_out))
    return Setting(*pair.models, pair.info.tokenizer, rows, train_rows, *moved)


def predicted(batch: Batch) -> Bool[Tensor, "rows positions"]:
    """Return the positions whose next token is scored."""
    return batch.scored[:, 1:]


def logits_at(model: Any, batch: Batch) -> Float[Tensor, "tokens vocab"]:
    """Return the logits that predict the scored tokens."""
    out = model(input_ids=batch.ids, attention_mask=batch.attention_mask, use_cache=False).logits
    return out[:, :-1][predicted(batch)]


def distil_loss(setting: Setting, batch: Batch, config: DistilConfig, generator: torch.Generator) -> Float[Tensor, ""]:
    """Return the loss of the module's docstring on one batch."""
    needs_hidden = config.hidden_weight > 0 or config.cutover_weight > 0
    points = setting.points if needs_hidden else []
    with torch.no_grad(), hooks.capture(setting.tuned, points) as of_tuned:
        log_p = log_probs(logits_at(setting.tuned, batch))
    with hooks.capture(setting.base, points) as of_base:
        log_q = log_probs(logits_at(setting.base, batch))
    loss = kl(log_p, log_q).mean()
    if config.hidden_weight > 0:
        errors = [_normalised_error(of_tuned[point], of_base[point], batch.scored) for point in points]
        loss = loss + config.hidden_weight * torch.stack(errors).mean()
    if config.cutover_weight > 0:
        point = points[int(torch.randint(len(points) - 1, (1,), generator=generator))]
        with hooks.replace(setting.tuned, point, lambda _: of_base[point]):
            log_cut = log_probs(logits_at(setting.tuned, batch))
        loss = loss + config.cutover_weight * kl(log_p, log_cut).mean()
    return loss


def _normalised_error(target: Tensor, x: Tensor, scored: Tensor) -> Float[Tensor, ""]:
    a, b = target[scored].float(), x[scored].float()
    return (a - b).square().sum() / (a - a.mean(dim=0)).square().sum()


def sft_loss(setting: Setting, batch: Batch) -> Float[Tensor, ""]:
    """Return the mean cross-entropy of the response tokens of a batch, nats per token; 0 where it has none."""
    of_response = response_positions(setting.train_rows, batch)[:, 1:]
    logits = setting.base(input_ids=batch.ids, attention_mask=batch.attention_mask, use_cache=False).logits[:, :-1]
    losses = ce(log_probs(logits[of_response]), batch.ids[:, 1:][of_response])
    return losses.sum() / max(1, len(losses))


def response_positions(rows: Rows, batch: Batch) -> Bool[Tensor, "rows seq"]:
    """Return which tokens of a batch stand in a response."""
    roles = pad([rows.roles[rows.offsets[i] : rows.offsets[i + 1]] for i in batch.numbers], 0, torch.uint8)
    return (roles == RESPONSE).to(batch.ids.device) & batch.scored


def distil(setting: Setting, config: DistilConfig, *, name: str = "topk-lora") -> TopKLoRA:
    """Attach a fresh adapter to the base and train it; it is in evaluation mode afterwards.

    Raises:
        CorruptData: the loss is not finite.
    """
    adapter_config = TopKLoRAConfig(**{key: getattr(config, key) for key in TopKLoRAConfig.__dataclass_fields__})
    setting.tuned.requires_grad_(False)
    adapter = TopKLoRA.attach(setting.base, adapter_config)
    generator, revival = (torch.Generator().manual_seed(config.seed) for _ in range(2))

    def batches() -> Iterator[Batch]:
        order = np.random.default_rng(config.seed)
        step = 0
        while True:
            for number in order.permutation(len(setting.train)):
                adapter.set_progress(step / config.steps)
                if config.revive_after is not None:
                    adapter.revive_(config.revive_after, revival)
                yield setting.train[number]
                step += 1

    def loss_of(batch: Batch) -> Float[Tensor, ""]:
        return sft_loss(setting, batch) if config.objective == "sft" else distil_loss(setting, batch, config, generator)

    adapter.train()
    finetune(
        setting.base, batches(), loss_of,
        torch.optim.Adam(adapter.parameters(), lr=config.lr, betas=(0.9, 0.98)),
        Schedule(config.steps, config.lr, warmup_steps=WARMUP_STEPS),
        tokens_per_step=round(sum(int(batch.scored.sum()) for batch in setting.train) / len(setting.train)), name=name,
    )  # fmt: skip
    adapter.set_progress(1.0)
    return adapter.eval()


@torch.inference_mode()
def measure_faithfulness(setting: Setting, adapter: TopKLoRA) -> Faithfulness:
    """Return KL and internal errors on the held-out batches."""
    n = len(setting.rows.offsets) - 1
    kls, counts = np.zeros((2, n)), np.zeros(n)
    sums = np.zeros((3, len(setting.points)))
    progress = Progress("eval", total=len(setting.held_out), unit="batch")
    for batch in setting.held_out:
        documents = np.broadcast_to(batch.numbers[:, None], tuple(predicted(batch).shape))[
            predicted(batch).cpu().numpy()
        ]
        with hooks.capture(setting.tuned, setting.points) as of_tuned:
            log_p = log_probs(logits_at(setting.tuned, batch))
        with hooks.capture(setting.base, setting.points) as of_adapted:
            adapted = kl(log_p, log_probs(logits_at(setting.base, batch)))
        with adapter.disabled(), hooks.capture(setting.base, setting.points) as of_base:
            untouched = kl(log_p, log_probs(logits_at(setting.base, batch)))
        for row, values in zip(kls, (adapted, untouched), strict=True):
            np.add.at(row, documents, values.double().cpu().numpy())
        np.add.at(counts, documents, 1)
        for layer, point in enumerate(setting.points):
            x, a, b = (seen[point][batch.scored].double() for seen in (of_tuned, of_adapted, of_base))
            squares = ((x - a).square().sum(), (x - b).square().sum(), (x - x.mean(dim=0)).square().sum())
            sums[:, layer] += [float(value) for value in squares]
        progress.update(1)
    progress.close()
    held_out = np.flatnonzero(counts)
    labels = [setting.rows.group_names[setting.rows.groups[document]] for document in held_out]
    return Faithfulness(kls[:, held_out], counts[held_out], labels, *sums)
