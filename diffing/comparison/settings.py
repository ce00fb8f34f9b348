"""Settings of `diffing compare`. Imports nothing heavy."""

from dataclasses import dataclass, field
from typing import Literal

from crosscoders.common.checks import LEAST_CHATS, require_range
from crosscoders.common.errors import InputError, nearest
from crosscoders.text.settings import TEMPLATE_DATE, DataSource

DIRECTIONS = ("pca", "mean-difference", "weight-svd")
DICTIONARIES = {
    "delta-sae": ("delta-sae",),
    "base-sae": ("base-sae",),
    "crosscoder": ("crosscoder", "crosscoder-norm", "crosscoder-scaling"),
}
"""Dictionary that is trained -> methods, which order its latents differently."""
TRAINED_DIRECTIONS = (
    *(method for methods in DICTIONARIES.values() for method in methods),
    "topk-lora",
    "decomposition",
)
TRAINED_SCORES = ("latents",)
TRAINED = (*TRAINED_DIRECTIONS, *TRAINED_SCORES)
SCORES = ("kl-map", "norm-difference", "diff-mining")
TEXTS = ("say", "replies", "mined-tokens", "mined-topics", "difference-lens", "weight-amplification")
CHEAP = (*DIRECTIONS, *SCORES, *(name for name in TEXTS if name != "mined-topics"))
"""What runs where no method is named: nothing is trained, nothing beyond the dependencies is needed."""
METHODS = (*DIRECTIONS, *TRAINED, *SCORES, *TEXTS)


@dataclass(frozen=True)
class CompareSettings:
    """Every method on one table: directions, scores per token and texts, each beside a null model and random."""

    base: str
    """Base model: folder or hub id."""
    tuned: str
    """Tuned model: folder, hub id or PEFT adapter of the base."""
    data: str | list[str | DataSource]
    """Documents: a path or `datasets` id, or a list of them; chats among them are what KL is measured on."""
    out: str
    """Folder of the result; what is finished there is used again."""
    null: str | None = None
    """Null model, tuned from the same base without the behaviour: a method finds what goes beyond it."""
    truth: str | None = None
    """File of planted behaviours (docs/formats.md): rates by generation, AUROC and hits are measured against it."""
    methods: list[str] = field(default_factory=lambda: list(CHEAP))
    """Methods to run; by name also those that train (delta-sae, base-sae, crosscoder, crosscoder-norm,
    crosscoder-scaling, topk-lora, decomposition, latents) or need scikit-learn (mined-topics)."""
    hook_point: str | None = None
    """Where directions are read; default: the residual stream after the middle layer."""
    pieces: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    """Numbers n of pieces whose first ones are exchanged: directions, latents, or ranks of every matrix."""
    n_tokens: int = 16_384
    """Scored tokens that methods read."""
    n_documents: int = 60
    """Chats whose responses KL is measured on, at least 20."""
    n_samples: int = 100
    """Samples of each text method."""
    n_prompts: int = 20
    """Prompts of each planted behaviour."""
    n_seeds: int = 3
    """Seeds of documents and of random controls."""
    random_draws: int = 3
    """Random sets of each size and seed."""
    train_data: str | list[str | DataSource] | None = None
    """Documents that trained methods are trained on; default: `data`."""
    cached_tokens: int = 200_000
    """Different tokens that trained methods are trained on, over and over."""
    train_tokens: int = 2_457_600
    """Tokens that dictionaries are trained on in all; as in the preset `demo`."""
    distil_steps: int = 450
    """Steps of topk-lora and of decomposition, of `batch_rows` documents each."""
    context_length: int = 1024
    """Tokens of a document that are read; the rest is cut off."""
    tokenizer: str | None = None
    """Tokenizer that fits both models; default: the tuned model's."""
    chat_template: str | None = None
    """File with a chat template, for tokenizers without one."""
    template_date: str = TEMPLATE_DATE
    """YYYY-MM-DD, which a chat template that writes today's date gets instead."""
    max_new_tokens: int = 32
    """Longest sample or reply, in tokens."""
    batch_rows: int = 16
    """Documents in one forward pass."""
    model_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type in which the models run; auto: bfloat16 on a GPU, float32 on a CPU."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    seed: int = 0
    """First seed."""

    def __post_init__(self) -> None:
        require_range(self, LEAST_CHATS, None, "n_documents")
        require_range(self, 1, None, "n_tokens", "n_prompts", "n_seeds", "random_draws", "max_new_tokens", "batch_rows",
                      "distil_steps")  # fmt: skip
        require_range(self, 2, None, "n_samples")
        require_range(self, 0, 2**63 - 1, "seed")
        if not self.methods:
            raise InputError(f"methods is an empty list. Name some of {', '.join(METHODS)}.")
        for name in self.methods:
            if name not in METHODS:
                raise InputError(
                    f"unknown method {name!r}{nearest(name, list(METHODS))} There are {', '.join(METHODS)}."
                )
        if not self.pieces or min(self.pieces) < 1:
            raise InputError(
                f"pieces is {self.pieces}; give numbers from 1, such as [1, 2, 4]: a rank of 0 changes none."
            )
        if "pca" in self.methods and self.n_tokens <= max(self.pieces):
            raise InputError(
                f"n_tokens is {self.n_tokens}; {max(self.pieces)} principal directions need more tokens than that. "
                "Raise n_tokens, or lower pieces."
            )

    def chosen(self, names: tuple[str, ...]) -> list[str]:
        """Return those of `names` that are to be run, in their order."""
        return [name for name in names if name in self.methods]
