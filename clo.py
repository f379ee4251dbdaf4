"""Cross-Lingual Optimization: move an English-centric Llama-style model into another language
and keep its English.

    python clo.py --lang sw

English rows are translated, and every row gives two *forks*: the English question with the
English response (chosen) and the translated one (rejected), and the translated question the other
way round. With y_w the chosen, y_l the rejected response to x, log-probs summed over response
tokens, and ref the model before training:

    margin = [log pi(y_w|x) - log ref(y_w|x)] - [log pi(y_l|x) - log ref(y_l|x)]                       (eq. 1)
    L_CL   = mean over pairs of both directions of  -log sigmoid(beta * margin)                        (eq. 2)
    L_SFT  = -(sum of log pi(y_t|x_t)) / (number of tokens), target language only                      (eq. 3)
    L_CLO  = lambda * L_SFT + (1 - lambda) * L_CL                                                      (eq. 4)

Means are over an optimiser step: all micro-batches share the step's pair and token counts,
so how a step is cut into micro-batches changes nothing.
Only attention is trained: as LoRA by default, W' = W + (alpha / R) B A                               (eq. 5)

References: CLO (ACL 2025, arXiv 2505.14297), DPO (arXiv 2305.18290), LoRA (arXiv 2106.09685).
"""

import argparse
import contextlib
import importlib.util
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import data
import kernels
import model as llama
import prepare
from engine import ranks, runs, scale
from engine.files import InputError, fill_directory, fingerprint, write_json, write_text
from evals.answers import answer_and_score, read_answers
from evals.language import fit_languages, texts_by_language
from evals.report import closing_lines, report_text
from formats import hub
from formats.chat import load_tokenizer
from formats.checkpoints import check_outputs, save_adapter, save_delta, save_merged, save_model
from formats.configs import read_config
from formats.records import describe_counts
from formats.weights import add_update, lora_product

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
# The learning rates below are for this hidden width and scale with its inverse (muP).
REFERENCE_WIDTH = 4096
SAMPLE_ANSWERS = 2              # held-out questions whose answers every validation shows
SIMPO_GAMMA = 0.5               # nats a token by which simpo wants the right response ahead
LEARNING_RATES = {"lora": 1e-4, "attention": 3e-5, "full": 1.5e-5}


@dataclass(frozen=True)
class Stage:
    """One training stage: which languages' responses the NLL term covers,
    and whether there is a preference term."""
    name: str
    nll: tuple[str, ...]
    preference: bool


METHODS = {
    "clo": (Stage("clo", ("tgt",), True),),
    "sft": (Stage("sft", ("en", "tgt"), False),),
    "sft-en": (Stage("sft-en", ("en",), False),),
    "sft-tgt": (Stage("sft-tgt", ("tgt",), False),),
    "dpo": (Stage("dpo", (), True),),
    "sft+dpo": (Stage("sft", ("en", "tgt"), False), Stage("dpo", (), True)),
}


# ------------------------------------------------------------------------------------------------------- LoRA

class LoraLinear(llama.Linear):
    """A frozen Linear plus a trainable product of rank R, eq. 5.
    B starts at zero: at first nothing changes."""

    def __init__(self, base: llama.Linear, rank: int, alpha: float, generator: torch.Generator, device=None):
        nn.Module.__init__(self)
        self.weight, self.bias, self.scale = base.weight, base.bias, alpha / rank
        out_features, in_features = base.weight.shape
        bound = 1 / math.sqrt(in_features)           # PEFT's start: kaiming_uniform with a = sqrt(5)
        A = torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)
        wide = torch.promote_types(base.weight.dtype, torch.float32)
        device = device or base.weight.device
        self.lora_A = nn.Parameter(A.to(device, wide))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, device=device, dtype=wide))

    def forward(self, x: Tensor) -> Tensor:
        base = super().forward(x)                    # one product adds to it: no pass to scale, none to add
        low = F.linear(x, self.lora_A.to(x.dtype)).flatten(0, -2)
        return torch.addmm(base.flatten(0, -2), low, self.lora_B.to(x.dtype).T,
                           alpha=self.scale).view_as(base)


