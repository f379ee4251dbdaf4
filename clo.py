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
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import data
import kernels
import model as llama
import translate
from engine import flags, ranks, runs, scale
from engine.adamw import make_optimizer
from engine.files import InputError, fill_directory, fingerprint, locked, write_json, write_text
from engine.progress import progress
from evals import heldout
from evals.answers import answer_and_score, read_answers
from evals.language import LanguageModel, fit_languages, texts_by_language
from evals.report import closing_lines, report_text
from formats import hub
from formats.chat import Tokenizer
from formats.checkpoints import check_outputs, save_adapter, save_merged, save_model
from formats.configs import read_config
from formats.languages import language_list, normal
from formats.records import describe_counts
from formats.weights import DTYPES, add_update, lora_product

# Every method is a list of stages, and a stage a lambda (None: --lambda) and the prompts whose right
# responses are under the NLL: "en" those in the source language, "tgt" those in the targets.
METHODS = {
    "clo": [(None, ("tgt",))],
    "sft": [(1.0, ("en", "tgt"))],
    "sft-en": [(1.0, ("en",))],
    "sft-tgt": [(1.0, ("tgt",))],
    "dpo": [(0.0, ())],
    "sft+dpo": [(1.0, ("en", "tgt")), (0.0, ())],
}
LOOK = 4                        # rows that a dry run translates
CLASSIFIER_ROWS = 400           # rows that the classifier of reply language learns from
TIMED_LAYERS = (1, 4)           # of the models that a dry run times
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
SIMPO_GAMMA = 0.5               # nats a token by which simpo wants the right response ahead
# Peak learning rates at this hidden width; they scale with its inverse (muP).
REFERENCE_WIDTH = 4096
LEARNING_RATES = {"lora": 1e-4, "attention": 3e-5, "full": 1.5e-5}


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


@dataclass(frozen=True)
class Objective:
    """What a stage minimises: all that a step needs to know of the flags."""
    lam: float                      # weight of the NLL: 1 is plain fine-tuning, 0 preference alone
    nll: tuple[str, ...]            # prompts whose right responses are under the NLL: of "en" and "tgt"
    beta: float = 0.5
    kind: str = "sigmoid"
    anchor: float = 0.0

    @property
    def prefers(self) -> bool:
        return self.lam < 1

    def loss(self, logp: Tensor, batch: data.Batch, step: "Counts") -> Tensor:
        """A micro-batch's part of the step's loss, from the summed log-probs (S,) of its continuations."""
        ref = logp.detach() if batch.ref_logp is None else batch.ref_logp
        scores, base = logp, ref
        if self.kind == "simpo":
            scores, base = logp / batch.length, torch.zeros_like(ref)
        loss = clo_loss(scores[batch.chosen], scores[batch.rejected],
                        base[batch.chosen], base[batch.rejected],
                        logp[batch.nll], step.nll_tokens, step.pairs, self.beta, self.lam, self.kind)
        if self.anchor and self.prefers:
            fallen = anchor_loss(logp[batch.english], ref[batch.english], step.english_tokens)
            loss = loss + self.anchor * fallen
        return loss


PAIRS = Objective(0.5, ("tgt",))    # reads every pair: what held-out figures are made of


# ------------------------------------------------------------------------------------------------------- step

@dataclass(frozen=True)
class Counts:
    """What the means of a whole optimiser step divide by, over all its micro-batches and ranks."""
    pairs: int
    nll_tokens: int
    english_tokens: int

    @classmethod
    def of(cls, batches: list[data.Batch]) -> "Counts":
        return cls(sum(len(batch.chosen) for batch in batches),
                   sum(int(batch.length[batch.nll].sum()) for batch in batches),
                   sum(int(batch.length[batch.english].sum()) for batch in batches))


def train_step(model: llama.Llama, batches: list[data.Batch], objective: Objective, optimizer,
               clip: float) -> dict[str, Tensor]:
    """One optimiser step; its loss, NLL, rewards and log-probs (2, P) and gradient norm, as tensors. Nothing
    waits for the device here, unless there are several ranks."""
    step = Counts.of(batches)                                          # eq. 2, 3: means over the whole step
    figures = []
    for i, counted in ranks.deal(len(batches)):                        # gradient accumulation
        batch = batches[i].to(model.head.device)
        logp = llama.continuation_logps(model, batch)                  # (S,)
        loss = objective.loss(logp, batch, step)                       # eq. 4
        (loss * counted).backward()                                    # 0: only to keep ranks in step
        if counted:
            figures.append(batch_figures(loss.detach(), logp.detach(), batch, objective, step))
    parameters = optimizer.param_groups[0]["params"]
    ranks.sum_gradients_(parameters)                                   # a sum: the loss is already a mean
    norm = ranks.full(nn.utils.clip_grad_norm_(parameters, clip))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if ranks.size() > 1:
        figures = ranks.gather([tuple(value.cpu() for value in part) for part in figures])
    losses, nll, rewards, logps = zip(*figures)
    return {"loss": sum(losses), "nll": sum(nll), "grad_norm": norm,
            "rewards": torch.cat(rewards, 1), "logps": torch.cat(logps, 1)}


def batch_figures(loss: Tensor, logp: Tensor, batch: data.Batch, objective: Objective, step: Counts) -> tuple:
    """What is logged of a micro-batch: loss, NLL, and rewards and log-probs (2, P): chosen, rejected."""
    ref = logp if batch.ref_logp is None else batch.ref_logp
    pair = torch.stack((batch.chosen, batch.rejected))
    nll = -logp[batch.nll].sum() / max(step.nll_tokens, 1)
    return loss, nll, objective.beta * (logp - ref)[pair], logp[pair]


