"""Held-out pairs during training: rewards, margins and accuracies split by direction, and the NLL of right
responses; and for `eval.py perplexity` that NLL per byte.

TRL's metric names, with a side behind each: `en` the source, `tgt` all targets, and where there are several
targets each of them as `tgt_sw`. Watch nll_en: a preference loss alone lets it rise.
"""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from engine.files import InputError
from evals import choice
from evals.figures import MEAN, Sample
from formats.records import describe_counts, read_rows, require_languages

SHOWN = {"nll": "nll_", "accuracy": "rewards/accuracies_", "margin": "rewards/margins_"}
SAMPLE_ANSWERS = 2              # held-out questions whose answers every validation shows
PER_BYTE = replace(MEAN, digits=4)


def sides(side: Tensor, targets: list[str]) -> dict[str, Tensor]:
    """Masks of the directions that metrics are split by, those without a member left out. side (P,) as in
    data.Batch."""
    masks = {"en": side == 0, "tgt": side > 0}
    if len(targets) > 1:
        masks |= {f"tgt_{target}": side == number for number, target in enumerate(targets, 1)}
    return {name: mask for name, mask in masks.items() if mask.any()}


def pair_metrics(rewards: Tensor, logps: Tensor, side: Tensor, targets: list[str]) -> dict[str, float]:
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
            metrics[f"{key}_{name}"] = value[mask].mean().item()
    return metrics


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
    rewards, logps, nll = torch.cat(rewards, 1), torch.cat(logps, 1), torch.cat(nll)
    metrics = pair_metrics(rewards, logps, side, targets)
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


# ------------------------------------------------------------------------------------------------- perplexity

def scored_rows(path: Path, source: str, target: str, split: str) -> list[dict]:
    """The rows of a file in both languages and of a split."""
    counts = Counter()
    rows = read_rows(path, source, counts=counts, targets=[target], unique=True)
    rows = require_languages(rows, source, target)
    print(f"{path}: {describe_counts(counts)}")
    if split:
        rows = [row for row in rows if row.get("split", split) == split]
    if not rows:
        raise InputError(f"{path} has no row of split {split!r}: see --split")
    return rows


def response_lines(model, tokenizer, rows: list[dict], places: dict[str, str], done: set,
                   system_prompt: str | None, batch_tokens: int):
    """Yields a line with the NLL of each row's response in the languages of `places`, but for those that are
    done: (place, row_id)."""
    longest = model.config.max_position_embeddings
    for place, language in places.items():
        left = [row for row in rows if (place, row["row_id"]) not in done]
        forks, lines = [], []
        for row in left:
            name, texts = row["row_id"], row[language]
            prompt = tokenizer.prompt_ids(texts["prompt"], system_prompt)
            reply = tokenizer.response_ids(texts["response"])
            fork, = choice.make_forks(f"row {name} in {language}", prompt, [reply], longest)
            forks.append(fork)
            lines.append({
                "question": name,
                "place": place,
                "cut": len(fork.prompt) < len(prompt),
                "bytes": len(texts["response"].encode()),
                "tokens": len(reply)})
        for i, (logp,) in choice.fork_logps(model, forks, batch_tokens):
            yield lines[i] | {"nll": -logp}


def byte_figures(place: str, lines: list[dict]) -> dict[str, dict]:
    """Bits, nats and their exponential per byte of one language's responses."""
    nats, bits = {}, {}
    for line in lines:
        name, size = line["question"], line["bytes"]
        nats[name] = line["nll"], size
        bits[name] = line["nll"] / math.log(2), size
    nats = Sample(PER_BYTE, nats).told()
    return {
        f"bits/byte {place}": Sample(PER_BYTE, bits).told(),
        f"nll/byte {place}": nats,
        f"perplexity/byte {place}": nats | {"value": math.exp(nats["value"]), "stderr": None}}
