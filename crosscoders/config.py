"""Settings of every `crosscoders` command, as frozen dataclasses. Imports nothing heavy.

A contradiction raises InputError when the dataclass is made, so it is found before a model loads.
Published recipes are in `PRESETS`; their sources are in docs/math.md.
"""

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from crosscoders.errors import InputError

# ---------------------------------------------------------------------------------------------------------- caching


@dataclass(frozen=True)
class DataSource:
    """One source of documents: plain text, or chats as lists of {"role", "content"}."""

    path: str
    """Local file or folder (.txt, .jsonl, .jsonl.gz, .parquet), or a `datasets` id."""
    name: str | None = None
    """Configuration name of a `datasets` id."""
    split: str = "train"
    """Split of a `datasets` id."""
    text_column: str = "text"
    """Column with plain text."""
    messages_column: str = "messages"
    """Column with chat messages; used where a row has it."""
    group: str | None = None
    """Name under which the report counts these documents; default: the `group` column, else the file's name."""
    weight: float = 1.0
    """Share of the scored tokens relative to the other sources."""

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise InputError(f"weight of data source {self.path!r} is {self.weight}; give a finite number above 0.")


@dataclass(frozen=True)
class CacheConfig:
    """Store paired activations of a base and a tuned model on disk."""

    base: str
    """Base model: local folder or hub id."""
    tuned: str
    """Tuned model: local folder, hub id, or a PEFT adapter of the base model."""
    hook_point: str | list[str]
    """Where activations are read, a TransformerLens name such as blocks.13.hook_resid_post. A list of them is read in
    one pass, and each makes a cache of its own in OUT/<hook_point>."""
    data: str | list[str | DataSource]
    """Documents: a path or `datasets` id, or a list of them, or of {path, text_column, weight, ...}."""
    out: str
    """Folder of the cache."""
    n_tokens: int = 1_000_000
    """Scored tokens to store, from all sources together."""
    context_length: int = 1024
    """Tokens of a document that are read; the rest is cut off and counted."""
    drop_bos: bool = True
    """Leave the beginning-of-sequence token out of the cache (its norm is an outlier in most models)."""
    tokenizer: str | None = None
    """Tokenizer folder or id; default: the tuned model's, which must equal the base model's."""
    chat_template: str | None = None
    """File with a chat template, for pairs without one."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the stored activations."""
    model_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type in which the models run; auto: bfloat16 on a GPU, float32 on a CPU."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    batch_rows: int = 16
    """Documents in one forward pass."""
    shard_tokens: int = 65_536
    """Tokens in one shard; an interrupted run goes on at the last whole shard."""
    shuffle_documents: int = 100_000
    """Documents are shuffled within windows of this many; 0 keeps their order."""
    seed: int = 0
    """Seed of the order of documents."""

    def __post_init__(self) -> None:
        require_positive(self, "n_tokens", "context_length", "batch_rows", "shard_tokens")
        require_range(self, 0, None, "shuffle_documents")
        if isinstance(self.data, str) and self.data.lstrip().startswith(("[", "{")):
            raise InputError(
                f"data {self.data!r} is not a list of paths or of {{path, name, split, text_column, messages_column, "
                "group, weight}. Check its keys and quotes."
            )
        if not self.hook_point:
            raise InputError("hook_point is empty. Give a name such as blocks.13.hook_resid_post, or a list of them.")
        for number, name in enumerate(self.hook_point if isinstance(self.hook_point, list) else []):
            if name in self.hook_point[:number]:
                raise InputError(f"hook_point names {name!r} twice. Name each hook point once.")

    def points(self) -> list["CacheConfig"]:
        """The config of each hook point alone; of a list, each has a folder of its own in `out`."""
        if isinstance(self.hook_point, str):
            return [self]
        return [replace(self, hook_point=name, out=f"{self.out.rstrip('/')}/{name}") for name in self.hook_point]

    def sources(self) -> list[DataSource]:
        """The data setting as a list of sources."""
        listed = self.data if isinstance(self.data, list) else [self.data]
        if not listed:
            raise InputError("data is an empty list; name at least one file, folder or dataset id.")
        return [DataSource(path=item) if isinstance(item, str) else item for item in listed]


