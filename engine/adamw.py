"""AdamW for a CPU (arXiv 1711.05101, algorithm 2), bit for bit torch.optim's and with its state.

Why not torch's: constructing it imports the compiler, two seconds and 150 MB that a run on a CPU need not spend.
"""

from collections.abc import Iterable

import torch
from torch import nn


class AdamW:
    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, betas=(0.9, 0.999), eps=1e-8,
                 weight_decay=0.0):
        self.defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fused": False}
        self.param_groups = [self.defaults | {"params": list(parameters)}]
        self.state = {}

    @torch.no_grad()
    def step(self) -> None:
        group = self.param_groups[0]
        rate, (beta1, beta2) = group["lr"], group["betas"]
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is None:
                continue
            if parameter not in self.state:
                self.state[parameter] = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(parameter),
                                         "exp_avg_sq": torch.zeros_like(parameter)}
            state = self.state[parameter]
            state["step"] += 1
            step = state["step"].item()                          # a number of the CPU: nothing to wait for
            parameter.mul_(1 - rate * group["weight_decay"])
            state["exp_avg"].lerp_(gradient, 1 - beta1)
            state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            spread = (state["exp_avg_sq"].sqrt() / (1 - beta2 ** step) ** 0.5).add_(group["eps"])
            parameter.addcdiv_(state["exp_avg"], spread, value=-rate / (1 - beta1 ** step))

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.grad = None


def make_optimizer(parameters: Iterable[nn.Parameter], rate: float, weight_decay: float,
                   device: torch.device):
    """AdamW: torch's fused one on CUDA, ours elsewhere."""
    if device.type == "cuda":
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=weight_decay, fused=True)
    return AdamW(parameters, lr=rate, weight_decay=weight_decay)