# ------------------------------------------------------------------------------------------------------- loop

@dataclass(frozen=True)
class Schedule:
    """How long and how fast a stage trains."""
    steps: int              # optimiser steps in all
    rate: float             # peak learning rate
    warmup: float           # share of the steps over which the rate rises
    weight_decay: float
    clip: float             # largest gradient norm
    seed: int
    eval_every: int         # steps between validations
    save_every: int         # steps between checkpoints


def step_order(packed: int, steps: int, seed: int) -> list[int]:
    """Which of the packed steps each optimiser step runs: every epoch its own permutation, the last one
    perhaps cut short. A pure function of the seed."""
    generator = torch.Generator().manual_seed(seed + 1)
    order = []
    while len(order) < steps:
        order += torch.randperm(packed, generator=generator).tolist()
    return order[:steps]


def learning_rate(step: int, steps: int, warmup: float) -> float:
    """Factor on the peak rate at 0-based `step`: linear up over warmup * steps,
    then linear down towards 0."""
    rising = max(1, round(warmup * steps))
    return (step + 1) / rising if step < rising else (steps - step) / max(1, steps - rising)


def train(model: llama.Llama, parameters: dict[str, nn.Parameter], name: str, packed: list[list[data.Batch]],
          objective: Objective, schedule: Schedule, validate: Callable[[int], dict], targets: list[str],
          directory: Path, tensorboard: bool = False) -> None:
    """Run a stage from its last checkpoint to its end over packed steps (each a list of micro-batches);
    metrics go to directory/metrics.jsonl, one line a step."""
    order = step_order(len(packed), schedule.steps, schedule.seed)
    device = model.head.device
    optimizer = make_optimizer(parameters.values(), schedule.rate, schedule.weight_decay, device)
    done = runs.load_checkpoint(directory / "checkpoint", parameters, optimizer)
    log = runs.Metrics(directory, done, tensorboard)
    bar = progress(total=len(order), initial=done, desc=f"train {name}", unit="step")
    with log, bar, runs.StopSignal() as stop:
        if done:
            bar.write(f"{name}: resuming at step {done} of {len(order)}")
        else:
            log.write({"step": 0} | validate(0))
        for i in range(done, len(order)):
            started = time.perf_counter()
            batches, last = packed[order[i]], i + 1 == len(order)
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate * learning_rate(i, len(order), schedule.warmup)
            result = train_step(model, batches, objective, optimizer, schedule.clip)
            if i == 0 and objective.prefers:
                check_first_rewards(result["rewards"])
            metrics = step_metrics(i + 1, result, group["lr"], batches, targets, started)
            stop_unless_finite(metrics, name, schedule.rate)
            if last or (i + 1) % schedule.eval_every == 0:
                metrics |= validate(i + 1)
            log.write(metrics)
            bar.set_postfix_str(f"loss {metrics['loss']:.3f}", refresh=False)
            bar.update()
            signalled = ranks.largest(stop.number, device)
            if signalled or last or (i + 1) % schedule.save_every == 0:
                runs.save_checkpoint(directory / "checkpoint", i + 1, parameters, optimizer)
            if signalled:
                bar.close()
                print(f"stopped by signal {signalled} after step {i + 1}, saved; "
                      f"the same command goes on from there")
                sys.exit(128 + signalled)


def step_metrics(step: int, result: dict[str, Tensor], rate: float, batches: list[data.Batch],
                 targets: list[str], started: float) -> dict:
    """One line of metrics.jsonl. Here a step waits for the device, and nowhere before."""
    metrics = {"step": step, "loss": result["loss"].item(), "nll": result["nll"].item(),
               "grad_norm": result["grad_norm"].item(), "lr": rate}
    seconds = time.perf_counter() - started
    side = torch.cat([batch.side[batch.chosen] for batch in batches])
    metrics |= heldout.pair_metrics(result["rewards"].cpu(), result["logps"].cpu(), side, targets)
    tokens = sum(batch.used for batch in batches)
    return metrics | {"tokens": tokens, "tokens_per_second": tokens / seconds, "seconds": seconds,
                      "peak_memory_gb": scale.peak_memory_gb()}


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
    tqdm.write("rewards before the first update: "
               + (f"at most {worst:.1g} (rounding)" if worst else "0, as they should be"))


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
            base = getattr(block.self_attn, name)
            setattr(block.self_attn, name, LoraLinear(base, rank, alpha, generator, device))
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
    if train == "lora":
        add_lora(model, rank, alpha, seed, device)
    for name, parameter in model.named_parameters():
        projection = ".self_attn." in name and name.split(".")[-2] in ATTENTION
        wanted = {"lora": ".lora_" in name, "attention": projection, "full": True}[train]
        parameter.requires_grad_(wanted)
        if wanted:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    return trainable(model)


def trainable(model: llama.Llama) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


# -------------------------------------------------------------------------------------------------------- job

# Flags that decide what a run gives: with other ones it is another run.
IDENTITY = """
    lang model data eval_data translator method baseline lam nll preference beta anchor train
    lora_rank lora_alpha source samples holdout turns system_prompt template_args beams keep_failed
    row_tokens lr epochs baseline_epochs batch_size micro_rows warmup weight_decay clip seed
    eval_split answers max_new_tokens eval_every merge save_every device dtype shard
""".split()


