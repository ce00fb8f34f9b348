"""Adam as the training loop uses it: one pass over memory, clip folded in, learning rate by step."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from crosscoders.dictionary.crosscoder import Crosscoder
from crosscoders.kernels import cpu
from crosscoders.kernels.library import usable
from crosscoders.training.adam8 import adam_8bit
from crosscoders.training.settings import TrainConfig


class Optimizer:
    """Adam with the clip folded in: gradients count times min(1, clip_norm / norm), which saves a pass.

    It works on contiguous tensors that share the parameters' memory (W_enc is stored latent by latent). `adam` holds
    the state in torch's form; the step itself is torch's fused one, or on a CPU the compiled one, which also gives the
    norms of the new decoders. With 8-bit moments it is torchao's.
    """

    def __init__(self, model: Crosscoder, config: TrainConfig) -> None:
        self.parameters = list(model.parameters())
        self.orders = [(2, 0, 1) if p is model.W_enc else tuple(range(p.ndim)) for p in self.parameters]
        self.shared = [p.data.permute(order) for p, order in zip(self.parameters, self.orders, strict=True)]
        assert all(tensor.is_contiguous() for tensor in self.shared)
        self.clip_norm, self.betas = config.clip_norm, (config.adam_beta1, config.adam_beta2)
        leaves, self.is_8bit = [t.requires_grad_() for t in self.shared], config.adam_bits == 8
        self.adam: torch.optim.Optimizer = (
            adam_8bit(leaves, self.betas) if self.is_8bit else torch.optim.Adam(leaves, betas=self.betas, fused=True)
        )
        self.W_dec, self.norms = model.W_dec, torch.empty(0)
        self.is_compiled = not self.is_8bit and usable(*(tensor.detach() for tensor in self.shared))

    def decoder_norms(self) -> Float[Tensor, "dict_size n_models"]:
        """Norms of the decoders as they are now, ||d_jm||; after a compiled step they are known already."""
        if not self.is_compiled:
            return self.W_dec.detach().norm(dim=2)
        if not len(self.norms):
            self.norms = cpu.row_norms(self.W_dec.detach().flatten(0, 1))
        return self.norms.view(self.W_dec.shape[:2])

    def step_(self, lr: float, weight_squares: Sequence[Tensor] = ()) -> None:
        """One step with the gradients of the last backward pass, which are then forgotten.

        weight_squares: terms of the sum of squares of the gradients of W_enc and W_dec, where it is known already.
        """
        for tensor, parameter, order in zip(self.shared, self.parameters, self.orders, strict=True):
            assert parameter.grad is not None
            tensor.grad, parameter.grad = parameter.grad.permute(order), None
        divisor = torch.ones((), device=self.W_dec.device)
        if self.clip_norm is not None:
            norm = self._gradient_norm(weight_squares)
            divisor = ((norm + 1e-6) / self.clip_norm).clamp_min(1.0)
        if self.is_compiled:
            self._compiled_step(lr, 1 / divisor.item())
        elif self.is_8bit:
            torch._foreach_div_([tensor.grad for tensor in self.shared if tensor.grad is not None], divisor)
            for group in self.adam.param_groups:
                group["lr"].fill_(lr)
            self.adam.step()
        else:
            self.adam.grad_scale, self.adam.found_inf = divisor, torch.zeros_like(divisor)  # type: ignore[attr-defined]
            for group in self.adam.param_groups:
                group["lr"] = lr
            self.adam.step()
        self.adam.zero_grad(set_to_none=True)

    def _gradient_norm(self, weight_squares: Sequence[Tensor]) -> Float[Tensor, ""]:
        """Euclidean norm of all gradients together."""
        grads = [tensor.grad for tensor in self.shared if tensor.grad is not None]
        if weight_squares:
            biases = [grad.square().sum() for grad in grads if grad.ndim < 3]
            return torch.stack([*weight_squares, *biases]).sum().sqrt().float()
        if self.is_compiled:
            return torch.tensor(sum(cpu.sum_squares(grad.contiguous()) for grad in grads)).sqrt()
        return torch.nn.utils.get_total_norm(grads)

    def _compiled_step(self, lr: float, scale: float) -> None:
        for tensor, parameter in zip(self.shared, self.parameters, strict=True):
            state = self.adam.state[tensor]
            if not state:
                state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(tensor)}
                state["exp_avg_sq"] = torch.zeros_like(tensor)
            gradient, norms = tensor.grad, None
            assert gradient is not None
            if parameter is self.W_dec:
                norms = self.norms = torch.empty(parameter.shape[0] * parameter.shape[1])
            rows, gradient = tensor.detach(), gradient.contiguous()
            cpu.adam_(rows, gradient, state, scale=scale, lr=lr, betas=self.betas, norms=norms)


def lr_at(config: TrainConfig, step: int) -> float:
    """Linear warm-up, constant, linear fall to 0 over the last lr_decay_fraction of the steps."""
    rate = config.lr * min(1.0, (step + 1) / max(1, config.lr_warmup_steps))
    n_decay = int(config.lr_decay_fraction * config.n_steps)
    return rate * min(1.0, (config.n_steps - step) / n_decay) if n_decay else rate
