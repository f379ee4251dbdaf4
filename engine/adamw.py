"""AdamW for a CPU (arXiv 1711.05101, algorithm 2): torch's arithmetic without its optimizer class.

Constructing that class imports the compiler, two seconds and 150 MB that a run on a CPU need not spend.
"""

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim.adamw import adamw


class AdamW:
    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0):
        self.param_groups = [{"params": list(parameters), "lr": lr, "weight_decay": weight_decay}]
        self.state = {}

    @torch.no_grad()
    def step(self) -> None:
        group = self.param_groups[0]
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        for parameter in parameters:
            if parameter not in self.state:
                self.state[parameter] = {"step": torch.zeros(()),
                                         "exp_avg": torch.zeros_like(parameter),
                                         "exp_avg_sq": torch.zeros_like(parameter)}
        states = [self.state[parameter] for parameter in parameters]
        adamw(parameters,
              [parameter.grad for parameter in parameters],
              [state["exp_avg"] for state in states],
              [state["exp_avg_sq"] for state in states],
              max_exp_avg_sqs=[],
              state_steps=[state["step"] for state in states],
              foreach=False, amsgrad=False, maximize=False,
              beta1=0.9, beta2=0.999, eps=1e-8,
              lr=group["lr"], weight_decay=group["weight_decay"])

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.grad = None


def make_optimizer(parameters: Iterable[nn.Parameter], rate: float, weight_decay: float,
                   device: torch.device):
    """AdamW: torch's fused one on CUDA, ours elsewhere."""
    if device.type == "cuda":
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=weight_decay, fused=True)
    return AdamW(parameters, lr=rate, weight_decay=weight_decay)