@dataclass(frozen=True)
class Packing:
    """How samples become micro-batches. trim: drop padding that all rows of one share; on CUDA rows keep one
    length, since its attention is compiled for a shape."""
    batch_size: int = 8
    row_tokens: int = 1024
    micro_rows: int = 1
    trim: bool = True


@dataclass
class Job:
    """What all methods of a run share."""
    args: argparse.Namespace
    run: Path
    device: torch.device
    dtype: str                       # "auto" resolved
    packing: Packing
    tokenizer: Tokenizer
    identity: str                    # hash of the flags in IDENTITY and of the files the run reads
    groups: list[list[data.Fork]]    # a group of forks for every training row
    heldout: list[data.Batch]
    samples: list[data.Fork]         # held-out questions whose answers every validation shows
    answered: list[dict]             # rows of which --answers are answered at the end
    classifier: LanguageModel
    untrained: list[dict] | None = None     # the untrained model's answers to the samples, once known

    @property
    def languages(self) -> tuple[str, ...]:
        return self.args.source, *self.args.targets


def stages_of(method: str, args) -> list[tuple[str, Objective]]:
    """(name, objective) of each stage of a method; none for the untrained base."""
    stages = []
    for name, (lam, nll) in zip(method.split("+"), METHODS.get(method, [])):
        if lam is None:
            lam, nll = args.lam, tuple(args.nll.split(","))
        stages.append((name, Objective(lam, nll, args.beta, args.preference, args.anchor)))
    return stages


def wanted_objectives(args) -> dict[str, list[Objective]]:
    """The objectives of the stages of the baseline and of the method."""
    return {name: [objective for _, objective in stages_of(name, args)]
            for name in (args.baseline, args.method)}


def stage_forks(group: list[data.Fork], objective: Objective) -> list[data.Fork]:
    """What a stage reads of one row's forks: the right continuation and, for a preference, the wrong ones
    that differ from it. A fork that then serves neither term is left out."""
    forks = []
    for fork in group:
        right, others = fork.continuations[0], fork.continuations[1:] if objective.prefers else []
        wrong = [ids for ids in others if ids != right]
        nll = ("tgt" if fork.side else "en") in objective.nll
        if wrong or nll:
            forks.append(replace(fork, continuations=[right, *wrong], nll=nll))
    return forks


def make_steps(groups: list[list[data.Fork]], objective: Objective, packing: Packing,
               seed: int | None) -> list[list[data.Batch]]:
    """Optimiser steps of packing.batch_size samples, each a list of micro-batches. Packed once: reference and
    training see the same rows (a GEMM row's bits depend on the row count). seed None keeps the order."""
    order = list(range(len(groups)))
    if seed is not None:
        order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    steps = []
    for first in range(0, len(order), packing.batch_size):
        forks = []
        for i in order[first:first + packing.batch_size]:
            forks += stage_forks(groups[i], objective)
        if forks:
            steps.append(data.micro_batches(forks, packing.row_tokens, packing.micro_rows, packing.trim))
    return steps


def check_pairs(groups: list[list[data.Fork]], path: str, methods: dict[str, list[Objective]]) -> None:
    """InputError when a method has a stage that prefers and no sample of the file gives it a pair."""
    for name, objectives in methods.items():
        prefers = any(objective.prefers for objective in objectives)
        if prefers and all(fork.equal for group in groups for fork in group):
            raise InputError(f"{path}: every row has the same response in all languages, so {name} finds "
                             f"nothing to prefer: give other rows, or --method sft")


@torch.no_grad()
def summed_logps(model: llama.Llama, batches: list[data.Batch], label: str) -> list[Tensor]:
    """continuation_logps of every batch in order, on the CPU: the code path of training without gradient."""
    shares = ranks.deal(len(batches))
    sums = []
    for i, counted in progress(shares, desc=label, unit="batch", disable=not label):
        logp = llama.continuation_logps(model, batches[i].to(model.head.device)).cpu()
        if counted:
            sums.append(logp)
    return ranks.gather(sums)


def reference_logps(model: llama.Llama, batches: list[data.Batch], job: Job, history: str,
                    label: str) -> list[Tensor]:
    """summed_logps under the model as it is now, from the run's cache if they are there: a key covers all
    they depend on. `history` names the model's training so far."""
    args, content, shapes = job.args, [], []
    for batch in batches:
        content.append([[fork.prompt, fork.continuations] for fork in batch.forks])
        shapes.append(list(batch.tokens.shape))
    # The code too: another order of sums gives other last bits, and rewards would not begin at 0.
    code = [Path(llama.__file__), *sorted(Path(kernels.__file__).parent.glob("*.py"))]
    key = fingerprint(runs.model_fingerprint(args.model), history, content, shapes, args.train, job.dtype,
                      job.device.type, torch.__version__, torch.get_num_threads(), *code)
    sizes = [len(batch.length) for batch in batches]
    return runs.cached_reference(job.run, key, sizes, lambda: summed_logps(model, batches, label))


def load_model(job: Job, learns: bool) -> tuple[llama.Llama, dict[str, nn.Parameter]]:
    """The base model and what of it is trained; with --shard spread over all ranks."""
    args = job.args

    def learn(model):
        if learns:
            make_trainable(model, args.train, args.lora_rank, args.lora_alpha, args.seed, job.device)
    dtype = DTYPES[job.dtype]
    if args.shard:
        model = ranks.load(args.model, job.device, dtype, prepare=learn, recompute=args.recompute)
    else:
        compiler = "inductor" if learns and job.device.type == "cuda" else None   # FSDP's hooks break graphs
        model = llama.load(args.model, job.device, dtype, recompute=args.recompute, compiler=compiler)
        learn(model)
    return model, trainable(model)