def add_lora(model: llama.Llama, rank: int = 16, alpha: float = 32, seed: int = 0,
             device=None) -> llama.Llama:
    """Freeze the model and put a LoRA product beside every attention projection, on the device of the weights
    unless another is named (theirs may be meta: no memory yet). The model is changed and returned."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for block in model.model["layers"]:
        for name in ATTENTION:
            setattr(block.self_attn, name,
                    LoraLinear(getattr(block.self_attn, name), rank, alpha, generator, device))
    return model


def merge_lora(model: llama.Llama) -> llama.Llama:
    """Fold every LoRA product into its weight (in at least fp32) and drop the factors."""
    for block in model.model["layers"]:
        for name in ATTENTION:
            layer = getattr(block.self_attn, name)
            if isinstance(layer, LoraLinear):
                plain = llama.Linear(1, 1)
                product = lora_product(layer.lora_A.detach(), layer.lora_B.detach(), layer.scale)
                merged = add_update(layer.weight.detach(), product, name).to(layer.weight.dtype)
                plain.weight, plain.bias = nn.Parameter(merged, requires_grad=False), layer.bias
                setattr(block.self_attn, name, plain)
    return model


def make_trainable(model: llama.Llama, train: str, rank: int, alpha: float, seed: int,
                   device=None) -> dict[str, nn.Parameter]:
    """Choose what learns: 'lora' on attention, the 'attention' projections themselves, or the 'full' model.

    Returns {name: parameter}; those are fp32 (fp64 stays), everything else is frozen in the model's dtype.
    """
    model.compute_dtype = model.head.dtype
    if train == "lora":
        add_lora(model, rank, alpha, seed, device)
    for name, parameter in model.named_parameters():
        projection = ".self_attn." in name and name.split(".")[-2] in ATTENTION
        wanted = {"lora": ".lora_" in name, "attention": projection, "full": True}[train]
        parameter.requires_grad_(wanted)
        if wanted:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


# ------------------------------------------------------------------------------------------------------- loss

def margins(policy_chosen_logp: Tensor, policy_rejected_logp: Tensor, ref_chosen_logp: Tensor,
            ref_rejected_logp: Tensor) -> Tensor:
    """Eq. 1, (P,). All inputs (P,) are log-probs summed over the tokens of a continuation."""
    return (policy_chosen_logp - ref_chosen_logp) - (policy_rejected_logp - ref_rejected_logp)


def preference_losses(margin: Tensor, kind: str = "sigmoid", beta: float = 0.1) -> Tensor:
    """The preference term of each pair, (P,), from its margin (P,).

    sigmoid: -log sigmoid(beta * margin), DPO's (arXiv 2305.18290, eq. 7); the default and the paper's.  eq. 2
    ipo: (margin - 1 / (2 beta))^2, which stops pulling once the margin is there (arXiv 2310.12036, eq. 17).
    simpo: -log sigmoid(beta * (margin - gamma)) over the margin of *mean* log-probs without a reference,
    gamma being SIMPO_GAMMA nats a token (arXiv 2405.14734, eq. 6, whose gamma is beta times ours).
    Its beta is larger: 2 to 10.
    """
    if kind == "ipo":
        return (margin - 1 / (2 * beta)) ** 2
    return -F.logsigmoid(beta * (margin - SIMPO_GAMMA if kind == "simpo" else margin))


def clo_loss(policy_chosen_logp: Tensor, policy_rejected_logp: Tensor, ref_chosen_logp: Tensor,
             ref_rejected_logp: Tensor, tgt_logp: Tensor, tgt_tokens, pairs=None, beta: float = 0.1,
             lam: float = 0.5, kind: str = "sigmoid") -> Tensor:
    """Eq. 4, a scalar, from sums of log-probs
    (for simpo: means in the first two and zeros for the reference).

    The four (P,) tensors are the pairs of both directions. tgt_logp (any shape) holds the summed log-probs of
    the responses under NLL and tgt_tokens the tokens they count. For a part of a step pass the whole step's
    tgt_tokens and pairs: the parts' losses then add up to the step's.
    """
    pairs = policy_chosen_logp.numel() if pairs is None else pairs
    margin = margins(policy_chosen_logp, policy_rejected_logp, ref_chosen_logp, ref_rejected_logp)
    preference = preference_losses(margin, kind, beta).sum() / max(pairs, 1)                           # eq. 2
    nll = -tgt_logp.sum() / max(tgt_tokens, 1)                                                         # eq. 3
    return lam * nll + (1 - lam) * preference


def anchor_loss(policy_logp: Tensor, ref_logp: Tensor, tokens) -> Tensor:
    """How far right responses fell below the reference, in nats per token:
    sum of max(0, ref - policy) / tokens.

    A margin also grows when both responses fall; this term keeps the English one from it. The penalty is that
    of DPO-Positive (arXiv 2402.13228, eq. 3), added to the loss instead of to the margin.
    Inputs (S',) are summed log-probs.
    """
    return F.relu(ref_logp - policy_logp).sum() / max(tokens, 1)


# ------------------------------------------------------------------------------------------ steps of training

def send(x: Tensor, device) -> Tensor:
    """x on the device. A GPU copies from pinned memory while the program goes on;
    from other memory it would wait."""
    return (x.pin_memory() if torch.device(device).type == "cuda" else x).to(device, non_blocking=True)


@dataclass
class Micro:
    """One micro-batch: packed rows, and which of its S continuations form pairs and enter the NLL."""
    batch: data.Batch
    sequences: int                   # S
    chosen: Tensor                   # (P,) index of the chosen continuation of each pair
    rejected: Tensor                 # (P,)
    # (P,) language of the prompt: 0 the source, then the targets in their order.
    pair_language: Tensor
    right: Tensor                    # (S',) index of each fork's right (chosen) continuation
    right_language: Tensor           # (S',)
    right_tokens: Tensor             # (S',) its length in tokens
    lengths: Tensor                  # (S,) length of every continuation in tokens
    nll: Tensor                      # index of the continuations under NLL
    nll_tokens: int
    english: Tensor                  # index of the right continuations in the source language, for the anchor
    english_tokens: int

    def to(self, device) -> "Micro":
        moved = {name: send(value, device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        rows = {name: send(value, device) for name, value in vars(self.batch).items()
                if isinstance(value, Tensor)}
        return replace(self, batch=replace(self.batch, **rows), **moved)


def make_micro(batch: data.Batch, languages: list[str], nll: tuple[str, ...]) -> Micro:
    """languages: the source, then the targets.
    nll: which sides' right responses enter the NLL, of "en" and "tgt"."""
    lengths, chosen, rejected, pair_language, right, right_language, covered = [], [], [], [], [], [], []
    for fork in batch.forks:
        first, language = len(lengths), languages.index(fork.language)
        lengths += map(len, fork.continuations)
        right.append(first)
        right_language.append(language)
        if ("tgt" if language else "en") in nll:
            covered.append(first)
        wrong = range(first + 1, len(lengths))
        chosen += [first] * len(wrong)
        rejected += wrong
        pair_language += [language] * len(wrong)
    chosen, rejected, pair_language, right, right_language, lengths, covered = (
        torch.tensor(x, dtype=torch.int64)
        for x in (chosen, rejected, pair_language, right, right_language, lengths, covered))
    english = right[right_language == 0]
    return Micro(batch, len(lengths), chosen, rejected, pair_language, right, right_language, lengths[right],
                 lengths, covered, int(lengths[covered].sum()), english, int(lengths[english].sum()))


def sent(micros: Iterable[Micro], device) -> Iterator[Micro]:
    """The micro-batches on the device: each is on its way there while the one before it is worked on."""
    coming = None
    for micro in micros:
        before, coming = coming, micro.to(device)
        if before is not None:
            yield before
    if coming is not None:
        yield coming


def stage_forks(group: list[data.Fork], stage: Stage, source: str) -> list[data.Fork]:
    """What a stage reads of one sample's forks: the right continuation and, for a preference, the wrong ones
    that differ from it. A fork that then serves neither term is left out."""
    forks = []
    for fork in group:
        right, others = fork.continuations[0], fork.continuations[1:] if stage.preference else []
        wrong = [ids for ids in others if ids != right]
        if wrong or ("en" if fork.language == source else "tgt") in stage.nll:
            forks.append(data.Fork(fork.prompt, [right, *wrong], fork.language, fork.row))
    return forks


def check_pairs(groups: list[list[data.Fork]], args) -> None:
    """InputError when a stage of the wanted methods prefers and no sample gives it a pair."""
    prefers = [name for name in (args.baseline, args.method)
               if any(stage.preference for stage in METHODS.get(name, ()))]
    if prefers and all(ids == fork.continuations[0] for group in groups for fork in group
                       for ids in fork.continuations):
        raise InputError(f"{args.data}: every row has the same response in all languages, so "
                             f"{prefers[0]} finds nothing to prefer: give other rows, or --method sft")


def make_steps(groups: list[list[data.Fork]], stage: Stage, args, seed: int | None) -> list[list[Micro]]:
    """Optimiser steps of args.batch_size samples, each a list of micro-batches. Packed once: reference and
    training see the same rows (a GEMM row's bits depend on the row count). On CUDA rows keep one length,
    since its attention is compiled for a shape; elsewhere they are trimmed. seed None keeps the order."""
    trim = not args.device.startswith("cuda")
    order = list(range(len(groups)))
    if seed is not None:
        order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    steps = []
    for first in range(0, len(order), args.batch_size):
        forks = [fork for i in order[first:first + args.batch_size]
                 for fork in stage_forks(groups[i], stage, args.source)]
        if forks:
            steps.append([
                make_micro(batch, [args.source, *args.targets], stage.nll)
                for batch in data.micro_batches(forks, args.row_tokens, args.micro_rows, trim, ends=False)])
    return steps


def step_order(steps: int, epochs: int, seed: int) -> list[int]:
    """Which packed step each optimiser step runs:
    every epoch its own permutation, a pure function of the seed."""
    generator = torch.Generator().manual_seed(seed + 1)
    return [i for _ in range(epochs) for i in torch.randperm(steps, generator=generator).tolist()]


def continuation_logps(model: llama.Llama, micro: Micro) -> Tensor:
    """Log-prob of each of the micro-batch's S continuations, summed over its tokens, (S,)."""
    batch = micro.batch
    hidden = model(batch.tokens, batch.positions, batch.fork, batch.branch)                      # (B, T, H)
    predicted = hidden.reshape(-1, hidden.shape[-1]).index_select(0, batch.row_index)            # (N, H)
    token_logp = kernels.token_logp(predicted, model.head.to(predicted.dtype), batch.targets)
    return token_logp.new_zeros(micro.sequences).index_add(0, batch.sequence, token_logp)


@torch.no_grad()
def reference_logps(model: llama.Llama, steps: list[list[Micro]], device,
                    label: str | None = None) -> list[Tensor]:
    """continuation_logps of every micro-batch in order, on the CPU;
    the code path of training, without its gradient."""
    micros = [micro for step in steps for micro in step]
    own = ranks.deal(len(micros))
    bar = tqdm((micros[i] for i, _ in own), desc=label, unit="batch", total=len(own),
               disable=label is None or ranks.rank() > 0)
    sums = [continuation_logps(model, micro).cpu() for micro in sent(bar, device)]
    return ranks.collect([logps for logps, (_, counted) in zip(sums, own) if counted])


# ------------------------------------------------------------------------------------------------- validation

def sides(language: Tensor, targets: list[str]) -> dict[str, Tensor]:
    """Masks of the directions that metrics are split by: "en" the source, "tgt" all targets, and where there
    are several targets each of them. language (P,) as in Micro."""
    masks = {"en": language == 0, "tgt": language > 0}
    if len(targets) > 1:
        masks |= {f"tgt_{target}": language == number for number, target in enumerate(targets, 1)}
    return {side: mask for side, mask in masks.items() if mask.any()}


def score_heldout(model: llama.Llama, steps: list[list[Micro]], reference: list[Tensor],
                  args, device) -> dict:
    """Held-out metrics, TRL's names split by direction: rewards, margins, accuracies, summed
    log-probs, and the NLL per token of the right response in each language (watch nll_en: a
    preference loss alone lets it rise)."""
    rewards, logps, right = [], [], []
    micros = [micro for step in steps for micro in step]
    for micro, ref, policy in zip(micros, reference, reference_logps(model, steps, device)):
        pair = torch.stack((micro.chosen, micro.rejected))
        logps.append(policy[pair])
        rewards.append(args.beta * (policy - ref)[pair])
        right.append(policy[micro.right])
    right, language = torch.cat(right), torch.cat([micro.right_language for micro in micros])
    tokens = torch.cat([micro.right_tokens for micro in micros])
    metrics = pair_metrics(torch.cat(rewards, 1), torch.cat(logps, 1), micros, args.targets)
    return metrics | {f"nll_{side}": (-right[mask].sum() / tokens[mask].sum()).item()
                      for side, mask in sides(language, args.targets).items()}


def sample_answers(model: llama.Llama, groups: list[list[data.Fork]], tokenizer, args) -> list[dict]:
    """Greedy answers to the first held-out questions in every language:
    numbers can look well while the text does not."""
    forks = [fork for group in groups[:SAMPLE_ANSWERS] for fork in group]
    replies = llama.generate(model, [fork.prompt for fork in forks], args.max_new_tokens, tokenizer.stop_ids)
    return [{"row_id": fork.row, "language": fork.language, "reply": tokenizer.decode(reply).strip(),
             "expected": tokenizer.decode(fork.continuations[0]).strip()}
            for fork, reply in zip(forks, replies)]


def describe_validation(step: int, metrics: dict) -> str:
    """What the loop prints of a validation: a line of figures by side, a line for each sample answer."""
    figures = "; ".join(f"{name} " + ", ".join(f"{key.removeprefix(start)} {value:.3f}"
                                               for key, value in metrics.items() if key.startswith(start))
                        for name, start in (("nll", "nll_"), ("accuracy", "rewards/accuracies_"),
                                            ("margin", "rewards/margins_")))
    return "\n".join([f"held-out, step {step}: {figures}", *(
        f"    {line['language']}: {line['reply']}"
        + f"  (expected: {line['expected']})" * (line["reply"] != line["expected"])
        for line in metrics["answers"])])


def pair_metrics(rewards: Tensor, logps: Tensor, micros: list[Micro], targets: list[str]) -> dict:
    """Means over the micro-batches' pairs of each direction;
    rewards and logps are (2, P): chosen, rejected."""
    metrics = {}
    for side, mask in sides(torch.cat([micro.pair_language for micro in micros]), targets).items():
        chosen, rejected = rewards[:, mask]
        metrics |= {f"rewards/chosen_{side}": chosen.mean().item(),
                    f"rewards/rejected_{side}": rejected.mean().item(),
                    f"rewards/margins_{side}": (chosen - rejected).mean().item(),
                    f"rewards/accuracies_{side}": (chosen > rejected).double().mean().item(),
                    f"logps/chosen_{side}": logps[0, mask].mean().item(),
                    f"logps/rejected_{side}": logps[1, mask].mean().item()}
    return metrics


# --------------------------------------------------------------------------------------------------- training

def fix_order_of_sums() -> None:
    """Have CUDA add in one order every time, so that a resumed run equals an undisturbed one
    and the first rewards are 0.

    Otherwise two of our ops add by atomics, in any order: `index_add` (log-probs of a continuation) and the
    gradient of `index_select` (the last prompt token predicts the first of every continuation).
    FlexAttention, the products and the kernels use none. Known to differ all the same: FlexAttention compiled
    with max-autotune, which is not asked for here.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")       # read when cuBLAS starts
    torch.utils.deterministic.fill_uninitialized_memory = False       # memory nobody wrote is never read here
    torch.use_deterministic_algorithms(True, warn_only=True)


def learning_rate(step: int, steps: int, warmup: float) -> float:
    """Factor on the peak rate at 0-based `step`: linear up over warmup * steps,
    then linear down towards 0."""
    rising = max(1, round(warmup * steps))
    return (step + 1) / rising if step < rising else (steps - step) / max(1, steps - rising)


def backward_step(model, step: list[Micro], reference: list[Tensor] | None,
                  stage: Stage, args, device) -> dict:
    """Accumulate the gradient of one optimiser step, over its micro-batches and all ranks; its loss and pair
    statistics as tensors. Nothing waits for the device here, unless there are several ranks."""
    lam = {(True, True): args.lam, (False, True): 1.0, (True, False): 0.0}[stage.preference, bool(stage.nll)]
    pairs, tokens = sum(len(micro.chosen) for micro in step), sum(micro.nll_tokens for micro in step)
    english_tokens, own = sum(micro.english_tokens for micro in step), ranks.deal(len(step))
    parts = []                                               # of each micro-batch: loss, nll, rewards, logps
    for (i, counted), micro in zip(own, sent((step[i] for i, _ in own), device)):
        policy = continuation_logps(model, micro)
        ref = policy.detach() if reference is None else send(reference[i], device)
        scores, base = ((policy / micro.lengths, torch.zeros_like(ref)) if args.preference == "simpo"
                        else (policy, ref))
        loss = clo_loss(scores[micro.chosen], scores[micro.rejected],
                        base[micro.chosen], base[micro.rejected],
                        policy[micro.nll], tokens, pairs, args.beta, lam, args.preference)
        if args.anchor and stage.preference:
            loss = loss + args.anchor * anchor_loss(policy[micro.english], ref[micro.english], english_tokens)
        (loss if counted else 0 * loss).backward()
        policy, pair = policy.detach(), torch.stack((micro.chosen, micro.rejected))
        parts.append((loss.detach(), -policy[micro.nll].sum() / max(tokens, 1),
                      args.beta * (policy - ref)[pair], policy[pair]))
    parts = [part for part, (_, counted) in zip(parts, own) if counted]
    ranks.sum_gradients_(parameter for parameter in model.parameters() if parameter.requires_grad)
    if ranks.size() > 1:
        parts = ranks.collect([tuple(value.cpu() for value in part) for part in parts])
    losses, nll, rewards, logps = zip(*parts)
    return {"loss": sum(losses), "nll": sum(nll),
            "rewards": torch.cat(rewards, 1), "logps": torch.cat(logps, 1)}


class AdamW:
    """AdamW (arXiv 1711.05101, algorithm 2), bit for bit torch.optim's and with its state, for devices where
    that has no fused kernel: constructing torch's imports the compiler, two seconds and 150 MB that a run on
    a CPU need not spend."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, betas=(0.9, 0.999), eps=1e-8,
                 weight_decay=0.0):
        self.defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fused": False}
        self.param_groups, self.state = [self.defaults | {"params": list(parameters)}], {}

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

    def zero_grad(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.grad = None


def make_optimizer(parameters: Iterable[nn.Parameter], rate: float, weight_decay: float,
                   device: torch.device):
    if device.type == "cuda":
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=weight_decay, fused=True)
    return AdamW(parameters, lr=rate, weight_decay=weight_decay)


