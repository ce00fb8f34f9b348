"""Settings of `sae-lora`, as frozen dataclasses. Imports nothing heavy."""

from dataclasses import dataclass
from typing import Any, Literal

from crosscoders.common.checks import require_positive, require_range
from crosscoders.common.errors import InputError
from crosscoders.text.settings import TEMPLATE_DATE, DataConfig, DataSource
from sae_lora.dictionaries.settings import WITHOUT_LATENTS, ControlKind

CorrectorKind = Literal["lora", "mean-scale", "affine", "sae"]


@dataclass(frozen=True)
class TextConfig:
    """Which documents are read, and how."""

    data: str | list[str | DataSource]
    """Documents: a path or `datasets` id, or a list of them, or of {path, text_column, weight, ...}."""
    n_tokens: int = 15_360_000
    """Scored tokens (no padding, no BOS) to read, once."""
    context_length: int = 1024
    """Tokens of a sequence; a document is cut there, or goes on in the next sequence with `pack`."""
    pack: bool = False
    """Join all documents, with EOS between two where the second has no BOS, and cut them into
    n_tokens // context_length full sequences, across their borders."""
    batch_rows: int = 8
    """Sequences in one forward pass."""
    tokenizer: str | None = None
    """Model whose tokenizer and chat template read the documents; default: the model's own."""
    chat_template: str | None = None
    """File with a chat template, for chats and a tokenizer without one."""
    template_date: str = TEMPLATE_DATE
    """YYYY-MM-DD, which a chat template that writes today's date gets instead, so that the day does not matter."""
    max_refused: float = 0.1
    """Largest share of rows that cannot be read; they are left out and counted. 0: the first one ends the run."""
    model_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type in which the model runs; auto: bfloat16 on a GPU, float32 on a CPU."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    seed: int = 0
    """Seed of the order of documents, of LoRA's start and dropout, and of resamples."""

    def __post_init__(self) -> None:
        require_positive(self, "n_tokens", "context_length", "batch_rows")
        require_range(self, 0, 2**63 - 1, "seed")
        if self.pack and self.n_tokens < self.context_length:
            raise InputError(
                f"n_tokens = {self.n_tokens} is less than one packed sequence of {self.context_length}. Raise n_tokens."
            )
        self.data_config()

    def data_config(self) -> DataConfig:
        """Return the settings that say which documents are read, and how; to be packed, they are not cut."""
        return DataConfig(
            data=self.data,
            n_tokens=self.n_tokens,
            context_length=self.n_tokens + 1 if self.pack else self.context_length,
            chat_template=self.chat_template,
            template_date=self.template_date,
            max_refused=self.max_refused,
            seed=self.seed,
        )