def schedule_of(objective: Objective, packed: int, hidden_size: int, args) -> Schedule:
    """Steps and rate of a stage over so many packed steps."""
    epochs = args.epochs if objective.prefers else args.baseline_epochs or args.epochs
    rate = args.lr or LEARNING_RATES[args.train] * REFERENCE_WIDTH / hidden_size
    return Schedule(max(1, round(epochs * packed)), rate, args.warmup, args.weight_decay, args.clip,
                    args.seed, args.eval_every or packed, args.save_every)


def sample_answers(model: llama.Llama, job: Job) -> list[dict]:
    """Greedy answers to the first held-out questions in every language:
    numbers can look well while the text does not."""
    decode = job.tokenizer.decode
    with progress(total=len(job.samples), desc="sample answers", unit="reply", leave=False) as bar:
        replies = llama.generate(model, [fork.prompt for fork in job.samples], job.args.max_new_tokens,
                                 job.tokenizer.stop_ids, progress=bar.update)
    return [{"row_id": fork.row, "language": fork.language, "reply": decode(reply).strip(),
             "expected": decode(fork.continuations[0]).strip()} for fork, reply in zip(job.samples, replies)]


def reference_nll(model: llama.Llama, job: Job) -> dict[str, list[float]]:
    """Nats of the expected answer, stop token included, to each question that is answered, by language."""
    nats = {}
    for language in job.languages:
        forks = [data.Fork(job.tokenizer.prompt_ids(row[language]["prompt"], job.args.system_prompt),
                           [job.tokenizer.response_ids(row[language]["response"])], language, row["row_id"])
                 for row in job.answered[:job.args.answers]]
        longest = max(fork.length for fork in forks)
        if longest > model.config.max_position_embeddings:
            print(f"a question with its answer in {language} has {longest} tokens, the model was made for "
                  f"{model.config.max_position_embeddings}: its bits per byte say little")
        batches = data.micro_batches(forks, max(job.packing.row_tokens, longest), job.packing.micro_rows,
                                     job.packing.trim)
        nats[language] = [0.0] * len(forks)
        for batch, sums in zip(batches, summed_logps(model, batches, f"expected answers {language}")):
            for i, logp in zip(batch.order, sums.tolist()):
                nats[language][i] = -logp
    return nats


def run_method(name: str, job: Job) -> dict:
    """Load the base model, train it by one method (or not at all: 'base'), export it and score it. A finished
    method is read back from its result.json."""
    args, directory = job.args, job.run / name
    result = directory / "result.json"
    if ranks.on_first(result.exists):
        print(f"{name}: done before, read from {result}")
        return ranks.on_first(lambda: runs.read_result(result))
    stages = stages_of(name, args)
    print(f"loading {args.base}")
    model, parameters = load_model(job, learns=bool(stages))
    started, seconds = time.perf_counter(), 0.0
    base = reference_logps(model, job.heldout, job, "", "reference held-out")
    policy = base
    for number, (part, objective) in enumerate(stages):
        packed = make_steps(job.groups, objective, job.packing, args.seed)
        history = "" if number == 0 else fingerprint(job.identity, name, number)
        if objective.prefers:
            batches = [batch for step in packed for batch in step]
            sums = reference_logps(model, batches, job, history, f"reference {name}")
            for batch, logp in zip(batches, sums):
                batch.ref_logp = logp
        before = base
        if number > 0:                       # the reference of a later stage is what it starts from
            before = reference_logps(model, job.heldout, job, history, "reference held-out")
        policy = None

        def validate(step: int) -> dict:
            nonlocal policy
            untrained = step == 0 and number == 0 and job.untrained is not None
            policy = before if step == 0 else summed_logps(model, job.heldout, f"validate {part}")
            answers = job.untrained if untrained else sample_answers(model, job)
            if step == 0 and number == 0:
                job.untrained = answers
            figures = heldout.score(job.heldout, policy, before, args.beta, args.targets)
            tqdm.write(heldout.describe(step, figures, answers))
            return figures | {"answers": answers}
        schedule = schedule_of(objective, len(packed), model.config.hidden_size, args)
        train(model, parameters, part, packed, objective, schedule, validate, args.targets,
              directory if len(stages) == 1 else directory / f"{number + 1}-{part}", args.tensorboard)
        seconds = time.perf_counter() - started
        if policy is None:                                # trained before this command began
            policy = summed_logps(model, job.heldout, "held-out")
    scores = answer_and_score(model, job.tokenizer, job.answered, job.languages, job.classifier,
                              args.max_new_tokens, args.system_prompt,
                              directory / "answers.jsonl" if ranks.rank() == 0 else None,
                              args.answers,
                              reference_nll(model, job))
    scores["heldout"] = heldout.score(job.heldout, policy, base, args.beta, args.targets)
    scores["train_seconds"] = round(seconds, 2)
    if stages:
        export(model, parameters, job, directory)
    ranks.on_first(lambda: write_json(result, scores))
    return scores


