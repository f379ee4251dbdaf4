"""Held-out pairs during training: rewards, margins and accuracies split by direction, and the NLL of right
responses; and for `eval.py perplexity` that NLL per byte.

TRL's metric names, with a side behind each: `en` the source, `tgt` all targets, and where there are several
targets each of them as `tgt_sw`. Watch nll_en: a preference loss alone lets it rise.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from evals import choice
from evals.figures import MEAN, Sample

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


def response_lines(model, tokenizer, rows: list[dict], places: dict[str, str], done: set, system_prompt: str,
                   batch_tokens: int):
    """Yields a line with the NLL of each row's response in the languages of `places`, but for those that are
    done."""
    for place, language in places.items():
        left = [row for row in rows if (place, row["row_id"]) not in done]
        forks, cut = [], []
        for row in left:
            prompt = tokenizer.prompt_ids(row[language]["prompt"], system_prompt)
            reply = tokenizer.response_ids(row[language]["response"])
            where = f"row {row['row_id']} in {language}"
            forks += choice.make_forks(where, prompt, [reply], model.config.max_position_embeddings)
            cut.append(len(forks[-1].prompt) < len(prompt))
        for i, (logp,) in choice.fork_logps(model, forks, batch_tokens):
            yield {
                "question": left[i]["row_id"],
                "place": place,
                "nll": -logp,
                "cut": cut[i],
                "bytes": len(left[i][language]["response"].encode()),
                "tokens": len(forks[i].continuations[0])}


def byte_figures(place: str, lines: list[dict]) -> dict[str, dict]:
    """Bits, nats and their exponential per byte of one language's responses."""
    nats = Sample(PER_BYTE, {line["question"]: (line["nll"], line["bytes"]) for line in lines}).told()
    bits = nats | {key: nats[key] and nats[key] / math.log(2) for key in ("value", "stderr")}
    exponential = nats | {"value": math.exp(nats["value"]), "stderr": None}
    return {f"bits/byte {place}": bits, f"nll/byte {place}": nats, f"perplexity/byte {place}": exponential}