class Interrupt:
    """SIGINT and SIGTERM ask for a stop after the running step, which is saved;
    then the exit code is 128 + signal."""

    def __enter__(self):
        self.signal, self.before = 0, {}
        for number in (signal.SIGINT, signal.SIGTERM):
            self.before[number] = signal.signal(number, self.ask)
        return self

    def ask(self, number, frame):
        self.signal = number

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def train(model: llama.Llama, parameters: dict, stage: Stage, steps: list[list[Micro]],
          reference: list[list[Tensor]] | None, epochs: int, validate, args, device, directory: Path) -> None:
    """Run a stage from its last checkpoint to its end;
    metrics go to directory/metrics.jsonl, one line a step."""
    order = step_order(len(steps), epochs, args.seed)
    rate = args.lr or LEARNING_RATES[args.train] * REFERENCE_WIDTH / model.config.hidden_size
    optimizer = make_optimizer(parameters.values(), rate, args.weight_decay, device)
    done = runs.load_checkpoint(directory / "checkpoint", parameters, optimizer)
    ranks.on_first(lambda: runs.truncate_metrics(directory / "metrics.jsonl", done if done else -1))
    if done:
        print(f"{stage.name}: resuming at step {done} of {len(order)}")
    board = runs.open_board(directory, args.tensorboard and ranks.rank() == 0, done)
    with runs.open_metrics(directory, ranks.rank() == 0) as log, Interrupt() as interrupt, \
            tqdm(total=len(order), initial=done, desc=f"train {stage.name}", unit="step",
                 disable=ranks.rank() > 0) as bar:
        if not done:
            held = validate()
            runs.write_metrics(log, {"step": 0} | held, board)
            bar.write(describe_validation(0, held), sys.stdout)
        for i in range(done, len(order)):
            started = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = rate * learning_rate(i, len(order), args.warmup)
            step = steps[order[i]]
            result = backward_step(model, step, reference and reference[order[i]], stage, args, device)
            if i == 0 and reference is not None:
                check_first_rewards(result["rewards"])
            norm = ranks.whole(nn.utils.clip_grad_norm_(parameters.values(), args.clip))
            optimizer.step()
            optimizer.zero_grad()
            metrics = step_metrics(i + 1, result, norm, group["lr"], step, args.targets,
                                   time.perf_counter() - started)
            stop_unless_finite(metrics, stage.name, rate)
            last = i + 1 == len(order)
            if last or (i + 1) % (args.eval_every or len(steps)) == 0:
                held = validate()
                metrics |= held
                bar.write(describe_validation(i + 1, held), sys.stdout)
            runs.write_metrics(log, metrics, board)
            bar.set_postfix_str(f"loss {metrics['loss']:.3f}")
            bar.update()
            signalled = ranks.largest(interrupt.signal, device)
            if signalled or last or (i + 1) % args.save_every == 0:
                runs.save_checkpoint(directory / "checkpoint", i + 1, parameters, optimizer)
            if signalled:
                bar.close()
                print(f"stopped by signal {signalled} after step {i + 1}, saved; "
                      f"the same command goes on from there")
                sys.exit(128 + signalled)