def export(model: llama.Llama, parameters: dict[str, nn.Parameter], job: Job, directory: Path) -> None:
    """The trained part in the layout other tools read: a PEFT adapter, and with --merge or without LoRA a
    whole Hugging Face directory. Each is loaded again and compared with the model, which ends without memory."""
    args, tokenizer = job.args, job.tokenizer
    adapter, merged, outputs = directory / "adapter", directory / "model", {}
    print(f"writing the results to {directory}")
    if args.train == "lora":
        ranks.on_first(lambda: fill_directory(adapter, lambda path: save_adapter(
            model, path, args.base, ATTENTION, args.lora_rank, args.lora_alpha, tokenizer.template)))
        outputs[adapter] = {"path": args.model, "adapter": adapter}
        if args.merge:
            ranks.on_first(lambda: fill_directory(
                merged, lambda path: save_merged(path, args.model, adapter, tokenizer)))
            outputs[merged] = {"path": merged}
    else:
        def change(name: str, old: Tensor) -> Tensor:     # all ranks gather a sharded parameter
            return ranks.full(parameters[name].detach()) if name in parameters else old
        fill_directory(merged, lambda path: save_model(path, args.model, tokenizer, change),
                       writes=ranks.rank() == 0)
        ranks.barrier()
        outputs[merged] = {"path": merged}
    ids = job.groups[0][0].prompt + job.groups[0][0].continuations[0]
    if args.shard:
        check_outputs(model, outputs, ids, ranks.load)
    else:
        ranks.on_first(lambda: check_outputs(model, outputs, ids))


# ------------------------------------------------------------------------------------------------------- main

def read_split(args) -> data.Split:
    """The rows of --data and --eval-data, read, counted and dealt out; some perhaps without the targets."""
    rows, evaluated = data.training_rows(args.data, args.source, args.targets, args.turns), []
    if args.eval_data:
        if fingerprint(hub.data_file(args.data)) == fingerprint(hub.data_file(args.eval_data)):
            raise InputError(f"--eval-data {args.eval_data} is the same as --data: the run would train on "
                             f"its test; leave it out, and rows are held out of --data")
        evaluated = data.evaluation_rows(args.eval_data, args.source, args.targets, rows)
    with data.naming(args.eval_data):
        return data.split_rows(rows, evaluated, args.samples, args.holdout, args.eval_split, args.seed)


def used_eval_data(args) -> str | None:
    """--eval-data. It is said when an eval.jsonl beside the data is used, which nobody named, and when it is not,
    because no row of it has all the languages."""
    if not args.eval_found:
        return args.eval_data
    languages = {args.source, *args.targets}
    rows = data.read_rows(hub.data_file(args.eval_data), args.source, targets=args.targets)
    if any(languages <= set(data.languages_of(row)) for row in rows):
        print(f"{args.eval_data} lies beside the data: it is used for validation and answers (see --eval-data)")
        return args.eval_data
    print(f"{args.eval_data} lies beside the data, but no row of it holds {' and '.join(sorted(languages))}: "
          f"it is not used, rows are held out of --data")
    return None


def check_enough(split: data.Split, args) -> None:
    rows, heldout_rows, _ = split.parts()
    if not rows or not heldout_rows:
        raise InputError(
            f"{args.data}: {len(rows)} rows are left to train on and {len(heldout_rows)} to hold out, "
            f"one of each is needed: give more rows, or --keep-failed if the translation checks dropped them")


def open_run(args, tokenizer: Tokenizer, device: torch.device) -> tuple[Path, dict, str]:
    """The run directory, claimed once all input was found usable; what it chose; and a hash of what it is."""
    # The model as it was named: where it lies differs when the command is given in another directory.
    identity = {name: getattr(args, name) for name in IDENTITY} | {"model": args.base}
    inputs = {"model": runs.model_fingerprint(args.model), "tokenizer": tokenizer.fingerprint,
              "data": fingerprint(hub.data_file(args.data)),
              "eval_data": args.eval_data and fingerprint(hub.data_file(args.eval_data))}
    run, chosen = ranks.on_first(
        lambda: runs.open_run(args.out, identity, inputs, choose(args, device), args.fresh))
    return run, chosen, fingerprint(identity, inputs)


def choose(args, device: torch.device) -> dict:
    """What "auto" stands for on this machine."""
    dtype = args.dtype if args.dtype != "auto" else "bf16" if device.type == "cuda" else "fp32"
    rows = args.micro_rows
    if rows is None:
        rows = 1
        if device.type == "cuda":
            plan = scale.Plan(args.train, args.lora_rank, dtype, args.row_tokens, recompute=args.recompute)
            memory = torch.cuda.get_device_properties(device).total_memory
            rows = scale.fitting_micro_rows(read_config(args.model), plan, memory)
    return {"dtype": dtype, "micro_rows": rows}


