"""TopK and JumpReLU SAEs by SAELens's own trainer, on activations of the embedded base model."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.sae_lora_gap.setting import HOOK_POINT
from crosscoders.dictionary.metrics import Evaluation, ReconstructionSums
from sae_lora.dictionaries.frozen import FrozenDictionary


class Design(NamedTuple):
    """What an SAE is, and where."""

    architecture: str
    sparsity: float
    """k, or the coefficient of L0."""
    dict_size: int = 1024
    hook_point: str = HOOK_POINT


DICTIONARIES = {
    "topk-8": Design("topk", 8),
    "topk-16": Design("topk", 16),
    "topk-32": Design("topk", 32),
    "jumprelu-8": Design("jumprelu", 4.0),
    "jumprelu-16": Design("jumprelu", 0.39),
    "jumprelu-32": Design("jumprelu", 0.11),
}
"""The coefficients were chosen for an L0 near that of the TopK SAE of the same name; what it came to is a row."""
SWEPT = {
    "topk-16-width_512": Design("topk", 16, dict_size=512),
    "topk-16-width_2048": Design("topk", 16, dict_size=2048),
    "topk-16-layer_0": Design("topk", 16, hook_point="blocks.0.hook_resid_post"),
    "topk-16-layer_2": Design("topk", 16, hook_point="blocks.2.hook_resid_post"),
}
"""topk-16 with another width or on another layer."""
BATCH = 1024
LR = 2e-3


def make_sae(design: Design, d_model: int, seed: int = 0) -> Any:
    """Return a training SAE of SAELens, with its start."""
    from sae_lens import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig

    common: dict[str, Any] = {
        "d_in": d_model, "d_sae": design.dict_size, "apply_b_dec_to_input": False, "decoder_init_norm": 0.1,
        "normalize_activations": "expected_average_only_in",
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if design.architecture == "topk":
            sae: Any = TopKTrainingSAE(TopKTrainingSAEConfig(k=int(design.sparsity), **common))
        else:
            sae = JumpReLUTrainingSAE(
                # From SAELens's threshold of 0.01 no coefficient came below L0 13.9 in so few steps; 10 came to 39.
                JumpReLUTrainingSAEConfig(
                    l0_coefficient=design.sparsity,
                    l0_warm_up_steps=200,
                    jumprelu_init_threshold=0.3,
                    jumprelu_bandwidth=0.1,
                    **common,
                )
            )
    sae.cfg.metadata.hook_name = design.hook_point
    return sae


def train_sae(sae: Any, x: Float[Tensor, "tokens d_model"], n_tokens: int, folder: Path, seed: int = 0) -> None:
    """Reconstruct x, and save a folder that `sae_lora.load_dictionary` reads."""
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    config = SAETrainerConfig(
        total_training_samples=n_tokens,
        train_batch_size_samples=BATCH,
        lr=LR,
        lr_end=LR / 10,
        lr_warm_up_steps=50,
        lr_decay_steps=n_tokens // BATCH // 5,
        dead_feature_window=100,
        n_batches_for_norm_estimate=20,
        logger=LoggingConfig(log_to_wandb=False),
    )
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
        SAETrainer(config, sae, shuffled(x, seed)).fit()
    sae.save_inference_model(folder)


def shuffled(x: Float[Tensor, "tokens d_model"], seed: int) -> Iterator[Float[Tensor, "batch d_model"]]:
    """Yield batches of all tokens in a new order for each pass, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(x), generator=generator)
        for chosen in order[: len(x) // BATCH * BATCH].split(BATCH):
            yield x[chosen]


@torch.no_grad()
def quality(dictionary: FrozenDictionary, x: Float[Tensor, "tokens d_model"]) -> Evaluation:
    """Return the FVE, L0 and dead fraction, on tokens that were not trained on."""
    sums = ReconstructionSums(1, x.shape[1], dictionary.info.dict_size)
    for part in x.split(4096):
        latents = dictionary.encode(part)
        sums.add(part[:, None], dictionary.decode(latents)[:, None], (latents != 0).sum(dim=0))
    return sums.result()