@contextlib.contextmanager
def memory_advice(args):
    """Out of memory, on a device or the host, becomes one line with the flags that help."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:                 # torch.OutOfMemoryError is a RuntimeError
        text = str(error).splitlines()[0] if str(error) else "no memory"
        if (not isinstance(error, (MemoryError, torch.OutOfMemoryError))
                and "can't allocate memory" not in text):
            raise
        helps = {f"--micro-rows 1 (now {args.micro_rows})": args.micro_rows > 1,
                 "--recompute": not args.recompute, f"--row-tokens {args.row_tokens // 2}": True,
                 "--dtype bf16": args.dtype != "bf16", "--train lora": args.train != "lora",
                 "--shard on more devices": not args.shard}
        raise InputError(f"out of memory on {args.device} ({text}): "
                             f"try {', '.join(flag for flag, new in helps.items() if new)}; "
                             f"--dry-run estimates what a setting needs. But for --recompute they make "
                             f"another run: --fresh or another --out") from None


def stop_unless_finite(metrics: dict, name: str, rate: float) -> None:
    if not math.isfinite(metrics["loss"]) or not math.isfinite(metrics["grad_norm"]):
        raise InputError(f"{name}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']} "
                             f"at step {metrics['step']}: stopped, the last checkpoint is kept; "
                             f"try a lower --lr than {rate:.2g}")


def check_first_rewards(rewards: Tensor) -> None:
    """Before the first update policy and reference are one model:
    any reward is an error in one of the two paths."""
    if not rewards.numel():                                      # of this step's samples none has a pair
        return
    worst = rewards.abs().max().item()
    if not worst < 1e-2:
        raise InputError(f"rewards before the first update reach {worst:.3g} and should be 0: "
                             f"the reference log-probs do not belong to this model; start over with --fresh")
    print("rewards before the first update: "
          + (f"at most {worst:.1g} (rounding)" if worst else "0, as they should be"))


def step_metrics(step: int, result: dict, norm: Tensor, rate: float, micros: list[Micro], targets: list[str],
                 seconds: float) -> dict:
    """One line of metrics.jsonl. Here a step waits for the device, and nowhere before."""
    metrics = {"step": step, "loss": result["loss"].item(), "nll": result["nll"].item(),
               "grad_norm": norm.item(), "lr": rate}
    metrics |= pair_metrics(result["rewards"].cpu(), result["logps"].cpu(), micros, targets)
    tokens = sum(int((micro.batch.fork >= 0).sum()) for micro in micros)
    return metrics | {"tokens": tokens, "tokens_per_second": tokens / seconds, "seconds": seconds,
                      "peak_memory_gb": peak_memory_gb()}


def peak_memory_gb() -> float:
    """Most memory this process ever held: on the GPU when there is one, else resident (GB = 1e9 bytes)."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024               # ru_maxrss: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