def make_job(args, device: torch.device) -> Job:
    """Read, translate and pack all that a run needs. Its directory is claimed once the input is usable."""
    print(f"reading the tokenizer of {args.base}")
    tokenizer, config = data.load_tokenizer(args.model, args.template_args), read_config(args.model)
    args.row_tokens = min(args.row_tokens, config.max_position_embeddings)
    print(f"device {device}; model {args.base}: {config.model_type}, {config.num_hidden_layers} layers, "
          f"width {config.hidden_size}; run directory {args.out}")
    for note in tokenizer.chat.notes:
        print(note)

    print(f"\n1. Rows: {args.source} and {', '.join(args.targets)}")
    args.eval_data = ranks.on_first(lambda: used_eval_data(args))
    split = ranks.on_first(lambda: read_split(args))
    check_enough(split, args)
    missing = data.missing_targets(split.rows, args.targets)
    if missing:
        translator = translate.translator_for(split.rows, missing, args.translator, device)
        run, chosen, identity = open_run(args, tokenizer, device)
        path = run / f"translated-{','.join(missing)}.jsonl"
        split = replace(split, rows=translate.translate_rows(
            split.rows, translator, args.source, missing, path, args.beams, keep_failed=args.keep_failed))
        check_enough(split, args)
    rows, heldout_rows, answered = split.parts()

    print("\n2. Forks")
    options = tokenizer, args.source, args.targets, args.row_tokens, args.system_prompt
    with data.naming(args.data):
        groups, counts = data.make_forks(rows, *options)
    print(describe_counts(counts))
    with data.naming(args.eval_data if split.heldout else args.data):
        heldout_groups, _ = data.make_forks(heldout_rows, *options)
    check_pairs(groups, args.data, wanted_objectives(args))
    if not missing:
        run, chosen, identity = open_run(args, tokenizer, device)
    print(f"compute type {chosen['dtype']}, {chosen['micro_rows']} packed rows per forward pass")
    packing = Packing(args.batch_size, args.row_tokens, chosen["micro_rows"], trim=device.type != "cuda")
    heldout_steps = make_steps(heldout_groups, PAIRS, packing, None)
    print(f"reply language: learned from {min(len(rows), CLASSIFIER_ROWS):,} of {len(rows):,} rows")
    texts = texts_by_language(rows[:CLASSIFIER_ROWS], (args.source, *args.targets))
    return Job(args, run, device, chosen["dtype"], packing, tokenizer, identity, groups,
               [batch for step in heldout_steps for batch in step],
               [fork for group in heldout_groups[:heldout.SAMPLE_ANSWERS] for fork in group],
               answered, fit_languages(texts))


def main(argv=None) -> None:
    args = parse_args(argv)
    began = time.perf_counter()
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise InputError("--tensorboard needs the tensorboard package: pip install tensorboard")
    device = ranks.start(ranks.pick_device(args.device))
    args.device = device.type
    if device.type == "cuda":
        ranks.fix_order_of_sums()
    args.base = args.model                                             # what the adapter names
    if args.dry_run:
        dry_run(args, device)
        return
    args.model = str(hub.local(args.model))                            # where it lies
    with scale.memory_advice(args.device, advice(args)), contextlib.ExitStack() as lock:
        ranks.on_first(lambda: lock.enter_context(locked(args.out)))
        job = make_job(args, device)
        methods, answers = {}, {}
        wanted = [name for name in ("base", args.baseline, args.method) if name != "none"]
        for number, name in enumerate(dict.fromkeys(wanted), 3):
            print(f"\n{number}. {'Base model' if name == 'base' else 'Train ' + name}")
            methods[name] = run_method(name, job)
            answers[name] = read_answers(job.run / name / "answers.jsonl", methods[name])
        report = {"lang": args.lang, "samples": len(job.groups), "seed": args.seed, "methods": methods}
        text = report_text(report, answers, args.source)
        ranks.on_first(lambda: (write_json(job.run / "report.json", report),
                                write_text(job.run / "report.md", text)))
    print("\n" + text)
    print("\n".join(closing_lines(answers)))
    print_ending(job, time.perf_counter() - began)
    ranks.stop()


def advice(args) -> list[str]:
    """Flags that lower the memory of this run."""
    helps = {"--micro-rows 1": args.micro_rows != 1, "--recompute": not args.recompute,
             f"--row-tokens {args.row_tokens // 2}": True, "--dtype bf16": args.dtype != "bf16",
             "--train lora": args.train != "lora", "--shard on more devices": not args.shard}
    return [flag for flag, useful in helps.items() if useful]


def print_ending(job: Job, seconds: float) -> None:
    """Where everything is, what it takes on the disk, and how to talk to the result."""
    args, run = job.args, job.run
    trained = run / args.method
    print(f"Took {seconds:.0f} s, peak memory {scale.peak_memory_gb():.2f} GB. "
          f"Report: {run}/report.md, report.json; curves: {trained}/metrics.jsonl")
    checkpoints = shlex.join(map(str, sorted(run.glob("**/checkpoint"))))
    print(f"{run} takes {runs.disk_bytes(run) / 1e6:.1f} MB; what only resuming needs: rm -r {checkpoints}")
    option = ["--adapter", f"{trained}/adapter"] if args.train == "lora" else ["--model", f"{trained}/model"]
    for flag, value in (("--system-prompt", args.system_prompt), ("--template-args", args.template_args)):
        option += [flag, value] if value else []
    question = job.answered[0][args.targets[0]]["prompt"].strip().splitlines()[0]
    words = ["python", os.path.relpath(hub.ROOT / "eval.py"), "ask", *option]
    words += ["--"] * question.startswith("-")                         # else it would be read as a flag
    print("Talk to it:\n  " + shlex.join([*words, question]))


# ---------------------------------------------------------------------------------------------------- dry run