# --------------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class CrosscoderConfig:
    """Shape and gate of a crosscoder; n_models = 1 is a sparse autoencoder."""

    dict_size: int = 16_384
    """Number of latents."""
    activation: Literal["relu", "batchtopk"] = "batchtopk"
    """relu: every positive latent is active. batchtopk: the k * batch largest of the batch are."""
    k: int | None = None
    """Active latents per token, batchtopk only."""
    code_norm: Literal["sum", "concat", "none"] = "sum"
    """Weight c_j of latent j in selection and in the L1 term: sum of its decoder norms over the models ("CC loss"),
    norm of the concatenated decoder ("SAE loss"), or 1."""
    n_models: int = 2
    """Models read: 2 = (base, tuned)."""
    d_model: int | None = None
    """Width of the activations; default: that of the cache."""

    def __post_init__(self) -> None:
        require_positive(self, "dict_size", "n_models")
        if self.activation == "batchtopk":
            if self.k is None:
                raise InputError(
                    "activation 'batchtopk' needs k, the active latents per token. Set crosscoder.k = 100."
                )
            if not 1 <= self.k <= self.dict_size:
                raise InputError(
                    f"crosscoder.k is {self.k}; it must lie between 1 and dict_size = {self.dict_size}. "
                    "Published runs use k = 100 of 73,728."
                )
        elif self.k is not None:
            raise InputError(
                f"crosscoder.k = {self.k} has no effect with activation 'relu'. "
                "Set crosscoder.k to null, or use 'batchtopk'."
            )


@dataclass(frozen=True)
class TrainConfig:
    """Train a crosscoder on a cache of paired activations."""

    crosscoder: CrosscoderConfig = field(default_factory=lambda: CrosscoderConfig(k=100))
    """Shape and gate of the dictionary."""
    n_tokens: int = 100_000_000
    """Tokens to train on; a smaller cache is read for several epochs."""
    batch_size: int = 2048
    """Tokens in one step."""
    lr: float = 1e-4
    """Learning rate of Adam."""
    lr_warmup_steps: int = 1000
    """Steps of linear warm-up."""
    lr_decay_fraction: float = 0.0
    """Last share of the steps, over which the rate falls linearly to 0."""
    adam_beta1: float = 0.9
    """Adam's decay of the first moment."""
    adam_beta2: float = 0.999
    """Adam's decay of the second moment."""
    adam_bits: Literal[32, 8] = 32
    """Bits of each of Adam's two moments of a weight; 8 takes torchao (extra `low-memory`) and is meant for a GPU."""
    clip_norm: float | None = 1.0
    """Largest global norm of the gradient; null: no clipping."""
    reconstruction: Literal["norm", "squared"] = "norm"
    """norm: mean over tokens and models of ||x - x_hat||.
    squared: mean over tokens of the sum over models of its square."""
    l1_coefficient: float = 0.0
    """Weight of the sparsity term sum_j f_j c_j; relu only."""
    l1_warmup_steps: int = 0
    """Steps over which that weight rises linearly from 0."""
    k_start: int | None = None
    """k at the first step, batchtopk only; needs k_anneal_steps."""
    k_anneal_steps: int = 0
    """Steps over which k falls linearly from k_start to crosscoder.k."""
    aux_coefficient: float = 1 / 32
    """Weight of the auxiliary term that revives dead latents, batchtopk only."""
    k_aux: int | None = None
    """Dead latents per token in that term; default: d_model // 2."""
    dead_after_tokens: int = 10_000_000
    """A latent is dead when it was not active for this many tokens."""
    threshold_start_step: int = 1000
    """Step from which the inference threshold of batchtopk is tracked."""
    threshold_beta: float = 0.999
    """Decay of the running inference threshold."""
    input_norm: Literal["none", "sqrt_d"] = "none"
    """sqrt_d: one scale per model, so that E||x|| = sqrt(d_model); kept with the weights. none: raw activations."""
    decoder_init_norm: float = 1.0
    """Norm of each decoder row of each model at the start."""
    b_dec_init: Literal["zero", "geometric_median"] = "zero"
    """Decoder bias at the start: zero, or the geometric median of the first batch of each model."""
    buffer_tokens: int = 524_288
    """Tokens held in memory and shuffled together."""
    holdout_tokens: int = 0
    """Last tokens of the cache that are kept for evaluation; 0 where eval_cache is given, or for no evaluation."""
    seed: int = 0
    """Seed of weights and of the order of tokens."""
    log_every: int = 50
    """Steps between two lines of train.jsonl."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints to resume from; the last two are kept."""
    eval_every: int = 0
    """Steps between two evaluations on held-out tokens; 0: only at the end."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    products: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the dense matrix products; weights, gradients and sparse products stay float32. auto: bfloat16 on a GPU,
    float32 on a CPU."""

    def __post_init__(self) -> None:
        require_positive(
            self, "n_tokens", "batch_size", "lr", "buffer_tokens", "log_every", "checkpoint_every", "decoder_init_norm"
        )
        require_range(self, 0, 1, "lr_decay_fraction", "threshold_beta")
        require_range(self, 0, 0.9999999, "adam_beta1", "adam_beta2")
        require_range(self, 0, None, "lr_warmup_steps", "l1_coefficient", "l1_warmup_steps", "k_anneal_steps")
        require_range(self, 0, None, "aux_coefficient", "dead_after_tokens", "threshold_start_step", "eval_every")
        require_range(self, 0, None, "clip_norm", "holdout_tokens")
        require_range(self, 0, 2**63 - 1, "seed")
        if self.n_tokens < self.batch_size:
            raise InputError(f"n_tokens = {self.n_tokens} is less than one batch of {self.batch_size}. Raise n_tokens.")
        if self.k_aux is not None and self.k_aux < 1:
            raise InputError(f"k_aux is {self.k_aux}; give a number above 0, or aux_coefficient = 0 for no such term.")
        if self.crosscoder.activation == "batchtopk":
            if self.l1_coefficient or self.l1_warmup_steps:
                raise InputError(
                    "l1_coefficient and l1_warmup_steps have no effect with activation 'batchtopk'. "
                    "Set them to 0, or use 'relu'."
                )
            self._check_annealing()
            if self.threshold_start_step >= self.n_steps:
                raise InputError(
                    f"threshold_start_step = {self.threshold_start_step} but the run has {self.n_steps} steps, so no "
                    "inference threshold would be tracked. Lower it, or raise n_tokens."
                )
        elif self.k_start is not None or self.k_anneal_steps:
            raise InputError("k_start and k_anneal_steps have no effect with activation 'relu'. Remove them.")

    def _check_annealing(self) -> None:
        k, dict_size = self.crosscoder.k, self.crosscoder.dict_size
        if self.k_start is None:
            if self.k_anneal_steps:
                raise InputError(f"k_anneal_steps = {self.k_anneal_steps} needs k_start, the k of the first step.")
        elif self.k_start != k and self.k_anneal_steps <= 0:
            # The published training script takes this silently and trains at k_start throughout.
            raise InputError(
                f"k_start = {self.k_start} differs from crosscoder.k = {k} but k_anneal_steps is 0, so k would never "
                "reach its target. Set k_anneal_steps, or remove k_start."
            )
        elif not 1 <= self.k_start <= dict_size:
            raise InputError(f"k_start is {self.k_start}; it must lie between 1 and dict_size = {dict_size}.")

    @property
    def n_steps(self) -> int:
        return self.n_tokens // self.batch_size


