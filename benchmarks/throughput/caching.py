"""Caching against the truncated forward passes alone, full forward passes with a hook, and SAELens.

Two random Gemma-2 models of 12 layers, one batch of 8 x 256 tokens, hook point in the middle. SAELens reads one model;
so its store runs once for each model here, and neither side writes a file in that comparison. The activations are
compared first.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.throughput.adapters import foreign_import
from benchmarks.timing import Clock, cpu_seconds, interleaved, ratio_row
from crosscoders.activations.scored import concatenate
from crosscoders.activations.source import ActivationSource
from crosscoders.common.files import write_tensors
from crosscoders.models.hooks import capture
from crosscoders.models.pair import ModelPair, PairInfo
from crosscoders.text.padding import Batch
from crosscoders.text.tokens import Rows, pad_rows


class Size(NamedTuple):
    """Shape of the models and of the batch of tokens."""

    vocabulary: int
    d_model: int
    d_mlp: int
    n_layers: int
    n_heads: int
    d_head: int
    n_rows: int = 8
    n_positions: int = 256

    @property
    def layer(self) -> int:
        return self.n_layers // 2

    @property
    def hook_point(self) -> str:
        return f"blocks.{self.layer}.hook_resid_post"


SMALL = Size(vocabulary=10_752, d_model=256, d_mlp=1024, n_layers=12, n_heads=4, d_head=64)
"""The head's share of the work is that of Gemma-2-2B."""


class Pair(NamedTuple):
    """A random pair, ready to be read."""

    size: Size
    full: list[nn.Module]
    """The models with their heads."""
    pair: ModelPair
    source: ActivationSource
    batch: Batch
    """The first batch: `n_rows` rows, or 8 if there are more."""

    def read(self) -> Tensor:
        """Return the activations of both models on all tokens, (tokens, 2, d_model) in bfloat16."""
        return self.read_all().activations

    def read_all(self) -> Any:
        return concatenate(list(self.source.read(0, self.size.n_rows * self.size.n_positions)))


def make_pair(size: Size, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Pair:
    """Make a pair with random weights; the rows are full, so no token is padding."""
    import transformers

    config = transformers.Gemma2Config(
        vocab_size=size.vocabulary, hidden_size=size.d_model, intermediate_size=size.d_mlp,
        num_hidden_layers=size.n_layers, num_attention_heads=size.n_heads, num_key_value_heads=size.n_heads // 2,
        head_dim=size.d_head, query_pre_attn_scalar=size.d_head, pad_token_id=0, bos_token_id=2, eos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        full = [transformers.Gemma2ForCausalLM(config).to(dtype).eval().requires_grad_(False) for _ in range(2)]
    n_tokens = size.n_rows * size.n_positions
    rows = Rows(
        ids=np.random.default_rng(0).integers(3, size.vocabulary, n_tokens).astype(np.int32),
        roles=np.zeros(n_tokens, np.uint8), scored=np.ones(n_tokens, bool),
        offsets=np.arange(size.n_rows + 1) * size.n_positions, groups=np.zeros(size.n_rows, np.int64),
        group_names=["x"], n_scored=n_tokens, counts={}, refused={},
    )  # fmt: skip
    tokenizer = type("Tokenizer", (), {"pad_token_id": 0})()
    info = PairInfo("base", "tuned", None, tokenizer, size.d_model, size.n_layers, size.vocabulary)
    pair = ModelPair(info, (full[0].model, full[1].model), [size.hook_point], torch.device(device))
    source = ActivationSource(pair, rows, hook_point=size.hook_point, batch_rows=8, dtype=torch.bfloat16)
    return Pair(size, full, pair, source, pad_rows(rows, np.arange(min(8, size.n_rows)), 0))


def rows(quick: bool) -> list[dict[str, Any]]:
    """Return the rows `throughput.cache.middle.*`."""
    n_rounds = 3 if quick else 9
    return cache_rows("throughput.cache.middle", make_pair(SMALL), n_rounds=n_rounds) + saelens_rows(
        "throughput.cache.middle", make_pair(SMALL), n_rounds=n_rounds
    )


def cache_rows(name: str, models: Pair, *, n_rounds: int, clock: Clock = cpu_seconds) -> list[dict[str, Any]]:
    """Time reading and writing a shard against the truncated and the full forward passes of one batch."""
    ids, mask, *_ = models.batch.to(models.pair.device)

    def full_forward() -> None:
        for model in models.full:
            with torch.inference_mode(), capture(model, [models.size.hook_point]):
                model(input_ids=ids, attention_mask=mask)

    with tempfile.TemporaryDirectory() as folder:
        parts: dict[str, Callable[[], object]] = {
            "truncated": lambda: models.pair.activations(models.batch, models.size.hook_point),
            "cached": lambda: write_tensors(Path(folder) / "shard.safetensors", models.read_all()._asdict()),
            "full": full_forward,
        }
        seconds = interleaved(parts, n_rounds=n_rounds, n_warmup=1, clock=clock)
    return [
        ratio_row(f"{name}.ratio_to_truncated", seconds["cached"], seconds["truncated"], "forward passes"),
        ratio_row(f"{name}.speedup_over_full_forward", seconds["full"], seconds["cached"], "times"),
    ]


def saelens_readers(models: Pair) -> list[Callable[[Tensor], Tensor]]:
    """Return `ActivationsStore.get_activations` of SAELens for each model: ids -> (rows, positions, d_model)."""
    with foreign_import():
        import datasets
        from sae_lens import ActivationsStore
        from sae_lens.load_model import HookedProxyLM

    size, ids = models.size, models.batch.ids
    hook = f"model.layers.{size.layer}"
    return [
        ActivationsStore(
            model=HookedProxyLM(model, None, hook_names=[hook]),
            dataset=datasets.Dataset.from_dict({"input_ids": ids.tolist()}), streaming=False, hook_name=hook,
            hook_head_index=None, context_size=size.n_positions, d_in=size.d_model, n_batches_in_buffer=2,
            total_training_tokens=len(ids), store_batch_size_prompts=len(ids), train_batch_size_tokens=len(ids),
            prepend_bos=False, normalize_activations="none", device=torch.device("cpu"), dtype="float32",
        ).get_activations
        for model in models.full
    ]  # fmt: skip


def saelens_rows(
    name: str, models: Pair, *, n_rounds: int, readers: list[Callable[[Tensor], Tensor]] | None = None
) -> list[dict[str, Any]]:
    """Return the row `<name>.ratio_to_saelens`: both models' activations of one batch in memory.

    Raises:
        RuntimeError: the activations differ.
    """
    ids = models.batch.ids
    readers = readers or saelens_readers(models)

    @torch.inference_mode()
    def theirs() -> Tensor:
        return torch.stack([reader(ids) for reader in readers], dim=2).flatten(0, 1)

    a, b = models.read().float(), theirs()
    if not (a - b).abs().max() <= 0.01 * b.abs().max():  # ours are bfloat16
        raise RuntimeError(
            f"{name}: SAELens reads other activations, {(a - b).abs().max()} apart; times do not compare."
        )
    parts: dict[str, Callable[[], object]] = {"ours": models.read, "saelens": theirs}
    seconds = interleaved(parts, n_rounds=n_rounds, n_warmup=1)
    note = "both models on one batch, no file written; SAELens reads one model, so its store runs once for each"
    return [ratio_row(f"{name}.ratio_to_saelens", seconds["ours"], seconds["saelens"], "reads of saelens", note)]
