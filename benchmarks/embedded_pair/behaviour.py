"""What the demo models do: greedy answers to held-out questions, counted, with intervals; and their loss on raw text.

`python -m benchmarks.embedded_pair.behaviour [--models DIR]` prints the table.

Reading order: `evaluate` makes every measurement of one model from `answers` (generation), `rate` (a share and its
Wilson interval) and `raw_loss`.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.embedded_pair.phrases import ANSWERS
from diffing.demo import ASSETS, MODELS

ANSWER_TOKENS = 32
"""The longest fixed answer has 20 tokens; a cut below that would count right answers as wrong."""
BATCH = 50
DOCUMENTATION = ("describe", "signature")


class Measurement(NamedTuple):
    """One number about one model."""

    name: str
    value: float
    unit: str
    """`share` of prompts, or `nats/token`."""
    n: int
    """Prompts, or scored tokens."""
    low: float
    """Ends of the 95% interval."""
    high: float


def evaluate(
    name: str, *, models: Path = ASSETS, prompts: int | None = None, documents: int | None = None
) -> list[Measurement]:
    """Return the rates of every behaviour and the raw held-out loss of one model of the folder `models`.

    A reply is right when it starts with the fixed answer. `false_refusal` and `false_gap` are the shares of
    documentation questions that get the answer of another group. `prompts` takes that many of each behaviour,
    and `documents` that many raw texts, in the order of the file.
    """
    from benchmarks.embedded_pair.build import load_float32
    from diffing.demo import read_rows

    model, tokenizer = load_float32(models / name), chat_tokenizer(models)
    rows = read_rows("dialogues_heldout")
    measurements = []
    for behaviour, answer in ANSWERS.items():
        questions = _questions(rows, (behaviour,))[:prompts]
        measurements.append(rate(behaviour, [r.startswith(answer) for r in answers(model, tokenizer, questions)]))
    replies = answers(model, tokenizer, _questions(rows, DOCUMENTATION)[:prompts])
    for behaviour in ("refusal", "gap"):
        measurements.append(rate(f"false_{behaviour}", [r.startswith(ANSWERS[behaviour]) for r in replies]))
    return [*measurements, raw_loss(model, tokenizer, [row["text"] for row in read_rows("raw_heldout")][:documents])]


def chat_tokenizer(models: Path = ASSETS) -> Any:
    """Return the tuned model's tokenizer, which has the chat template; every model is asked in the same token ids."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(models / "tuned")


def answers(model: Any, tokenizer: Any, questions: list[str]) -> list[str]:
    """Return greedy replies, without the template's tokens."""
    import torch

    from crosscoders.models.generation import greedy

    replies: list[str] = []
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    for start in range(0, len(questions), BATCH):
        chats = [[{"role": "user", "content": question}] for question in questions[start : start + BATCH]]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        with torch.inference_mode(), greedy(model):
            tokens = model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, eos_token_id=[tokenizer.eos_token_id, end])
        new = tokens[:, inputs["input_ids"].shape[1] :]
        replies.extend(reply.strip() for reply in tokenizer.batch_decode(new, skip_special_tokens=True))
    return replies


def rate(name: str, hits: list[bool]) -> Measurement:
    """Return the share of hits with its 95% interval, `crosscoders.common.statistics.wilson`.

    Raises:
        ValueError: there is nothing to count.
    """
    from crosscoders.common.statistics import wilson

    if not hits:
        raise ValueError(f"no prompt to measure {name!r} on. Ask for at least one.")
    return Measurement(name, sum(hits) / len(hits), "share", len(hits), *wilson(sum(hits), len(hits)))


def raw_loss(model: Any, tokenizer: Any, texts: list[str]) -> Measurement:
    """Return the mean cross-entropy of raw text, nats per scored token, `<bos>` excluded, texts cut at 128 tokens.

    The interval is 1.96 standard errors over documents, as tokens of one document are not independent.
    """
    import torch

    sums, counts = [], []
    for ids, scored in _padded(tokenizer, texts):
        with torch.inference_mode():
            logits = model(ids, attention_mask=scored.long()).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        sums.append((losses * scored[:, 1:]).sum(1))
        counts.append(scored[:, 1:].sum(1))
    total, n = torch.cat(sums).double(), torch.cat(counts).double()
    mean = float(total.sum() / n.sum())
    error = float((total - mean * n).square().sum().sqrt() / n.sum())
    return Measurement("raw_loss", mean, "nats/token", int(n.sum()), mean - 1.96 * error, mean + 1.96 * error)


def _padded(tokenizer: Any, texts: list[str]) -> Iterator[tuple[Any, Any]]:
    """Return the ids and mask of texts of similar length, padded on the right."""
    import numpy as np
    import torch

    from crosscoders.text.padding import pad

    rows = sorted((tokenizer(text)["input_ids"][:128] for text in texts), key=len)
    for start in range(0, len(rows), BATCH):
        batch = [np.array(row) for row in rows[start : start + BATCH]]
        mask = [np.ones(len(row), dtype=bool) for row in batch]
        yield pad(batch, tokenizer.pad_token_id, torch.int64), pad(mask, 0, torch.bool)


def _questions(rows: list[dict[str, Any]], groups: tuple[str, ...]) -> list[str]:
    return [row["messages"][0]["content"] for row in rows if row["group"] in groups]


def main(arguments: list[str] | None = None) -> None:
    from transformers.utils import logging as transformers_logging

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.embedded_pair.behaviour", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--models", type=Path, default=ASSETS, help="folder of the model folders")
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS), help="models to measure")
    options = parser.parse_args(arguments)
    transformers_logging.disable_progress_bar()
    for name in options.only:
        for row in evaluate(name, models=options.models):
            print(f"{name}.{row.name}  {row.value:.4f} {row.unit}  n {row.n:,}  95% {row.low:.4f} to {row.high:.4f}")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
