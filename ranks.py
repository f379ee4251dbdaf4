"""Many processes, one result: what clo.py and translate.py need when torchrun starts them on several devices.

    torchrun --nproc-per-node 2 clo.py --lang sw

Work is dealt to ranks item by item (rank r takes r, r + size, ...) and collected in order, so a result does not depend on
how many ranks there are beyond floating-point summation order. Files are written by the first rank alone. Started without
torchrun there is one rank, and every function here is the identity.
"""

import os
import sys
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

LONGEST_WAIT = timedelta(days=1)             # ranks wait while the first one translates or answers


def start(device: str) -> torch.device:
    """Join the other processes; this one's device: its own GPU of `device` cuda. Only the first rank prints."""
    if "RANK" not in os.environ:
        return torch.device(device)
    cuda = device.startswith("cuda")
    dist.init_process_group("nccl" if cuda else "gloo", timeout=LONGEST_WAIT)
    if rank():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if cuda else device)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def mine(items: list) -> list:
    """This rank's share of a list that every rank has."""
    return items[rank()::size()]


def collect(own: list) -> list:
    """The whole list, in order, from every rank's results for its share."""
    if size() == 1:
        return own
    shares: list = [None] * size()
    dist.all_gather_object(shares, own)
    return [shares[i % size()][i // size()] for i in range(sum(map(len, shares)))]


def on_first(work: Callable):
    """work() done by the first rank alone; every rank gets its result, or raises its error."""
    if size() == 1:
        return work()
    told: list = [None, None]
    if rank() == 0:
        try:
            told = [work(), None]
        except (ValueError, OSError) as error:
            told = [None, error]
    dist.broadcast_object_list(told, src=0)
    if told[1] is not None:
        raise told[1]
    return told[0]


def sum_gradients_(parameters) -> None:
    """Replace every gradient by its sum over ranks, in one message. A rank without work counts as zero."""
    if size() == 1:
        return
    parameters = list(parameters)
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([parameter.grad.reshape(-1) for parameter in parameters])
    dist.all_reduce(flat)
    for parameter, part in zip(parameters, flat.split([parameter.numel() for parameter in parameters])):
        parameter.grad = part.view_as(parameter)


def largest(number: int, device: torch.device) -> int:
    """The largest of every rank's number: how one rank's signal becomes everybody's."""
    if size() == 1:
        return number
    value: Tensor = torch.tensor(number, device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)
