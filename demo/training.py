"""The optimisation loop that the demo's two models share."""

import math
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

WEIGHT_DECAY, BETAS, MAX_GRADIENT = 0.05, (0.9, 0.98), 1.0
WARMUP = 0.03  # part of the steps
SHOW_EVERY = 20  # steps
POOL = 40  # batches whose examples are sorted by length together


@dataclass(frozen=True)
class Schedule:
    """Steps of about `batch_tokens`; the learning rate climbs to `peak_rate`, then falls as a cosine."""

    steps: int
    batch_tokens: int
    peak_rate: float

    def rate(self, step: int) -> float:
        warmup_steps = max(1, WARMUP * self.steps)
        if step < warmup_steps:
            return self.peak_rate * (step + 1) / (warmup_steps + 1)
        done = (step - warmup_steps) / (self.steps - warmup_steps)
        return self.peak_rate * 0.5 * (1 + math.cos(math.pi * done))


def length_batches(examples: Iterator, length: Callable, batch_tokens: int, rng: random.Random) -> Iterator:
    """Cuts an endless stream into lists of examples of like length, `batch_tokens` with padding."""
    while True:
        pool, tokens = [], 0
        while tokens < POOL * batch_tokens:
            pool.append(next(examples))
            tokens += length(pool[-1])
        pool.sort(key=length)
        batches, batch = [], []
        for example in pool:  # sorted, so the newest is the longest
            if batch and (len(batch) + 1) * length(example) > batch_tokens:
                batches.append(batch)
                batch = []
            batch.append(example)
        batches.append(batch)
        rng.shuffle(batches)
        yield from batches


def endless(items: list, rng: random.Random) -> Iterator:
    """The items again and again, each round in another order."""
    while True:
        yield from rng.sample(items, len(items))


def padded(rows: list[list[int]], fill: int) -> Tensor:
    """(B, T) int64, filled on the right."""
    width = max(map(len, rows))
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])


def drop_parts(directory: Path) -> None:
    """Delete what a killed build would have gone on with."""
    for part in directory.glob("part-*"):
        shutil.rmtree(part)


def fit(model: nn.Module, batches: Iterator, loss_of: Callable, schedule: Schedule, name: str, line: int):
    """AdamW over the schedule's batches; `line` of the screen holds the progress bar."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    optimiser = torch.optim.AdamW([{"params": matrices, "weight_decay": WEIGHT_DECAY},
                                   {"params": vectors, "weight_decay": 0.0}], betas=BETAS, fused=True)
    model.train().requires_grad_(True)
    bar = tqdm(range(schedule.steps), desc=name, position=line, mininterval=1.0)
    for step in bar:
        for group in optimiser.param_groups:
            group["lr"] = schedule.rate(step)
        loss = loss_of(next(batches))
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT)
        optimiser.step()
        if step % SHOW_EVERY == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval().requires_grad_(False)
