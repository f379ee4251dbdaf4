"""Held-out pairs during training: rewards, margins, accuracies by direction, and the NLL of right responses.

TRL's metric names, with a side behind each: `en` the source, `tgt` all targets, and where there are several
targets each of them as `tgt_sw`. In metrics.jsonl held-out rewards and log-probs are called `eval_...`: the
names without it are of a step's own pairs. Watch nll_en: a preference loss alone lets it rise.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

import model as llama
from engine import ranks, scale
from engine.progress import progress
from evals.report import HELD_OUT

SAMPLE_ROWS = 2                 # held-out rows whose questions every validation asks

Metrics = dict[str, float]
Sums = list[Tensor]             # of each batch the log-probs of its continuations, (S,)


def sides(side: Tensor, targets: list[str]) -> dict[str, Tensor]:
    """Masks of the directions that metrics are split by, those without a member left out. side (P,) as in
    data.Batch."""
    masks = {"en": side == 0, "tgt": side > 0}
    if len(targets) > 1:
        for number, target in enumerate(targets, 1):
            masks[f"tgt_{target}"] = side == number
    return {name: mask for name, mask in masks.items() if mask.any()}


def rewards_and_logps(batch, logp: Tensor, ref: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Of the pairs of a data.Batch, (2, P): chosen, rejected; from log-probs (S,) of its continuations.
    Rewards are DPO's whatever the preference: of sums, against the reference."""
    pair = torch.stack((batch.chosen, batch.rejected))
    return beta * (logp - ref)[pair], logp[pair]


def pair_metrics(rewards: Tensor, logps: Tensor, side: Tensor, targets: list[str]) -> Metrics:
    """Means over the pairs of each direction. rewards, logps (2, P): chosen, rejected; side (P,)."""
    values = {
        "rewards/chosen": rewards[0],
        "rewards/rejected": rewards[1],
        "rewards/margins": rewards[0] - rewards[1],
        "rewards/accuracies": (rewards[0] > rewards[1]).double(),
        "logps/chosen": logps[0],
        "logps/rejected": logps[1]}
    metrics = {}
    for name, mask in sides(side, targets).items():
        for key, value in values.items():
            mean = value[mask].mean()
            metrics[f"{key}_{name}"] = mean.item()
    return metrics


def step_metrics(result: dict[str, Tensor], batches: list, targets: list[str], started: float) -> dict:
    """What metrics.jsonl says of an optimiser step (clo.train_step's result) that began at `started`. Here a
    step waits for the device, and nowhere before."""
    metrics = {
        "loss": result["loss"].item(),
        "nll": result["nll"].item(),
        "grad_norm": result["grad_norm"].item()}
    seconds = time.perf_counter() - started
    side = torch.cat([batch.side[batch.chosen] for batch in batches])
    rewards, logps = result["rewards"].cpu(), result["logps"].cpu()
    metrics |= pair_metrics(rewards, logps, side, targets)
    tokens = sum(batch.used for batch in batches)
    return metrics | {
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "seconds": seconds,
        "peak_memory_gb": scale.peak_memory_gb()}


@torch.no_grad()
def summed_logps(model, batches: list, label: str) -> Sums:
    """continuation_logps of every batch in order, on the CPU: the code path of training without gradient."""
    shares = ranks.deal(len(batches))
    sums = []
    for i, counted in progress(shares, desc=label, unit="batch"):
        batch = batches[i].to(model.head.device)
        logp = llama.continuation_logps(model, batch)
        if counted:
            sums.append(logp.cpu())
    return ranks.gather(sums)


def sample_answers(model, forks: list, tokenizer, max_tokens: int) -> list[dict]:
    """Greedy answers to the prompts of forks: numbers can look well while the text does not."""
    prompts = [fork.prompt for fork in forks]
    with progress(total=len(forks), desc="sample answers", unit="reply", leave=False) as bar:
        replies = llama.generate(model, prompts, max_tokens, tokenizer.stop_ids,
                                 progress=bar.update)
    answers = []
    for fork, reply in zip(forks, replies):
        expected = fork.continuations[0]
        answers.append({
            "row_id": fork.row,
            "language": fork.language,
            "reply": tokenizer.decode(reply).strip(),
            "expected": tokenizer.decode(expected).strip()})
    return answers


