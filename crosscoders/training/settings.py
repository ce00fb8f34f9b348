"""Settings of training and of `crosscoders train | eval`, and the presets. Imports nothing heavy."""

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from crosscoders.common.checks import require_positive, require_range
from crosscoders.common.errors import InputError
from crosscoders.dictionary.settings import CrosscoderConfig


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
    """Step from which the inference threshold of batchtopk is tracked, for states in the middle of a run. Before each
    evaluation and at the end it is set from held-out tokens, or the last ones of training, so that L0 equals k."""
    threshold_beta: float = 0.999
    """Decay of the running inference threshold."""
    input_norm: Literal["none", "sqrt_d", "centred"] = "none"
    """centred: each model's mean is taken off, then one scale per model makes E||x||^2 = d_model. sqrt_d: the scale
    alone, so that E||x|| = sqrt(d_model). none: raw activations. Mean and scale are kept with the weights."""
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
        for name in ("lr_warmup_steps", "l1_warmup_steps", "k_anneal_steps"):
            if getattr(self, name) >= self.n_steps:
                raise InputError(
                    f"{name} = {getattr(self, name)} but the run has {self.n_steps} steps, so it would end before the "
                    f"{'warm-up' if 'warmup' in name else 'annealing'} does. Lower {name}, or raise n_tokens."
                )
        if self.k_aux is not None and self.k_aux < 1:
            raise InputError(f"k_aux is {self.k_aux}; give a number above 0, or aux_coefficient = 0 for no such term.")
        if self.crosscoder.activation == "jumprelu":
            raise InputError("crosscoder.activation 'jumprelu' is read, not trained. Use 'batchtopk' or 'relu'.")
        if self.crosscoder.activation == "batchtopk":
            if self.l1_coefficient or self.l1_warmup_steps:
                raise InputError(
                    "l1_coefficient and l1_warmup_steps have no effect with activation 'batchtopk'. "
                    "Set them to 0, or use 'relu'."
                )
            self._check_annealing()
        elif self.k_start is not None or self.k_anneal_steps:
            raise InputError("k_start and k_anneal_steps have no effect with activation 'relu'. Remove them.")
        elif not self.l1_coefficient:
            raise InputError(
                "activation 'relu' with l1_coefficient = 0 has nothing that makes latents sparse. Set l1_coefficient, "
                "or use 'batchtopk'."
            )

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


@dataclass(frozen=True)
class TrainSettings(TrainConfig):
    """Train a crosscoder on a cache of paired activations, or on the models themselves."""

    cache: str | None = None
    """Folder of `crosscoders cache`."""
    out: str = field(kw_only=True)
    """Run folder; an interrupted run there goes on."""
    live: str | None = None
    """In place of a cache: the YAML file of `crosscoders cache --config`. The models run while training reads their
    activations, and nothing is stored; the batches are those of the cache. `out` in it has no meaning here."""
    mean_norm: list[float] | None = None
    """With live: mean of ||x|| of base and tuned, for input_norm sqrt_d; default: that of the first 16,384 tokens, as
    the mean of input_norm centred is. With the numbers of the cache (`crosscoders cache --json`), the weights are those
    of training on the cache."""
    eval_cache: str | None = None
    """Cache of held-out documents."""
    wandb: str | None = None
    """Weights & Biases project that gets every line of train.jsonl too (needs the extra `wandb`)."""
    force: bool = False
    """Go on where the estimate of memory is above what the machine has."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.cache is None) == (self.live is None):
            raise InputError("train needs one of the two: --cache FOLDER, or --live CONFIG.yaml.")
        if self.mean_norm is not None:
            if self.cache is not None:
                raise InputError("mean_norm has no effect with cache, which has its own. Remove it.")
            if self.input_norm != "sqrt_d":
                raise InputError(f"mean_norm has no effect with input_norm {self.input_norm!r}. Remove it.")
            if len(self.mean_norm) != 2 or not all(0 < value < float("inf") for value in self.mean_norm):
                raise InputError(f"mean_norm is {self.mean_norm}; give two numbers above 0: [base, tuned].")


@dataclass(frozen=True)
class EvalSettings:
    """FVE, L0 and dead latents of a crosscoder on a cache."""

    run: str
    """Run folder, crosscoder folder or hub repository."""
    cache: str
    """Folder of `crosscoders cache`, best with documents that were not trained on."""
    n_tokens: int | None = None
    """Tokens to read; default: all."""
    out: str | None = None
    """JSON file for the results."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        require_range(self, 1, None, "n_tokens")


# ---------------------------------------------------------------------------------------------------------- presets

SCHEDULE_SHARES = {
    "lr_warmup_steps": 0.1,
    "l1_warmup_steps": 0.1,
    "k_anneal_steps": 0.5,
    "threshold_start_step": 0.5,
    "dead_after_tokens": 0.1,
}
"""Largest share of a run that a preset's schedule may take."""


def fit_to_length(preset: dict[str, Any], n_tokens: int, batch_size: int) -> dict[str, Any]:
    """Return a preset whose schedule fits a run of `n_tokens`: what would take more than its share is shortened.

    A run of the preset's own length keeps every value.
    """
    n_steps = n_tokens // batch_size
    defaults = {field.name: field.default for field in fields(TrainConfig)}
    limits = {
        name: int(share * (n_tokens if name.endswith("tokens") else n_steps)) for name, share in SCHEDULE_SHARES.items()
    }
    return preset | {name: min(preset.get(name, defaults[name]), limit) for name, limit in limits.items()}


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
        "input_norm": "centred",
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
