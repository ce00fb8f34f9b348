"""Settings of `diffing explore`."""

from dataclasses import dataclass
from typing import Literal

from crosscoders.common.checks import require_range


@dataclass(frozen=True)
class ExploreSettings:
    """A local page with both models of a run live; it ends with Ctrl-C."""

    run: str
    """Run folder of a crosscoder after `diffing scale`, or of `diffing topk-lora fit`, `diffing sae` or `diffing
    decompose`; a run that lies directly inside it can be looked at too."""
    cache: str | None = None
    """Folder of `crosscoders cache`, whose models are used. Default: the one that the run was trained on."""
    port: int = 0
    """Port on 127.0.0.1; 0: any that is free."""
    model_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type in which the models run; auto: bfloat16 on a GPU, float32 on a CPU."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        require_range(self, 0, 65535, "port")