# ----------------------------------------------------------------------------------------------------- stages

def reference_of(model, steps, run: Path, args, device, history: str, label: str) -> list[Tensor]:
    """Cached reference log-probs of these steps under the model as it is now.
    `history` names its training so far."""
    micros = [micro for step in steps for micro in step]
    content = [[fork.prompt, fork.continuations] for micro in micros for fork in micro.batch.forks]
    shapes = [list(micro.batch.tokens.shape) for micro in micros]
    # Other sums, other last bits.
    code = [Path(llama.__file__), *sorted(Path(kernels.__file__).parent.glob("*.py"))]
    key = fingerprint(runs.model_fingerprint(args.model), history, content, shapes, args.train,
                           args.dtype, device.type, torch.__version__, torch.get_num_threads(), *code)
    sizes = [micro.sequences for micro in micros]
    sums = ranks.on_first(lambda: runs.load_reference(run, key, sizes))
    if sums is None:
        sums = reference_logps(model, steps, device, label)
        ranks.on_first(lambda: runs.save_reference(run, key, sums))
    return sums


def group_by_step(flat: list[Tensor], steps: list[list[Micro]]) -> list[list[Tensor]]:
    values = iter(flat)
    return [[next(values) for _ in step] for step in steps]


def load_model(args, device, learns: bool) -> tuple[llama.Llama, dict[str, nn.Parameter]]:
    """The base model and what of it is trained; with --shard spread over all ranks."""
    def learn(model):
        if learns:
            make_trainable(model, args.train, args.lora_rank, args.lora_alpha, args.seed, device)
    if args.shard:
        model = ranks.load(args.model, device, DTYPES[args.dtype], prepare=learn)
    else:
        model = llama.load(args.model, device, DTYPES[args.dtype])
        learn(model)
    return model, {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def epochs_of(name: str, args) -> int:
    """Passes over the rows in each stage of a method."""
    prefers = any(stage.preference for stage in METHODS.get(name, ()))
    return args.epochs if prefers else args.baseline_epochs or args.epochs


def run_method(name: str, groups, heldout, tokenizer, args, run: Path, device, finish) -> dict:
    """Load the base model, train it by one method (or not at all: 'base'), export it and score it. A finished
    method is read back from its result.json. `finish(model)` scores the model's answers."""
    directory = run / name
    result = directory / "result.json"
    if ranks.on_first(result.exists):
        print(f"{name}: done before, read from {result}")
        return runs.read_result(result)
    stages = METHODS.get(name, ())
    model, parameters = load_model(args, device, learns=bool(stages))
    started, seconds = time.perf_counter(), 0.0
    pairs = make_steps(heldout, METHODS["clo"][0], args, None)
    model.recompute = args.recompute
    if stages and device.type == "cuda" and not args.shard:  # torch.compile would break at every hook of FSDP
        llama.compile_blocks_(model)
    if stages:
        exported = 4 * sum(parameter.numel() for parameter in parameters.values())
        if args.merge or args.train != "lora":
            exported += sum(path.stat().st_size for path in Path(args.model).glob("*.safetensors"))
        ranks.on_first(lambda: runs.check_disk_space(run, parameters, exported))
    base_reference = heldout_reference = reference_of(
        model, pairs, run, args, device, "", "reference held-out")
    epochs = epochs_of(name, args)
    for number, stage in enumerate(stages):
        steps = make_steps(groups, stage, args, args.seed)
        history = "" if number == 0 else fingerprint(prepare.settings(args), name, number)
        reference = None
        if stage.preference:
            flat = reference_of(model, steps, run, args, device, history, f"reference {name}")
            reference = group_by_step(flat, steps)
        if number > 0:
            heldout_reference = reference_of(model, pairs, run, args, device, history, "reference held-out")
        train(model, parameters, stage, steps, reference, epochs,
              lambda: score_heldout(model, pairs, heldout_reference, args, device) | {
                  "answers": ranks.on_first(lambda: sample_answers(model, heldout, tokenizer, args), model)},
              args, device, directory if len(stages) == 1 else directory / f"{number + 1}-{stage.name}")
        seconds = time.perf_counter() - started
    scores = ranks.on_first(lambda: finish(model), model)
    scores["heldout"] = score_heldout(model, pairs, base_reference, args, device)
    scores["train_seconds"] = round(seconds, 2)
    if stages:
        ids = groups[0][0].prompt + groups[0][0].continuations[0]
        outputs = ranks.on_first(
            lambda: export(model, ranks.Whole(parameters), tokenizer, args, directory), model)
        if args.shard:
            check_outputs(model, outputs, ids, ranks.load)
        else:
            ranks.on_first(lambda: check_outputs(model, outputs, ids))
    ranks.on_first(lambda: write_json(result, scores))
    return scores


def export(model: llama.Llama, parameters, tokenizer, args, directory: Path) -> dict[Path, dict]:
    """The trained part in the layout other tools read: a PEFT adapter, and with --merge a whole Hugging Face
    directory too; without LoRA that directory, and the difference of attention's weights. Returns how each of
    them is loaded again."""
    adapter, whole, delta = directory / "adapter", directory / "model", directory / "attn_delta.safetensors"
    outputs = {}
    if args.train == "lora":
        fill_directory(adapter, lambda path: save_adapter(
            model, path, args.base, ATTENTION, args.lora_rank, args.lora_alpha, tokenizer.template))
        outputs[adapter] = {"path": args.model, "adapter": adapter}
    elif args.train == "attention":
        save_delta(delta, args.model, parameters, args.base)
        outputs[delta] = {"path": args.model, "adapter": delta}
    if args.train != "lora":
        fill_directory(whole, lambda path: save_model(
            path, args.model, tokenizer, lambda name, old: parameters.get(name, old)))
    elif args.merge:
        fill_directory(whole, lambda path: save_merged(path, args.model, adapter, tokenizer))
    if whole.exists():
        outputs[whole] = {"path": whole}
    return outputs


def step_tokens(groups: list[list[data.Fork]], stage: Stage, args, count: int) -> float:
    """Row tokens of an average optimiser step of a stage over `count` samples like these."""
    forks = [fork for group in groups for fork in stage_forks(group, stage, args.source)]
    return sum(fork.length for fork in forks) / len(groups) * min(args.batch_size, count)


def dry_run(args, device: torch.device) -> None:
    """Say what the run would train, need and take, show two samples with the loss mask, and write nothing.
    Without --lang the estimate alone, from config.json; with --gpus for other devices than this machine's."""
    here = args.gpus is None
    args.model = str(hub.local(args.model, weights=()))
    config = read_config(args.model)
    row_tokens = min(args.row_tokens, config.max_position_embeddings)
    rate, memory = (scale.measure_device(config, device, DTYPES[args.dtype]) if here
                    else (scale.Plan.tflops, scale.DEVICE_BYTES))
    plan = scale.Plan(args.train, args.lora_rank, args.dtype, row_tokens, args.micro_rows, args.recompute,
                      args.gpus or 1, args.shard, rate, device="cuda" if not here else device.type)
    print(f"{args.base}: {config.model_type}, {config.num_hidden_layers} layers, width {config.hidden_size}; "
          + (f"measured here: {rate:.3g} TFLOP/s of {args.dtype} matrix products" if here
             else f"{rate:g} TFLOP/s assumed"))
    if args.lang is None:
        print(scale.describe(config, plan, None, memory))
        return
    tokenizer = load_tokenizer(args.model)
    count, sample = prepare.look_ahead(args, device)
    groups, counts = data.make_forks(sample, tokenizer, args.source, args.targets,
                                     row_tokens, args.system_prompt)
    print(f"of {len(sample)} rows: {describe_counts(counts)}")
    if len(sample) == count:                                     # else the rows not looked at may have pairs
        check_pairs(groups, args)
    print(scale.describe(config, plan, step_tokens(groups, METHODS[args.method][-1], args, count), memory))
    total, each = 0.0, math.ceil(count / args.batch_size)
    for name, stage in [(name, stage) for name in dict.fromkeys((args.baseline, args.method))
                        for stage in METHODS.get(name, ())]:
        tokens, epochs = step_tokens(groups, stage, args, count), epochs_of(name, args)
        seconds = scale.step_seconds(config, plan, tokens)
        took = each * (epochs * seconds["step"] + stage.preference * seconds["reference"])
        total += took
        print(f"{name}, stage {stage.name}: {count:,} rows, {epochs * each:,} steps of about {tokens:,.0f} "
              f"tokens and {seconds['step']:.3g} s" + ", a reference pass" * stage.preference
              + f": about {took / 60:.1f} min")
    print(f"in all about {total / 60:.1f} min; translation, validation and evaluation come on top")
    for fork in [fork for group in groups[:2] for fork in group]:
        print("\n" + data.show(fork, tokenizer, sys.stdout.isatty()))


def main(argv=None) -> None:
    args = parse_args(argv)
    began = time.perf_counter()
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise InputError("--tensorboard needs the tensorboard package: pip install tensorboard")
    device = ranks.start(ranks.pick_device(args.device))
    args.device = device.type
    if device.type == "cuda":
        fix_order_of_sums()
    args.dtype = (args.dtype if args.dtype != "auto"
                  else "bf16" if device.type == "cuda" or args.gpus else "fp32")
    args.base = args.model                                             # what the adapter names
    if args.dry_run:
        dry_run(args, device)
        return
    args.model = str(hub.local(args.model))                            # where it lies
    tokenizer = load_tokenizer(args.model)
    config = read_config(args.model)
    print(f"device {device}, {args.dtype}; model {args.base}: {config.model_type}, "
          f"{config.num_hidden_layers} layers, width {config.hidden_size}; run directory {args.out}")

    print(f"\n1. Rows: {args.source} and {', '.join(args.targets)}")
    inputs = {"model": runs.model_fingerprint(args.model), "tokenizer": tokenizer.fingerprint}
    row_tokens = min(args.row_tokens, config.max_position_embeddings)
    rows, heldout_rows, eval_rows = prepare.prepare_rows(args, inputs, tokenizer, row_tokens, device)
    run = Path(args.out)

    print("\n2. Forks")
    groups, counts = data.make_forks(rows, tokenizer, args.source, args.targets,
                                     row_tokens, args.system_prompt)
    heldout, _ = data.make_forks(heldout_rows, tokenizer, args.source, args.targets,
                                 row_tokens, args.system_prompt)
    print(describe_counts(counts))
    check_pairs(groups, args)

    names = ["base"] + [name for name in (args.baseline, args.method) if name != "none"]
    languages = (args.source, *args.targets)
    classifier = fit_languages(texts_by_language(rows, languages))
    report = {"lang": args.lang, "samples": len(rows), "seed": args.seed, "methods": {}}
    answers = {}
    for number, name in enumerate(dict.fromkeys(names)):
        print(f"\n{number + 3}. {'Base model' if name == 'base' else 'Train ' + name}")

        def finish(model):
            return answer_and_score(model, tokenizer, eval_rows, languages, classifier,
                                               args.max_new_tokens, args.system_prompt,
                                               run / name / "answers.jsonl")
        with memory_advice(args):
            report["methods"][name] = run_method(name, groups, heldout, tokenizer, args, run, device, finish)
        answers[name] = read_answers(run / name / "answers.jsonl", report["methods"][name])

    text = report_text(report, answers, args.source)
    ranks.on_first(lambda: (write_json(run / "report.json", report),
                            write_text(run / "report.md", text)))
    print("\n" + text)
    print("\n".join(closing_lines(answers)))
    print_ending(args, run, eval_rows, time.perf_counter() - began)
    ranks.stop()


def print_ending(args, run: Path, eval_rows: list[dict], seconds: float) -> None:
    trained = run / args.method
    print(f"Took {seconds:.0f} s, peak memory {peak_memory_gb():.2f} GB. "
          f"Report: {run}/report.md, report.json; curves: {trained}/metrics.jsonl")
    option = f"--adapter {trained}/adapter" if args.train == "lora" else f"--model {trained}/model"
    question = eval_rows[0][args.targets[0]]["prompt"].replace('"', "'").splitlines()[0]
    print(f"Talk to it:\n  python eval.py ask {option} \"{question}\"")


# ----------------------------------------------------------------------------------------------- command line

def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="clo.py", usage="python clo.py --lang LANG [options]",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Teach an English-centric model another language by Cross-Lingual Optimization, "
                    "beside a baseline.",
        epilog="Example: python clo.py --lang sw --model Llama-3.2-1B --data alpaca.json "
               "--translator m2m100_1.2B. The same command goes on where a killed run stopped.")
    add_what(parser)
    add_how(parser)
    add_where(parser)
    args = parser.parse_args(argv)
    check_args(parser, args)
    args.targets = [] if args.lang is None else [code.strip() for code in args.lang.split(",")]
    args.lang = None if args.lang is None else ",".join(args.targets)
    if not all(args.targets) or len({args.source, *args.targets}) <= len(args.targets):
        parser.error(f"--lang {args.lang}: different languages joined by commas were expected, "
                     f"{args.source} not among them")
    args.out = args.out or f"runs/{args.lang}"
    beside = Path(args.data).with_name("eval.jsonl")
    args.eval_data = args.eval_data or (str(beside) if beside.is_file() else None)
    return args