def dry_run(args, device: torch.device) -> None:
    """Say what the run would train, need and take, show two samples with the loss mask, and write nothing.
    Without --lang the estimate alone, from config.json; with --gpus for other devices than this machine's."""
    args.model = str(hub.local(args.model, weights=()))
    config = read_config(args.model)
    args.row_tokens = min(args.row_tokens, config.max_position_embeddings)
    here = args.gpus is None
    chosen = choose(args, device) if here else {"dtype": "bf16", "micro_rows": args.micro_rows or 1}
    plan = scale.Plan(args.train, args.lora_rank, chosen["dtype"], args.row_tokens, chosen["micro_rows"],
                      args.recompute, args.gpus or 1, args.shard, device=device.type if here else "cuda")
    memory = scale.device_bytes(device) if here else scale.DEVICE_BYTES
    print(f"{args.base}: {config.model_type}, {config.num_hidden_layers} layers, width {config.hidden_size}")
    print(scale.describe(config, plan, memory))
    if args.lang is None:
        return
    tokenizer = data.load_tokenizer(args.model, args.template_args)
    args.eval_data = used_eval_data(args)
    split = read_split(args)
    rows, missing = split.rows[split.apart:], data.missing_targets(split.rows, args.targets)
    count = len(rows)
    if missing:
        translator = translate.translator_for(rows, missing, args.translator, device)
        rows = translate.translate_ahead(rows[:LOOK], translator, args.source, missing, args.beams)
    groups, counts = data.make_forks(rows, tokenizer, args.source, args.targets, args.row_tokens,
                                     args.system_prompt)
    print(f"of {len(rows)} rows: {describe_counts(counts)}")
    if len(rows) == count:                                       # else the rows not looked at may have pairs
        check_pairs(groups, args.data, wanted_objectives(args))
    packing = Packing(args.batch_size, args.row_tokens, chosen["micro_rows"], trim=plan.device != "cuda")
    if here:
        print("timing models of {} and {} layers".format(*TIMED_LAYERS), f"on {device} in {chosen['dtype']}")
    total, each = 0.0, math.ceil(count / args.batch_size)
    for name in dict.fromkeys((args.baseline, args.method)):
        for part, objective in stages_of(name, args):
            steps = make_steps(groups, objective, packing, args.seed)
            used = sum(batch.used for step in steps for batch in step)
            tokens = used / len(groups) * min(args.batch_size, count)
            took = scale.step_seconds(config, plan, tokens)
            if here:
                took = measured_seconds(config, plan, steps, objective, device, tokens)
            schedule = schedule_of(objective, each, config.hidden_size, args)
            seconds = schedule.steps * took["step"] + objective.prefers * each * took["reference"]
            total += seconds
            print(f"{name}, stage {part}: {count:,} rows, {schedule.steps:,} steps of about {tokens:,.0f} "
                  f"tokens and {took['step']:.3g} s" + ", a reference pass" * objective.prefers
                  + f": about {seconds / 60:.1f} min")
    print(f"in all about {total / 60:.1f} min; translation, validation and answers come on top")
    for fork in [fork for group in groups[:2] for fork in group]:
        print("\n" + data.show(fork, tokenizer))


def measured_seconds(config, plan: scale.Plan, steps: list[list[data.Batch]], objective: Objective,
                     device: torch.device, tokens: float) -> dict[str, float]:
    """Seconds of a step and of its reference pass over so many row tokens: the run's own step, on its own
    rows, timed with models of few layers; a layer more costs what the last ones did."""
    batches = [max((batch for step in steps for batch in step), key=lambda batch: batch.used)]
    timed = {}
    for layers in TIMED_LAYERS:
        model = scale.stand_in(config, layers, device, DTYPES[plan.dtype])
        parameters = make_trainable(model, plan.train, plan.rank, 32, 0, device)
        optimizer = make_optimizer(parameters.values(), 1e-3, 0.0, device)
        timed[layers] = {
            "step": scale.seconds_of(lambda: train_step(model, batches, objective, optimizer, 1.0), device),
            "reference": scale.seconds_of(lambda: summed_logps(model, batches, ""), device)}
    few, more = TIMED_LAYERS
    share = tokens / batches[0].used
    seconds = {}
    for key in ("step", "reference"):
        layer = (timed[more][key] - timed[few][key]) / (more - few)
        seconds[key] = share * (timed[few][key] + (config.num_hidden_layers - few) * layer)
    return seconds


# ----------------------------------------------------------------------------------------------- command line

def parse_args(argv=None) -> argparse.Namespace:
    parser = flags.Parser(
        prog="clo.py", usage="python clo.py --lang LANG [options]",
        description="Teach an English-centric model another language by Cross-Lingual Optimization, "
                    "beside a baseline.",
        epilog="Example: python clo.py --lang sw --model Llama-3.2-1B --data alpaca.json "
               "--translator m2m100_1.2B. The same command goes on where a killed run stopped.")
    add_what(parser)
    add_how(parser)
    add_where(parser)
    args = parser.parse_args(argv)
    args.lam = vars(args).pop("lambda")        # the word is Python's
    check_args(parser, args)
    args.targets = [] if args.lang is None else language_list(args.lang)
    args.lang = None if args.lang is None else ",".join(args.targets)
    if len({args.source, *args.targets}) <= len(args.targets):
        parser.error(f"--lang {args.lang}: different languages joined by commas were expected, "
                     f"{args.source} not among them")
    args.out = args.out or f"runs/{args.lang}"
    beside = Path(args.data).parent / "eval.jsonl"
    args.eval_found = (args.eval_data is None and hub.find(args.data).is_file() and hub.find(beside).is_file()
                       and beside != Path(args.data))
    if args.eval_found:
        args.eval_data = str(beside)
    return args