def require_positive(config: object, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise InputError(f"{name} is {getattr(config, name)}; give a number above 0.")


def require_range(config: object, low: float, high: float | None, *names: str) -> None:
    """Raise InputError for values below `low` or above `high`; None is no value."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not (low <= value and (high is None or value <= high)):
            raise InputError(f"{name} is {value}; give a number from {low}{'' if high is None else f' to {high}'}.")


def to_dict(config: Any) -> dict[str, Any]:
    """The resolved settings as plain data, in the order of their fields."""
    return asdict(config)


# ---------------------------------------------------------------------------------------------------------- presets

PRESETS: dict[str, dict[str, Any]] = {
    # Minder et al. 2025 (arXiv 2504.02922), Gemma-2-2B, layer 13, as in their training code: 50M FineWeb + 50M LMSYS
    # tokens for two epochs, no input normalisation, un-squared reconstruction norm.
    "paper-l1": {
        "crosscoder.dict_size": 73_728,
        "crosscoder.activation": "relu",
        "crosscoder.k": None,
        "n_tokens": 200_000_000,
        "batch_size": 2048,
        "lr": 1e-4,
        "lr_warmup_steps": 1000,
        "l1_coefficient": 0.041,
        "clip_norm": None,
        "decoder_init_norm": 0.005,
        "aux_coefficient": 0.0,
        "seed": 42,
    },
    "paper-batchtopk": {
        "crosscoder.dict_size": 73_728,
        "crosscoder.activation": "batchtopk",
        "crosscoder.k": 100,
        "n_tokens": 200_000_000,
        "batch_size": 2048,
        "lr": 1e-4,
        "lr_warmup_steps": 1000,
        "aux_coefficient": 1 / 32,
        "decoder_init_norm": 1.0,
        "b_dec_init": "geometric_median",
        "seed": 42,
    },
    # Minutes on two CPU cores, for a width of 128 (docs/log.md has the runs that decided it).
    "demo": {
        "crosscoder.dict_size": 1024,
        "crosscoder.activation": "batchtopk",
        "crosscoder.k": 24,
        "n_tokens": 2_457_600,
        "batch_size": 1024,
        "lr": 2e-3,
        "lr_warmup_steps": 50,
        "lr_decay_fraction": 0.2,
        "input_norm": "sqrt_d",
        "reconstruction": "squared",
        "decoder_init_norm": 0.3,
        "dead_after_tokens": 100_000,
        "threshold_start_step": 200,
        "threshold_beta": 0.99,
        "log_every": 50,
        "checkpoint_every": 600,
        "eval_every": 600,
    },
}