def add_what(parser) -> None:
    add = parser.add_argument_group("main").add_argument
    add("--lang", help="target language, or several for one adapter: sw,yo,ko; what the data holds or "
                     "the translator knows")
    add("--model", default="demo/llama",
        help="base model: a directory in Hugging Face layout, or a hub id (owner/name)")
    add("--data", default="demo/english.jsonl", help="training rows: parallel JSONL, Alpaca, OASST, "
                                                     "ShareGPT, messages; oasst1 is fetched from the hub")
    add("--eval-data", default=None,
        help="questions and answers in both languages; default: eval.jsonl beside --data if there is one, "
             "else the held-out rows are answered")
    add("--translator", default="demo/m2m100",
        help="M2M100 or NLLB, directory or hub id, for rows without the target language")
    add("--out", default=None, help="run directory; default: runs/LANG")
    add("--dry-run", action="store_true",
        help="say what the run would need and take, show samples, and write nothing; "
             "without --lang from the model's config.json alone")
    add("--gpus", type=int, default=None,
        help="with --dry-run: so many H200 instead of this machine; see --shard")
    add("--fresh", action="store_true", help="delete the run directory and start over")
    add("--resume", action="store_true", help="go on with the run in --out, and stop if there is none; "
                                              "without this and --fresh, go on if there is one")
    add = parser.add_argument_group("method").add_argument
    add("--method", default="clo", choices=list(METHODS), help="what to train")
    add("--baseline", default="sft", choices=[*METHODS, "none"], help="trained too, for the comparison")
    add("--lambda", dest="lam", type=float, default=0.5, help="weight of the NLL of target responses, 0 to 1")
    add("--preference", default="sigmoid", choices=["sigmoid", "ipo", "simpo"],
        help="form of the preference term; simpo wants a --beta of 2 or more")
    add("--beta", type=float, default=0.5, help="strength of the preference term")
    add("--anchor", type=float, default=0.0,
        help="weight of a penalty on right English responses that fall below the base")
    add("--train", default="lora", choices=list(LEARNING_RATES),
        help="LoRA on attention, attention itself, or everything")
    add("--lora-rank", type=int, default=16, help="rank R")
    add("--lora-alpha", type=float, default=32, help="scale: the product counts alpha / R")