@dataclass(frozen=True, kw_only=True)
class FitConfig(TextConfig):
    """Fit LoRA so that the model with dictionaries spliced in predicts what it predicts without them."""

    model: str
    """Local folder or hub id."""
    dictionary: str | list[str]
    """Folder or file of a frozen dictionary, or a list of them at different hook points."""
    hook_point: str | list[str] | None = None
    """Where each dictionary belongs, for those whose files do not say it."""
    side: Literal["base", "tuned", "both"] | None = None
    """Whose reconstruction is taken, for crosscoders of two models."""
    control: ControlKind = "none"
    """Put this in place of what the dictionary reconstructs: x itself, x with noise of the size of the dictionary's
    error, the dictionary's output without any latent, or the dictionary with random or with permuted decoder rows."""
    corrector: CorrectorKind = "lora"
    """What is trained: LoRA in the model; a scale and a shift after the dictionary; an affine map after it; the
    dictionary's own weights."""
    other_model: str | None = None
    """The crosscoder's other model, run beside it so that the latents are those of the pair. Default: the one model's
    activation stands in for both."""
    foreign_dictionary: bool = False
    """Take dictionaries that were trained on another model; what is left of their gap they cannot express."""
    layers: Literal["after", "all"] | list[int] = "after"
    """Layers that get LoRA: those after the (lowest) dictionary, all, or a list."""
    rank: int = 64
    """Rank of each LoRA."""
    alpha: float | None = None
    """The update is alpha / rank * B A x. Default: rank / 2, so that its scale does not change with the rank."""
    dropout: float = 0.0
    """Dropout of LoRA's input."""
    loss: Literal["mean", "sum"] = "mean"
    """mean: KL per token. sum: KL summed over a sequence, mean over sequences, as published; with clipping at 1 nearly
    every step then has the same length."""
    lr: float = 5e-5
    """Learning rate of AdamW."""
    lr_decay_fraction: float = 0.0
    """Last share of the steps, over which the rate falls linearly to 0; 0: constant, as published."""
    weight_decay: float = 0.01
    """AdamW's decay, towards no change; none for corrector sae, whose weights do not start at 0."""
    clip_norm: float | None = 1.0
    """Largest global norm of the gradient; null: no clipping."""
    epochs: int = 1
    """Times that all documents are read; every time after the first in an order of its own, by seed."""
    store: Literal["none", "memory", "disk"] = "none"
    """Keep what the lowest dictionary puts into the model and the final hidden states of the model as it is, so that
    later epochs (with disk, other fits too) do not compute them again: 2 d_model numbers per token."""
    store_folder: str | None = None
    """Folder for `store` disk, shared by fits with other ranks, layers and seeds of LoRA."""
    chunk_tokens: int | None = None
    """Positions whose logits exist at a time. Default: 64 on a CPU, where they stay in its cache; 512 elsewhere, where
    every chunk reads the unembedding anew."""
    log_every: int = 50
    """Steps between two lines of train.jsonl."""
    checkpoint_every: int = 500
    """Steps between two states to resume from; the last two are kept."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "rank", "lr", "epochs", "log_every", "checkpoint_every")
        require_range(self, 1, None, "chunk_tokens")
        require_range(self, 0, None, "weight_decay", "clip_norm")
        require_range(self, 0, 0.99, "dropout")
        require_range(self, 0, 1, "lr_decay_fraction")
        if (self.store == "disk") != (self.store_folder is not None):
            raise InputError(
                f"store is {self.store!r} and store_folder {self.store_folder!r}; disk needs a folder, and only disk "
                "has one. Set --store disk --store-folder FOLDER, or leave the folder out."
            )
        if self.alpha is not None and not self.alpha > 0:
            raise InputError(f"alpha is {self.alpha}; give a number above 0.")
        if isinstance(self.layers, list) and (not self.layers or len(set(self.layers)) < len(self.layers)):
            raise InputError(f"layers is {self.layers}; name each layer once, or give after or all.")
        if self.corrector != "lora" and (self.layers != "after" or self.rank != 64):
            raise InputError(
                f"corrector {self.corrector!r} has no LoRA, so layers and rank have no effect. Leave them out."
            )
        if self.corrector != "lora" and self.store != "none":
            raise InputError(
                f"store {self.store!r} keeps what the dictionary puts into the model, and corrector {self.corrector!r} "
                "changes it at every step. Use --store none."
            )
        if self.corrector == "sae" and self.control in WITHOUT_LATENTS:
            raise InputError(
                f"corrector 'sae' trains the dictionary, of which control {self.control!r} keeps nothing. "
                "Choose another."
            )

    def lr_at(self, step: int, n_steps: int) -> float:
        """Return the rate of a step: constant, then a linear fall to 0 over the last lr_decay_fraction of the steps."""
        n_decay = int(self.lr_decay_fraction * n_steps)
        return self.lr * min(1.0, (n_steps - step) / n_decay) if n_decay else self.lr

    def chosen_chunk(self, device_type: str) -> int:
        """Return the setting `chunk_tokens`, or its default on a device."""
        return self.chunk_tokens or (64 if device_type == "cpu" else 512)

    def chosen_alpha(self) -> float:
        """Return the setting `alpha`, or its default."""
        return self.rank / 2 if self.alpha is None else self.alpha


def pair_up(dictionary: str | list[str], hook_point: str | list[str] | None) -> list[tuple[str, str | None]]:
    """Return each dictionary with its hook point, where one is given.

    Raises:
        InputError: none, or another number of hook points than of dictionaries.
    """
    paths = [dictionary] if isinstance(dictionary, str) else dictionary
    points: list[str] | list[None] = [hook_point] if isinstance(hook_point, str) else hook_point or [None] * len(paths)
    if not paths or len(points) != len(paths):
        raise InputError(
            f"{len(paths)} dictionaries and {len(points)} hook points. Give one dictionary or more, and a hook point "
            "for each or for none."
        )
    return list(zip(paths, points, strict=True))


PRESETS: dict[str, dict[str, Any]] = {
    # Chen, Engels, Tegmark 2025 (arXiv 2501.19406), as in their training code: 15,000 sequences of 1,024, one epoch.
    "paper": {
        "n_tokens": 15_360_000,
        "context_length": 1024,
        "pack": True,
        "batch_rows": 1,
        "layers": "after",
        "rank": 64,
        "alpha": 32.0,
        "dropout": 0.1,
        "loss": "sum",
        "lr": 5e-5,
        "weight_decay": 0.01,
        "clip_norm": 1.0,
        "seed": 42,
    },
}


@dataclass(frozen=True, kw_only=True)
class FitSettings(FitConfig):
    """Fit LoRA, or another corrector, so that the model with dictionaries in it predicts what it predicts without."""

    out: str
    """Run folder; an interrupted run there goes on."""
    force: bool = False
    """Go on where the estimate of memory is above what the machine has."""
