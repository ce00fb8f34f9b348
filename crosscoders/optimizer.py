"""Adam as the training loop uses it: fused, clip folded in, learning rate by step."""

import torch

from crosscoders.config import TrainConfig
from crosscoders.model import Crosscoder


class Optimizer:
    """Fused Adam with the clip folded in.

    Fused Adam copies tensors that are not contiguous, so it works on contiguous tensors that share the parameters'
    memory (W_enc is stored latent by latent). Clipping has Adam divide by max(1, norm / clip_norm), which saves a pass.
    """

    def __init__(self, model: Crosscoder, config: TrainConfig) -> None:
        self.parameters = list(model.parameters())
        self.orders = [(2, 0, 1) if p is model.W_enc else tuple(range(p.ndim)) for p in self.parameters]
        self.shared = [p.data.permute(order) for p, order in zip(self.parameters, self.orders, strict=True)]
        assert all(tensor.is_contiguous() for tensor in self.shared)
        betas = (config.adam_beta1, config.adam_beta2)
        self.adam = torch.optim.Adam([t.requires_grad_() for t in self.shared], lr=config.lr, betas=betas, fused=True)
        self.clip_norm = config.clip_norm

    def step_(self, lr: float) -> None:
        """One step with the gradients of the last backward pass, which are then forgotten."""
        for tensor, parameter, order in zip(self.shared, self.parameters, self.orders, strict=True):
            assert parameter.grad is not None
            tensor.grad, parameter.grad = parameter.grad.permute(order), None
        if self.clip_norm is not None:
            norm = torch.nn.utils.get_total_norm([t.grad for t in self.shared if t.grad is not None])
            self.adam.grad_scale = ((norm + 1e-6) / self.clip_norm).clamp_min(1.0)  # type: ignore[attr-defined]
            self.adam.found_inf = torch.zeros((), device=norm.device)  # type: ignore[attr-defined]
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)


def lr_at(config: TrainConfig, step: int) -> float:
    """Linear warm-up, constant, linear fall to 0 over the last lr_decay_fraction of the steps."""
    rate = config.lr * min(1.0, (step + 1) / max(1, config.lr_warmup_steps))
    n_decay = int(config.lr_decay_fraction * config.n_steps)
    return rate * min(1.0, (config.n_steps - step) / n_decay) if n_decay else rate