def add_how(parser) -> None:
    add = parser.add_argument_group("data").add_argument
    add("--source", default="en", help="language the model knows")
    add("--samples", type=int, default=None, help="train on this many rows, drawn by --seed; default: all")
    add("--holdout", type=int, default=100,
        help="rows for validation during training: from the validation split of --eval-data if it has one, "
             "else set apart from --data (a fifth at most)")
    add("--turns", default="first", choices=["first", "all"],
        help="of conversations: the first exchange, or each one")
    add("--system-prompt", default=None, help="put before every question, in the checkpoint's chat template")
    add("--beams", type=int, default=5, help="beam width of the translation")
    add("--keep-failed", action="store_true",
        help="train on rows of which a translated segment failed its checks, too")
    add("--row-tokens", type=int, default=1024, help="tokens of a packed row; longer responses are cut")
    add = parser.add_argument_group("optimisation").add_argument
    add("--lr", type=float, default=None, help="peak learning rate; default by --train: "
        + ", ".join(f"{mode} {rate:g}" for mode, rate in LEARNING_RATES.items())
        + " times 4096 / hidden width")
    add("--epochs", type=int, default=2, help="passes over the rows")
    add("--baseline-epochs", type=int, default=None,
        help="passes for methods without a preference term; default: --epochs")
    add("--batch-size", type=int, default=8, help="rows (samples) per optimiser step")
    add("--micro-rows", type=int, default=1,
        help="packed rows per forward pass; memory, not the result, depends on it")
    add("--warmup", type=float, default=0.1,
        help="part of the steps over which the rate rises; then it falls to 0")
    add("--weight-decay", type=float, default=0.0, help="AdamW's decoupled decay of the trainable weights")
    add("--clip", type=float, default=1.0, help="largest gradient norm")
    add("--seed", type=int, default=0, help="of row choice, order and LoRA's start")


