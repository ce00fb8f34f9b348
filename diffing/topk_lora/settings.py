"""Settings of `diffing topk-lora`. Imports nothing heavy."""

from dataclasses import dataclass, replace
from typing import Literal

from crosscoders.common.checks import require_positive, require_range
from crosscoders.common.errors import InputError
from crosscoders.text.settings import TEMPLATE_DATE, DataConfig, DataSource
from sae_lora.lora.settings import TopKLoRAConfig


@dataclass(frozen=True, kw_only=True)
class PairData:
    """Two models, and what they read: `open_setting` opens it."""

    base: str
    """Base model: folder or hub id."""
    tuned: str
    """Tuned model: folder, hub id or PEFT adapter of the base."""
    data: str | list[str | DataSource]
    """Documents that both models read, as `crosscoders cache` takes them; no tuning data is needed."""
    n_tokens: int = 200_000
    """Scored tokens to read, with the held-out ones."""
    eval_data: str | list[str | DataSource] | None = None
    """Other documents that only the evaluation reads; default: the last batches of `data`."""
    holdout_share: float = 0.1
    """Share of the batches of `data` that are kept for it then; with `eval_data`, its scored tokens over n_tokens."""
    context_length: int = 128
    """Tokens of a document that are read."""
    chat_template: str | None = None
    """File with a chat template, for tokenizers without one."""
    template_date: str = TEMPLATE_DATE
    """YYYY-MM-DD, which a chat template that writes today's date gets instead."""
    batch_rows: int = 8
    """Documents in a step."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def require_data(self) -> None:
        """Raise InputError for numbers that nothing can be read with."""
        require_positive(self, "n_tokens", "context_length", "batch_rows")
        if not 0 < self.holdout_share < 1:
            raise InputError(f"holdout_share is {self.holdout_share}; give a share between 0 and 1, such as 0.1.")

    def data_config(self) -> DataConfig:
        """Return the part that says which documents are read."""
        return DataConfig(
            data=self.data, n_tokens=self.n_tokens, context_length=self.context_length,
            chat_template=self.chat_template, template_date=self.template_date,
        )  # fmt: skip

    def eval_config(self) -> DataConfig | None:
        """Return the same of the documents for the evaluation alone, if there are any."""
        if self.eval_data is None:
            return None
        n_tokens = max(1, round(self.holdout_share * self.n_tokens))
        return replace(self.data_config(), data=self.eval_data, n_tokens=n_tokens)


@dataclass(frozen=True, kw_only=True)
class DistilConfig(PairData, TopKLoRAConfig):
    """How a tuned model is distilled into the base with a TopKLoRA."""

    steps: int = 450
    """Training steps."""
    lr: float = 5e-3
    """Peak learning rate of Adam (0.9, 0.98), after 20 steps of warm-up, falling as a cosine. 1e-2 suits rank <= 8."""
    objective: Literal["distil", "sft"] = "distil"
    """distil: the tuned model's predictions. sft: the responses of the chats in `data`; the tuned model is then only
    what the evaluation compares with."""
    hidden_weight: float = 0.0
    """Weight of the normalised squared error of the residual stream, mean over layers, beside the KL."""
    cutover_weight: float = 0.0
    """Weight of the KL of the tuned model's upper layers on the adapted base's lower ones, cut at a random layer."""
    revive_after: int | None = None
    """Directions that have not fired on as many tokens of training are drawn anew; default: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_data()
        require_positive(self, "steps", "lr")
        require_range(self, 1, None, "revive_after")
        require_range(self, 0, None, "hidden_weight", "cutover_weight")
        if self.objective == "sft" and (self.hidden_weight or self.cutover_weight):
            raise InputError("hidden_weight and cutover_weight have no effect with objective sft. Leave them out.")


@dataclass(frozen=True, kw_only=True)
class TopKFitSettings(DistilConfig):
    """Distil a tuned model into the base with a TopKLoRA."""

    out: str
    """Run folder."""


@dataclass(frozen=True, kw_only=True)
class TopKEvalSettings:
    """Held-out KL, internal faithfulness and directions of a run."""

    run: str
    """Run folder of `diffing topk-lora fit`."""
    top: int = 20
    """Directions that are printed, those with the largest share of what the adapter writes."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


@dataclass(frozen=True, kw_only=True)
class TopKSetsSettings:
    """Smallest sets of directions without which a behaviour is gone and the others stay."""

    run: str
    """Run folder of `diffing topk-lora fit`."""
    prompts: str | list[str | DataSource]
    """Chats that the search reads; the first user message of each is a prompt, its `group` the behaviour."""
    audit: str | list[str | DataSource]
    """Other chats, on which what is left is counted."""
    labels: list[str] | None = None
    """Behaviours to look for; default: every group of the prompts."""
    per_label: int = 48
    """Prompts of each behaviour in the search."""
    audit_per_label: int = 200
    """And in the audit."""
    max_directions: int = 64
    """The search ends there."""
    draws: int = 4
    """Random sets that write as much, for each set."""
    seed: int = 0
    """Of those."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        require_positive(self, "per_label", "audit_per_label", "max_directions", "draws")


PRESETS: dict[str, dict[str, object]] = {
    f"published-{rank}-{k}": {"rank": rank, "k": k, "k_start_factor": rank / 8 / k, "layers": [18]}
    for rank, k in ((512, 4), (1024, 8), (4096, 32), (8192, 64))
}
"""(rank, k) of the published adapters of Gemma-2-2B's layer 18; k falls from rank / 8, alpha = 2 rank."""