@dataclass
class Validation:
    """The held-out rows of a run, and how the model that is being trained stands on them."""
    batches: list                   # every pair and every right response
    groups: list                    # their forks, a group a row
    tokenizer: object
    max_tokens: int                 # of a sample answer
    beta: float
    targets: list[str]
    untrained: list | None = field(default=None, init=False)      # the untrained model's answers, once known
    base: Sums | None = field(default=None, init=False)           # under the untrained model
    policy: Sums | None = field(default=None, init=False)         # under the model as it is; None: not known

    def begin(self, base: Sums) -> None:
        """With an untrained model."""
        self.base = self.policy = base

    def of_stage(self, model, stage: str, before: Sums) -> Callable[[int], dict]:
        """What the loop calls with a step's number. before: under the model that the stage begins with."""
        self.policy = None
        return partial(self.report, model, stage, before)

    def report(self, model, stage: str, before: Sums, step: int) -> dict:
        """Figures and sample answers for metrics.jsonl, printed too. All methods begin with one untrained
        model: it is asked once."""
        first = step == 0
        self.policy = before if first else summed_logps(model, self.batches, f"validate {stage}")
        untrained = first and before is self.base
        answers = self.untrained if untrained else None
        if answers is None:
            forks = [fork for group in self.groups[:SAMPLE_ROWS] for fork in group]
            answers = sample_answers(model, forks, self.tokenizer, self.max_tokens)
        if untrained:
            self.untrained = answers
        figures = pair_figures(self.batches, self.policy, before, self.beta, self.targets)
        tqdm.write(validation_text(step, figures, answers))
        return {logged_name(key): value for key, value in figures.items()} | {"answers": answers}

    def score(self, model) -> Metrics:
        """Against the untrained model."""
        if self.policy is None:                                    # trained before this command began
            self.policy = summed_logps(model, self.batches, "held-out")
        return pair_figures(self.batches, self.policy, self.base, self.beta, self.targets)


def logged_name(figure: str) -> str:
    """How metrics.jsonl names a held-out figure. Of its own pairs a step tells no `nll_...`."""
    return figure if figure.startswith("nll_") else f"eval_{figure}"


def pair_figures(batches: list, policy: Sums, reference: Sums, beta: float,
                 targets: list[str]) -> Metrics:
    """Metrics of held-out batches from their sums under the policy and the reference."""
    pairs = [rewards_and_logps(batch, now, before, beta)
             for batch, now, before in zip(batches, policy, reference)]
    rewards, logps = (torch.cat(parts, 1) for parts in zip(*pairs))
    side = torch.cat([batch.side[batch.chosen] for batch in batches])
    metrics = pair_metrics(rewards, logps, side, targets)
    nll = torch.cat([-now[batch.right] for batch, now in zip(batches, policy)])
    tokens = torch.cat([batch.length[batch.right] for batch in batches])
    side = torch.cat([batch.side[batch.right] for batch in batches])
    for name, mask in sides(side, targets).items():
        mean = nll[mask].sum() / tokens[mask].sum()
        metrics[f"nll_{name}"] = mean.item()
    return metrics


def validation_text(step: int, metrics: dict, answers: list[dict]) -> str:
    """What the loop prints of a validation: a line of figures by side, a line for each sample answer."""
    parts = []
    for name, figure in HELD_OUT.items():
        start = f"{figure}_"
        figures = []
        for key, value in metrics.items():
            if key.startswith(start):
                figures.append(f"{key.removeprefix(start)} {value:.3f}")
        parts.append(f"{name} {', '.join(figures)}")
    text = f"held-out, step {step}: {'; '.join(parts)}"
    for answer in answers:
        text += f"\n    {answer['language']}: {answer['reply']}"
        if answer["reply"] != answer["expected"]:
            text += f"  (expected: {answer['expected']})"
    return text
