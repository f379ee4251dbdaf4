"""Held-out pairs during training: rewards, margins and accuracies split by direction, and the NLL of right responses.

TRL's metric names, with a side behind each: `en` the source, `tgt` all targets, and where there are several
targets each of them as `tgt_sw`. Watch nll_en: a preference loss alone lets it rise.
"""

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

import model as llama
from engine import ranks, scale
from engine.progress import progress

SHOWN = {"nll": "nll_", "accuracy": "rewards/accuracies_", "margin": "rewards/margins_"}
SAMPLE_ROWS = 2                 # held-out rows whose questions every validation asks


def sides(side: Tensor, targets: list[str]) -> dict[str, Tensor]:
    """Masks of the directions that metrics are split by, those without a member left out. side (P,) as in
    data.Batch."""
    masks = {"en": side == 0, "tgt": side > 0}
    if len(targets) > 1:
        masks |= {f"tgt_{target}": side == number for number, target in enumerate(targets, 1)}
    return {name: mask for name, mask in masks.items() if mask.any()}


def pair_metrics(rewards: Tensor, logps: Tensor, side: Tensor, targets: list[str]) -> dict[str, float]:
    """Means over the pairs of each direction. rewards, logps (2, P): chosen, rejected; side (P,)."""
    metrics = {}
    for name, mask in sides(side, targets).items():
        chosen, rejected = rewards[:, mask]
        values = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": (chosen > rejected).double(),
            "logps/chosen": logps[0, mask],
            "logps/rejected": logps[1, mask]}
        metrics |= {f"{key}_{name}": value.mean().item() for key, value in values.items()}
    return metrics


def step_metrics(result: dict[str, Tensor], batches: list, targets: list[str], started: float) -> dict:
    """What metrics.jsonl says of an optimiser step (clo.train_step's result) that began at `started`. Here a
    step waits for the device, and nowhere before."""
    metrics = {name: result[name].item() for name in ("loss", "nll", "grad_norm")}
    seconds = time.perf_counter() - started
    side = torch.cat([batch.side[batch.chosen] for batch in batches])
    metrics |= pair_metrics(result["rewards"].cpu(), result["logps"].cpu(), side, targets)
    tokens = sum(batch.used for batch in batches)
    return metrics | {"tokens": tokens, "tokens_per_second": tokens / seconds, "seconds": seconds,
                      "peak_memory_gb": scale.peak_memory_gb()}


@torch.no_grad()
def summed_logps(model: llama.Llama, batches: list, label: str) -> list[Tensor]:
    """continuation_logps of every batch in order, on the CPU: the code path of training without gradient."""
    shares = ranks.deal(len(batches))
    sums = []
    for i, counted in progress(shares, desc=label, unit="batch", disable=not label):
        logp = llama.continuation_logps(model, batches[i].to(model.head.device)).cpu()
        if counted:
            sums.append(logp)
    return ranks.gather(sums)


def sample_answers(model: llama.Llama, forks: list, tokenizer, max_tokens: int) -> list[dict]:
    """Greedy answers to the prompts of forks: numbers can look well while the text does not."""
    decode = tokenizer.decode
    with progress(total=len(forks), desc="sample answers", unit="reply", leave=False) as bar:
        replies = llama.generate(model, [fork.prompt for fork in forks], max_tokens, tokenizer.stop_ids,
                                 progress=bar.update)
    return [{"row_id": fork.row, "language": fork.language, "reply": decode(reply).strip(),
             "expected": decode(fork.continuations[0]).strip()} for fork, reply in zip(forks, replies)]


@dataclass
class Validation:
    """The held-out rows of a run, and how a model stands on them."""
    steps: list                     # packed steps of batches, every pair among them
    groups: list                    # their forks, a group a row
    tokenizer: object
    max_tokens: int                 # of a sample answer
    beta: float
    targets: list[str]
    untrained: list | None = field(default=None, init=False)      # the untrained model's answers, once known

    @property
    def batches(self) -> list:
        return [batch for step in self.steps for batch in step]

    def logps(self, model: llama.Llama, label: str) -> list[Tensor]:
        return summed_logps(model, self.batches, label)

    def score(self, policy: list[Tensor], reference: list[Tensor]) -> dict[str, float]:
        return score(self.batches, policy, reference, self.beta, self.targets)

    def report(self, model: llama.Llama, step: int, policy: list[Tensor], reference: list[Tensor],
               untrained: bool) -> dict:
        """Figures and sample answers for metrics.jsonl, printed too. All methods begin with one untrained model:
        it is asked once."""
        answers = self.untrained if untrained else None
        if answers is None:
            forks = [fork for group in self.groups[:SAMPLE_ROWS] for fork in group]
            answers = sample_answers(model, forks, self.tokenizer, self.max_tokens)
        if untrained:
            self.untrained = answers
        figures = self.score(policy, reference)
        tqdm.write(describe(step, figures, answers))
        return figures | {"answers": answers}


def score(batches: list, policy: list[Tensor], reference: list[Tensor], beta: float,
          targets: list[str]) -> dict[str, float]:
    """Metrics of held-out batches from the summed log-probs (S,) of each under the policy and the reference."""
    rewards, logps, nll = [], [], []
    for batch, now, before in zip(batches, policy, reference):
        pair = torch.stack((batch.chosen, batch.rejected))
        logps.append(now[pair])
        rewards.append(beta * (now - before)[pair])
        nll.append(-now[batch.right])
    side = torch.cat([batch.side[batch.chosen] for batch in batches])
    metrics = pair_metrics(torch.cat(rewards, 1), torch.cat(logps, 1), side, targets)
    nll = torch.cat(nll)
    tokens = torch.cat([batch.length[batch.right] for batch in batches])
    side = torch.cat([batch.side[batch.right] for batch in batches])
    for name, mask in sides(side, targets).items():
        mean = nll[mask].sum() / tokens[mask].sum()
        metrics[f"nll_{name}"] = mean.item()
    return metrics


def describe(step: int, metrics: dict, answers: list[dict]) -> str:
    """What the loop prints of a validation: a line of figures by side, a line for each sample answer."""
    parts = []
    for name, start in SHOWN.items():
        figures = [f"{key.removeprefix(start)} {value:.3f}"
                   for key, value in metrics.items() if key.startswith(start)]
        parts.append(f"{name} {', '.join(figures)}")
    lines = [f"held-out, step {step}: {'; '.join(parts)}"]
    for answer in answers:
        wanted = "" if answer["reply"] == answer["expected"] else f"  (expected: {answer['expected']})"
        lines.append(f"    {answer['language']}: {answer['reply']}{wanted}")
    return "\n".join(lines)
