"""Settings of a decomposition and of `diffing decompose`. Imports nothing heavy."""

from dataclasses import dataclass, field
from typing import Literal

from crosscoders.common.checks import require_positive, require_range
from crosscoders.common.errors import InputError
from diffing.topk_lora.settings import PairData


@dataclass(frozen=True, kw_only=True)
class DecompositionConfig:
    """How the pieces of the sites are trained; terms and their coefficients are those of docs/math.md."""

    components: int = 32
    """Rank-one pieces of each site; about twice what is alive at the end."""
    network: Literal["scalar", "shared"] = "shared"
    """Importance network. scalar: one of v_c . x for each piece. shared: one of the whole input for each site."""
    hidden: int = 64
    """Hidden width of it."""
    steps: int = 2000
    """Training steps."""
    lr: float = 3e-3
    """Peak rate of Adam, falling as a cosine."""
    lr_end: float = 0.0
    """Share of it that is left at the end."""
    warmup_steps: int = 200
    """Steps on the faithfulness alone, before the first."""
    warmup_lr: float = 1e-2
    """Rate of these."""
    faithfulness: float = 1.0
    """Coefficient of what the pieces leave out of the change."""
    stochastic: float = 0.5
    """Coefficient of the reconstruction under random masks at random sites."""
    adversarial: float = 0.5
    """Coefficient of the reconstruction under the adversary's masks at all sites; 0 saves two thirds of the time."""
    importance: float = 1e-3
    """Coefficient of importance minimality; the first to tune, in steps of 3."""
    frequency: float = 1e-4
    """Coefficient of the frequency term."""
    reference_positions: float | None = None
    """Positions that the frequency term counts with; None: those of a batch."""
    penalty: Literal["smooth-l0", "power"] = "smooth-l0"
    """What an importance costs."""
    gamma_start: float = 1.0
    """Width of smooth-l0 at the first step, falling linearly."""
    gamma_end: float = 0.01
    """At the last."""
    p_start: float = 2.0
    """Exponent of power at the first step, falling linearly."""
    p_end: float = 0.4
    """At the last."""
    adversary_lr: float = 0.01
    """Rate of the adversary, after a warm-up over the first 2.5% of steps."""
    adversary_steps: int = 2
    """Ascents in each step before the one that it shares with training."""
    clip: float | None = None
    """Largest gradient norm of all pieces together; the networks are not clipped."""
    seed: int = 0
    """Of the start, the masks and the order of the data."""

    def __post_init__(self) -> None:
        require_positive(self, "components", "hidden", "steps", "lr", "gamma_start", "gamma_end", "p_start", "p_end")
        require_range(self, 0, None, "faithfulness", "stochastic", "adversarial", "importance", "frequency")
        require_range(self, 0, None, "warmup_steps", "adversary_steps", "adversary_lr")
        require_range(self, 0, 1, "lr_end")
        if not self.stochastic + self.adversarial > 0:
            raise InputError("stochastic and adversarial are both 0, so nothing says what the pieces do. Set one.")


VPD_PAPER: dict[str, object] = {
    "penalty": "power", "p_start": 2.0, "p_end": 0.4, "importance": 2e-4, "frequency": 1e-4, "faithfulness": 1e7,
    "stochastic": 0.5, "adversarial": 0.5, "lr": 5e-5, "lr_end": 0.1, "clip": 0.01, "adversary_lr": 0.01,
    "adversary_steps": 2, "warmup_steps": 400, "warmup_lr": 1e-3, "steps": 400_000,
}  # fmt: skip
"""The published run of a language model. Its coefficients are of distances as they are, and of one model's weights."""


@dataclass(frozen=True, kw_only=True)
class DecomposeSettings(PairData, DecompositionConfig):
    """Decompose what a fine-tune changed in linear maps into rank-one pieces, a LoRA between its factors."""

    out: str
    """Run folder; a run that was stopped goes on with the same command."""
    sites: list[str] = field(default_factory=lambda: ["*"])
    """Linear maps to decompose, as patterns of their names, such as '*.mlp.down_proj'."""
    compare: list[str] = field(default_factory=list)
    """Finished runs of the same sites with other seeds, whose pieces are looked for."""
    prompt: str | None = None
    """A question whose graph of pieces is drawn, as graph.html."""
    top: int = 10
    """Pieces whose effect on the predictions is measured and printed."""
    attack_steps: int = 20
    """Steps of a fresh adversary in the read-outs; four times as many are taken to see its plateau."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_data()
        require_positive(self, "top", "attack_steps")
        if not self.sites:
            raise InputError("sites is empty. Give patterns of the linear maps to decompose, such as '*'.")