def add_where(parser) -> None:
    add = parser.add_argument_group("evaluation and files").add_argument
    add("--eval-split", default="test", help="rows of --eval-data that are answered at the end")
    add("--max-new-tokens", type=int, default=64, help="longest answer, in tokens")
    add("--eval-every", type=int, default=0, help="steps between validations; 0: once an epoch")
    add("--merge", action="store_true",
        help="LoRA: also write METHOD/model, the whole model with the adapter added")
    add("--tensorboard", action="store_true",
        help="write the curves to METHOD/tensorboard, too; needs that package")
    add("--save-every", type=int, default=100, help="steps between checkpoints")
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--dtype", default="auto", choices=["auto", *DTYPES],
        help="compute type; auto: bf16 on CUDA, else fp32")
    add("--shard", action="store_true",
        help="spread the model over the processes torchrun starts, each holding a part")
    add("--recompute", action="store_true", help="keep the inputs of blocks alone and run each again in the "
                                                 "backward: less memory, a third more time")


AT_LEAST_ONE = ("samples", "holdout", "lora_rank", "epochs", "baseline_epochs", "batch_size", "micro_rows",
                "row_tokens", "beams", "max_new_tokens", "save_every")
POSITIVE = ("lr", "beta", "lora_alpha", "clip")
NOT_NEGATIVE = ("anchor", "weight_decay", "eval_every")


def check_args(parser, args) -> None:
    """Flags that do not go together, and numbers out of range: one line and exit code 2."""
    if args.lang is None and not args.dry_run:
        parser.error("--lang is needed: the target language, as in --lang sw")
    if args.fresh and args.resume:
        parser.error("--fresh starts over and --resume goes on: choose one")
    if args.shard and not args.dry_run and "RANK" not in os.environ:
        parser.error("--shard spreads the model over several processes: "
                     "torchrun --nproc-per-node N clo.py ... starts them")
    if args.gpus is not None and (args.gpus < 1 or not args.dry_run):
        parser.error(f"--gpus {args.gpus}: a number of devices for --dry-run was expected; "
                     f"torchrun starts a run on several")
    if not 0 <= args.seed < 2 ** 63:
        parser.error(f"--seed {args.seed}: a number from 0 to 2^63 - 1 was expected")
    for names, good, wanted in ((AT_LEAST_ONE, lambda x: x >= 1, "at least 1"),
                                (POSITIVE, lambda x: 0 < x < math.inf, "above 0"),
                                (NOT_NEGATIVE, lambda x: 0 <= x < math.inf, "0 or more"),
                                (("lam", "warmup"), lambda x: 0 <= x <= 1, "from 0 to 1")):
        for name in names:
            value = getattr(args, name)
            if value is not None and not good(value):
                flag = {"lam": "lambda"}.get(name, name.replace("_", "-"))
                parser.error(f"--{flag} {value}: a number {wanted} was expected")


if __name__ == "__main__":
    ranks.run(main)