def add_what(parser) -> None:
    add = flags.group(parser, "main")
    add("--lang", str, None, "target language, or several for one adapter: sw,yo,ko")
    add("--model", str, "demo/llama", "base model: a Hugging Face directory, or a hub id (owner/name)")
    add("--data", str, "demo/english.jsonl", "training rows, in any format data.py reads, or oasst1")
    add("--eval-data", str, None, "questions and answers in every language; without it eval.jsonl beside "
                                  "--data if there is one, else the held-out rows are answered")
    add("--translator", str, "demo/m2m100", "M2M100 or NLLB, directory or hub id, for rows without a target")
    add("--out", str, None, "run directory; without it runs/LANG")
    add("--dry-run", bool, False, "say what the run would need and take, show samples, and write nothing; "
                                  "without --lang from the model's config.json alone")
    add("--gpus", flags.positive_int, None, "with --dry-run: so many H200 instead of this machine")
    add("--fresh", bool, False, "start over; the run that is there is renamed aside")
    add = flags.group(parser, "method")
    add("--method", list(METHODS), "clo", "what to train")
    add("--baseline", [*METHODS, "none"], "sft", "trained too, for the comparison")
    add("--lambda", flags.fraction, 0.5, "weight of the NLL, 0 to 1")
    add("--nll", ["tgt", "en,tgt"], "tgt", "responses under clo's NLL; en,tgt is the paper's ablation")
    add("--preference", ["sigmoid", "ipo", "simpo"], "sigmoid", "form of the preference term; simpo wants "
                                                                "--beta 2 or more")
    add("--beta", flags.positive, 0.5, "strength of the preference term")
    add("--anchor", flags.not_negative, 0.0, "weight of a penalty on right English responses that fall below "
                                             "the base")
    add("--train", list(LEARNING_RATES), "lora", "LoRA on attention, attention itself, or everything")
    add("--lora-rank", flags.positive_int, 16, "rank R")
    add("--lora-alpha", flags.positive, 32.0, "scale: the product counts alpha / R")


def add_how(parser) -> None:
    add = flags.group(parser, "data")
    add("--source", normal, "en", "language the model knows")
    add("--samples", flags.positive_int, None, "train on so many rows, drawn by --seed; without it on all")
    add("--holdout", flags.positive_int, 100, "rows for validation during training: from --eval-data's "
                                              "validation split, else from --data (a fifth at most)")
    add("--turns", ["first", "all"], "first", "of conversations: the first exchange, or each one")
    add("--system-prompt", str, None, "put before every question, in the checkpoint's chat template")
    add("--template-args", str, None, "variables of the chat template: '{\"enable_thinking\": false}'")
    add("--beams", flags.positive_int, 5, "beam width of the translation")
    add("--keep-failed", bool, False, "train on rows of which a translated segment failed its checks, too")
    add("--row-tokens", flags.positive_int, 1024, "tokens of a packed row; longer responses are cut")
    add = flags.group(parser, "optimisation")
    rates = ", ".join(f"{mode} {rate:g}" for mode, rate in LEARNING_RATES.items())
    add("--lr", flags.positive, None, f"peak learning rate; without it {rates}, times 4096 / hidden width")
    add("--epochs", flags.positive, 2.0, "passes over the rows; 0.5 is half of one")
    add("--baseline-epochs", flags.positive, None, "passes for methods without a preference term; without it "
                                                   "--epochs")
    add("--batch-size", flags.positive_int, 8, "rows (samples) per optimiser step")
    add("--micro-rows", flags.positive_int, None, "packed rows per forward pass: memory, not the result, "
                                                  "depends on it; without it 1 on a CPU, what fits on a GPU")
    add("--warmup", flags.fraction, 0.1, "part of the steps over which the rate rises; then it falls to 0")
    add("--weight-decay", flags.not_negative, 0.0, "AdamW's decoupled decay of the trainable weights")
    add("--clip", flags.positive, 1.0, "largest gradient norm")
    add("--seed", flags.seed, 0, "of row choice, order and LoRA's start")


def add_where(parser) -> None:
    add = flags.group(parser, "evaluation and files")
    add("--eval-split", str, "test", "rows of --eval-data that are answered at the end")
    add("--answers", flags.positive_int, None, "answer so many of them; without it all")
    add("--max-new-tokens", flags.positive_int, 64, "longest answer, in tokens")
    add("--eval-every", flags.count, 0, "steps between validations; 0: once an epoch")
    add("--merge", bool, False, "LoRA: also write METHOD/model, the whole model with the adapter added")
    add("--tensorboard", bool, False, "write the curves to METHOD/tensorboard, too; needs that package")
    add("--save-every", flags.positive_int, 100, "steps between checkpoints")
    add = flags.group(parser, "machine")
    add("--device", str, "auto", "auto, cpu, cuda, cuda:1, mps")
    add("--dtype", ["auto", *DTYPES], "auto", "compute type; auto: bf16 on CUDA, else fp32")
    add("--shard", bool, False, "spread the model over the processes torchrun starts, each holding a part")
    add("--recompute", bool, False, "activation checkpointing: keep the inputs of blocks alone, run each "
                                    "again in the backward; a third more time")


def check_args(parser, args) -> None:
    """Flags that do not go together: one line and exit code 2."""
    if args.lang is None and not args.dry_run:
        parser.error("--lang is needed: the target language, as in --lang sw")
    if args.shard and not args.dry_run and "RANK" not in os.environ:
        parser.error("--shard spreads the model over several processes: "
                     "torchrun --nproc-per-node N clo.py ... starts them")
    if args.gpus is not None and not args.dry_run:
        parser.error(f"--gpus {args.gpus}: only --dry-run takes it; torchrun starts a run on several")


if __name__ == "__main__":
    ranks.run(main)
