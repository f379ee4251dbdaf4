"""Cross-Lingual Optimization: an English-centric Llama-style model learns a language and keeps its English.

    python clo.py --lang sw

English rows are translated, and every row gives two *forks*: the English question with the English response
(chosen) and the translated one (rejected), and the translated question the other way round. With y_w the
chosen, y_l the rejected response to x, log-probs summed over their tokens, and ref the model before training:

    margin = [log pi(y_w|x) - log ref(y_w|x)] - [log pi(y_l|x) - log ref(y_l|x)]                       (eq. 1)
    L_CL   = mean over pairs of both directions of  -log sigmoid(beta * margin)                        (eq. 2)
    L_SFT  = -(sum of log pi(y_t|x_t)) / (number of tokens), t: the target language's                  (eq. 3)
    L_CLO  = lambda * L_SFT + (1 - lambda) * L_CL                                                      (eq. 4)

Means are over an optimiser step, however it is cut into micro-batches. Only attention is trained. Two
defaults are not the paper's: an anchor (its mean is per token), and LoRA in the place of attention's own W:

    L      = L_CLO + anchor * sum of max(0, log ref(y_en|x_en) - log pi(y_en|x_en)) / (their tokens)   (eq. 5)
    W'     = W + (alpha / R) B A                                                                       (eq. 6)

References: CLO (ACL 2025, arXiv 2505.14297), DPO (arXiv 2305.18290), LoRA (arXiv 2106.09685).
"""

import argparse
import contextlib
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import data
import model as llama                           # the module: a model is `model` here
from engine import flags, ranks, runs, scale
from engine.adamw import make_optimizer
from engine.files import InputError, fingerprint, locked, write_json, write_text
from engine.job import Job, ending_lines, make_job, plan_of, read_back, reference_logps
from engine.progress import progress
from evals import heldout
from evals.answers import answer_and_score, expected_nll, read_answers
from evals.report import closing_lines, report_text
from formats import hub
from formats.checkpoints import export
from formats.configs import read_config
from formats.languages import language_list, normal
from formats.weights import DTYPES, add_update, lora_product

# Every method is a list of stages, and a stage a lambda and the prompts whose right responses count in eq. 3:
# "en" those in the source language, "tgt" those in the targets. lambda None: --lambda and --nll say both.
METHODS = {
    "clo": [(None, ("tgt",))],
    "sft": [(1.0, ("en", "tgt"))],
    "sft-en": [(1.0, ("en",))],
    "sft-tgt": [(1.0, ("tgt",))],
    "dpo": [(0.0, ())],
    "sft+dpo": [(1.0, ("en", "tgt")), (0.0, ())],
}
LAMBDA, BETA = 0.8, 0.1         # left open by the paper; what others gave: docs/replication.md, question 6d
CLO_ANCHOR = 1.0                # not in the paper; what it gives and costs: question 6 there
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
SIMPO_GAMMA = 0.5               # nats a token by which simpo wants the right response ahead
# Peak learning rates at this hidden width; they scale with its inverse (muP). Tuned: lora's (docs/log.md).
REFERENCE_WIDTH, PREFERENCE_PART = 4096, 1 / 30         # without an NLL a part of them: more breaks replies
LEARNING_RATES = {"lora": 2e-4, "attention": 3e-5, "full": 1.5e-5}


# ------------------------------------------------------------------------------------------------------- loss

def margins(policy_chosen_logp: Tensor, policy_rejected_logp: Tensor, ref_chosen_logp: Tensor,
            ref_rejected_logp: Tensor) -> Tensor:
    """Eq. 1, (P,). All inputs (P,) are log-probs summed over the tokens of a continuation."""
    return (policy_chosen_logp - ref_chosen_logp) - (policy_rejected_logp - ref_rejected_logp)


def preference_losses(margin: Tensor, kind: str = "sigmoid", beta: float = BETA) -> Tensor:
    """The preference term of each pair, (P,), from its margin (P,).

    sigmoid: -log sigmoid(beta * margin), DPO's (arXiv 2305.18290, eq. 7): the paper's, and the default.
    ipo: (margin - 1 / (2 beta))^2, which pulls it to 1 / (2 beta) from both sides (arXiv 2310.12036, eq. 17).
    simpo: -log sigmoid(beta * (margin - gamma)) over the margin of *mean* log-probs without a reference,
    gamma being SIMPO_GAMMA nats a token (arXiv 2405.14734, eq. 6, whose gamma is beta times ours).
    """
    assert kind in ("sigmoid", "ipo", "simpo"), kind
    if kind == "ipo":
        return (margin - 1 / (2 * beta)) ** 2
    if kind == "simpo":
        margin = margin - SIMPO_GAMMA
    return -F.logsigmoid(beta * margin)


def clo_loss(policy_chosen_logp: Tensor, policy_rejected_logp: Tensor, ref_chosen_logp: Tensor,
             ref_rejected_logp: Tensor, tgt_logp: Tensor, tgt_tokens, pairs=None, beta: float = BETA,
             lam: float = LAMBDA, kind: str = "sigmoid") -> Tensor:
    """Eq. 4, a scalar, from sums of log-probs (for simpo: means in the first two, zeros for the reference).

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
    """How far right responses fell below the reference, nats per token: eq. 5 without its weight.

    A margin also grows when both responses fall; this term keeps the English one from it. The penalty is that
    of DPO-Positive (arXiv 2402.13228, eq. 3), added to the loss instead of to the margin. Inputs: log-probs
    summed over a response, one for each; a response that rose makes up for none that fell.
    """
    return F.relu(ref_logp - policy_logp).sum() / max(tokens, 1)


@dataclass(frozen=True)
class Objective:
    """What a stage minimises: all that the loss needs to know of the flags."""
    lam: float                      # weight of the NLL: 1 is plain fine-tuning, 0 preference alone
    nll: tuple[str, ...]            # prompts whose right responses are under the NLL: of "en" and "tgt"
    beta: float = BETA
    kind: str = "sigmoid"
    anchor: float = 0.0

    @property
    def prefers(self) -> bool:
        return self.lam < 1

    def loss(self, logp: Tensor, batch: data.Batch, step: "Counts") -> Tensor:
        """A micro-batch's part of the step's loss, from the summed log-probs (S,) of its continuations."""
        # None: lambda is 1, or a dry run times a step. The policy then stands in, and margins are 0.
        ref = logp.detach() if batch.ref_logp is None else batch.ref_logp
        scores, base = logp, ref
        if self.kind == "simpo":
            scores, base = logp / batch.length, torch.zeros_like(ref)
        loss = clo_loss(scores[batch.chosen], scores[batch.rejected],
                        base[batch.chosen], base[batch.rejected],
                        logp[batch.nll], step.nll_tokens, step.pairs, self.beta, self.lam, self.kind)
        if self.anchor and self.prefers:                                       # else there is no reference
            fallen = anchor_loss(logp[batch.english], ref[batch.english], step.english_tokens)
            loss = loss + self.anchor * fallen
        return loss


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
    step = Counts.of(batches)                                          # eq. 2, 3, 5: means over all of it
    figures = []
    for i, counted in ranks.deal(len(batches)):                        # gradient accumulation
        batch = batches[i].to(model.head.device)
        logp = llama.continuation_logps(model, batch)                  # (S,)
        loss = objective.loss(logp, batch, step)                       # eq. 4, 5
        (loss * counted).backward()         # * 0: another rank counts it, run so that all ranks do as many
        if counted:
            figures.append(batch_figures(loss.detach(), logp.detach(), batch, objective, step))
    parameters = optimizer.param_groups[0]["params"]
    ranks.sum_gradients_(parameters)                                   # a sum: the loss is already a mean
    norm = ranks.full(nn.utils.clip_grad_norm_(parameters, clip))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    losses, nll, rewards, logps = zip(*ranks.gather_tensors(figures))
    return {"loss": sum(losses), "nll": sum(nll), "grad_norm": norm,
            "rewards": torch.cat(rewards, 1), "logps": torch.cat(logps, 1)}


# ------------------------------------------------------------------------------------------------------- loop

@dataclass(frozen=True)
class Stage:
    """A stretch of training: what it minimises, how long and how fast."""
    name: str
    objective: Objective
    epochs: float
    rate: float                     # peak learning rate
    warmup: float                   # share of the steps over which the rate rises
    weight_decay: float
    clip: float                     # largest gradient norm
    seed: int
    eval_every: int                 # steps between validations; 0: once an epoch
    save_every: int                 # steps between checkpoints

    def steps(self, per_epoch: int) -> int:
        return max(1, round(self.epochs * per_epoch))


def train(model: llama.Llama, parameters: dict, stage: Stage, packed: list, validate: Callable,
          targets: list[str], directory: Path, tensorboard: bool = False) -> None:
    """Run a stage from its last checkpoint to its end over packed steps (each a list of micro-batches);
    metrics go to directory/metrics.jsonl, one line a step, validate(step) before the first and at times."""
    order = step_order(len(packed), stage.steps(len(packed)), stage.seed)
    device = model.head.device
    optimizer = make_optimizer(parameters.values(), stage.rate, stage.weight_decay, device)
    done = runs.load_checkpoint(directory / "checkpoint", parameters, optimizer)
    log = runs.MetricsLog(directory, done, tensorboard)
    bar = progress(total=len(order), initial=done, desc=f"train {stage.name}", unit="step")
    with bar, runs.StopSignal() as stop:
        if not done:
            log.write({"step": 0} | validate(0))
        else:
            bar.write(f"{stage.name}: resuming at step {done} of {len(order)}")
        for i in range(done, len(order)):
            started = time.perf_counter()
            rate = stage.rate * rate_factor(i, len(order), stage.warmup)
            optimizer.param_groups[0]["lr"] = rate
            batches = packed[order[i]]
            last = i + 1 == len(order)
            result = train_step(model, batches, stage.objective, optimizer, stage.clip)
            metrics = {"step": i + 1, "lr": rate} | heldout.step_metrics(result, batches, targets, started)
            runs.stop_unless_finite(metrics, stage.name, stage.rate)
            if i == 0 and stage.objective.prefers:
                check_first_rewards(result["rewards"])
            if last or (i + 1) % (stage.eval_every or len(packed)) == 0:
                metrics |= validate(i + 1)
            log.write(metrics)
            bar.set_postfix_str(f"loss {metrics['loss']:.3f}", refresh=False)
            bar.update()
            signalled = ranks.largest(stop.number, device)
            if signalled or last or (i + 1) % stage.save_every == 0:
                runs.save_checkpoint(directory / "checkpoint", i + 1, parameters, optimizer)
            if signalled:
                bar.close()
                sys.exit(runs.say_stopped(signalled, i + 1))


def batch_figures(loss: Tensor, logp: Tensor, batch: data.Batch, objective: Objective, step: Counts):
    """What is logged of a micro-batch: loss, NLL, and rewards and log-probs (2, P) of its pairs."""
    ref = logp if batch.ref_logp is None else batch.ref_logp
    nll = -logp[batch.nll].sum() / max(step.nll_tokens, 1)
    return loss, nll, *heldout.rewards_and_logps(batch, logp, ref, objective.beta)


def step_order(per_epoch: int, steps: int, seed: int) -> list[int]:
    """Which of the packed steps each optimiser step runs: every epoch its own permutation, the last one
    perhaps cut short. A pure function of the seed."""
    generator = torch.Generator().manual_seed(seed + 1)      # another stream than the samples' order
    order = []
    while len(order) < steps:
        order += torch.randperm(per_epoch, generator=generator).tolist()
    return order[:steps]


def rate_factor(step: int, steps: int, warmup: float) -> float:
    """Of the peak rate at 0-based `step`: linear up over warmup * steps, then down towards 0."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return (steps - step) / max(1, steps - rising)


def check_first_rewards(rewards: Tensor) -> None:
    """Before the first update policy and reference are one model, and rewards are rounding at most."""
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
    """A frozen Linear plus a trainable product of rank R, eq. 6. B starts at zero: nothing changes yet."""

    def __init__(self, base: llama.Linear, rank: int, alpha: float, generator: torch.Generator, device=None):
        nn.Module.__init__(self)                     # not Linear's: the base's weight is taken over
        self.weight, self.bias, self.scale = base.weight, base.bias, alpha / rank
        out_features, in_features = base.weight.shape
        bound = 1 / math.sqrt(in_features)           # PEFT's start: kaiming_uniform with a = sqrt(5)
        A = torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)
        wide = torch.promote_types(base.weight.dtype, torch.float32)
        device = device or base.weight.device
        self.lora_A = nn.Parameter(A.to(device, wide))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, device=device, dtype=wide))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        low = F.linear(rows, self.lora_A.to(x.dtype))
        y = super().forward(rows)
        y.addmm_(low, self.lora_B.to(x.dtype).T, alpha=self.scale)   # scaled and added in one pass
        return y.unflatten(0, x.shape[:-1])


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
            plain = llama.Linear(1, 1)
            product = lora_product(layer.lora_A.detach(), layer.lora_B.detach(), layer.scale)
            merged = add_update(layer.weight.detach(), product, name).to(layer.weight.dtype)
            plain.weight = nn.Parameter(merged, requires_grad=False)
            plain.bias = layer.bias
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

def stages_of(method: str, asked: Stage, anchor: float, baseline_epochs: float, rates=()) -> list[Stage]:
    """The stages of a method; none for the untrained base. asked: clo's own stage, as the flags describe it.
    anchor: of methods whose lambda stands in METHODS. baseline_epochs: of stages without a preference.
    rates: one a stage, the last for those that follow, too; empty: that of `asked`, for dpo a part of it."""
    stages = []
    for number, (name, (lam, nll)) in enumerate(zip(method.split("+"), METHODS.get(method, []))):
        objective = asked.objective
        if lam is not None:
            objective = replace(objective, lam=lam, nll=nll, anchor=anchor)
        epochs = asked.epochs if objective.prefers else baseline_epochs
        usual = asked.rate if objective.lam else asked.rate * PREFERENCE_PART
        rate = rates[min(number, len(rates) - 1)] if rates else usual
        stages.append(replace(asked, name=name, objective=objective, epochs=epochs, rate=rate))
    return stages


def run_method(name: str, stages: list[Stage], args, job: Job, validation: heldout.Validation) -> dict:
    """Load the base model, train it by one method (or not at all: 'base'), score it and export it. A finished
    method is read back from its result.json."""
    directory = job.run / name
    result = directory / "result.json"
    if ranks.on_first(result.exists):
        return ranks.on_first(lambda: read_back(job, result, stages, args.model, args.merge))

    def prepare(model):
        if stages:
            make_trainable(model, args.train, args.lora_rank, args.lora_alpha, args.seed, job.device)
    print(f"loading {args.base}")
    compiler = "inductor" if stages and job.device.type == "cuda" else None
    model = ranks.load(args.model, job.device, DTYPES[job.plan.dtype], args.shard, prepare, args.recompute,
                       compiler)
    parameters = trainable(model)
    started = time.perf_counter() - ranks.on_first(lambda: runs.logged_seconds(directory))
    validation.begin(reference_logps(model, validation.batches, job, "", "reference held-out"))
    for number, stage in enumerate(stages):
        history = fingerprint(name, number) if number else ""      # of the training that came before
        packed = data.make_steps(job.groups, stage.objective, job.packing, args.seed)
        if stage.objective.prefers:
            batches = [batch for step in packed for batch in step]
            sums = reference_logps(model, batches, job, history, f"reference {name}")
            for batch, logp in zip(batches, sums):
                batch.ref_logp = logp
        before = validation.base
        if number:
            before = reference_logps(model, validation.batches, job, history, "reference held-out")
        train(model, parameters, stage, packed, validation.of_stage(model, stage.name, before), args.targets,
              directory if len(stages) == 1 else directory / f"{number + 1}-{stage.name}", args.tensorboard)
    seconds = time.perf_counter() - started if stages else 0.0
    asked = job.answered[:args.answers]
    languages = (args.source, *args.targets)
    nats = expected_nll(model, job.tokenizer, asked, languages, job.packing, args.system_prompt)
    scores = answer_and_score(model, job.tokenizer, job.answered, languages, job.classifier,
                              args.max_new_tokens, args.system_prompt, directory / "answers.jsonl",
                              args.answers, nats)
    scores["heldout"] = validation.score(model)
    scores["train_seconds"] = round(seconds, 2)
    if stages:
        lora = (ATTENTION, args.lora_rank, args.lora_alpha) if args.train == "lora" else None
        export(model, parameters, directory, args.model, args.base, job.tokenizer, job.prompt, lora,
               args.merge, args.shard)
    ranks.on_first(lambda: write_json(result, scores))
    return scores


# ------------------------------------------------------------------------------------------------------- main

def main(argv=None) -> None:
    args = parse_args(argv)
    began = time.perf_counter()
    device = ranks.start(ranks.pick_device(args.device))
    if device.type == "cuda":
        ranks.fix_order_of_sums()
    args.base = args.model                                             # as it was named: the adapter says it
    args.model = str(hub.model_directory(args.model, weights=() if args.dry_run else hub.WEIGHTS))
    config = read_config(args.model)
    anchor = CLO_ANCHOR if args.anchor is None else args.anchor
    objective = Objective(args.lam, tuple(args.nll.split(",")), args.beta, args.preference, anchor)
    rate = LEARNING_RATES[args.train] * REFERENCE_WIDTH / config.hidden_size
    asked = Stage("clo", objective, args.epochs, rate, args.warmup, args.weight_decay, args.clip, args.seed,
                  args.eval_every, args.save_every)
    rates, baseline_epochs = flags.numbers(args.lr), args.baseline_epochs or args.epochs
    methods = {}
    for name in ("base", args.baseline, args.method):
        if name != "none":
            methods[name] = stages_of(name, asked, args.anchor or 0.0, baseline_epochs, rates)
    plan = plan_of(args, config, device)
    if args.dry_run:
        dry_run(args, device, config, plan, methods)
        return
    with scale.memory_advice(device.type), contextlib.ExitStack() as lock:
        ranks.on_first(lambda: lock.enter_context(locked(args.out)))
        job = make_job(args, device, plan, methods)
        # What a preference and an NLL in all languages read: every pair, and every right response.
        everything = data.make_steps(job.heldout, Objective(0.0, ("en", "tgt")), job.packing, None)
        validation = heldout.Validation(sum(everything, []), job.heldout, job.tokenizer, args.max_new_tokens,
                                        args.beta, args.targets)
        scores, answers = {}, {}
        for number, (name, stages) in enumerate(methods.items(), 3):
            print(f"\n{number}. {'Train ' + name if stages else 'Base model'}")
            scores[name] = run_method(name, stages, args, job, validation)
            answers[name] = read_answers(job.run / name / "answers.jsonl", scores[name])
        report = {"lang": args.lang, "rows": job.rows, "samples": len(job.groups), "seed": args.seed,
                  "methods": scores}
        text = report_text(report, answers, args.source)
        ranks.on_first(lambda: (write_json(job.run / "report.json", report),
                                write_text(job.run / "report.md", text)))
    print("\n" + text)
    print("\n".join([*closing_lines(answers), *ending_lines(args, job, time.perf_counter() - began)]))
    ranks.stop()


def dry_run(args, device, config, plan: scale.Plan, methods: dict[str, list[Stage]]) -> None:
    """Say what the run would train, need and take, show two samples with the loss mask, and write nothing.
    Without --lang the estimate alone, from config.json; with --gpus for other devices than this machine's."""
    print(f"{args.base}: {config.model_type}, {config.num_hidden_layers} layers, width {config.hidden_size}")
    elsewhere = args.gpus is not None
    print(scale.describe(config, plan, scale.DEVICE_BYTES if elsewhere else scale.device_bytes(device)))
    if args.lang is None:
        return
    job = make_job(args, device, plan, methods)

    def begin(stage, model):
        """The function that trains the model by one step on batches: the run's own code."""
        parameters = make_trainable(model, args.train, args.lora_rank, args.lora_alpha, 0, device)
        optimizer = make_optimizer(parameters.values(), 1e-3, 0.0, device)
        return lambda batches: train_step(model, batches, stage.objective, optimizer, stage.clip)
    total = 0.0
    per_epoch = math.ceil(job.rows / args.batch_size)
    for name, stages in methods.items():
        for stage in stages:
            packed = data.make_steps(job.groups, stage.objective, job.packing, args.seed)
            steps = stage.steps(per_epoch)
            passes = per_epoch * stage.objective.prefers
            tokens = job.rows / per_epoch * data.mean_tokens(packed, len(job.groups))
            took = scale.step_seconds(config, job.plan, tokens)
            if packed and not elsewhere:               # else a guess on paper: no row looked at has a pair
                took = scale.measured_seconds(config, job.plan, packed, tokens, device, partial(begin, stage))
            seconds = steps * took["step"] + passes * took["reference"]
            total += seconds
            reference = ", a reference pass" if passes else ""
            print(f"{name}, stage {stage.name}: {job.rows:,} rows, {steps:,} steps of about {tokens:,.0f} "
                  f"tokens and {took['step']:.3g} s{reference}: about {seconds / 60:.1f} min")
    print(f"in all about {total / 60:.1f} min; translation, validation and answers come on top")
    for fork in sum(job.groups[:2], []):
        print("\n" + data.fork_text(fork, job.tokenizer))


# ----------------------------------------------------------------------------------------------- command line

def parse_args(argv=None) -> argparse.Namespace:
    parser = flags.Parser(
        prog="clo.py", usage="python clo.py --lang LANG [options]",
        description="Teach an English-centric model another language, beside a baseline.",
        epilog="Example: python clo.py --lang sw --model Llama-3.2-1B --data alpaca.json "
               "--translator m2m100_1.2B. The same command goes on where a killed run stopped.")
    add_flags(parser)
    args = parser.parse_args(argv)
    args.lam = vars(args).pop("lambda")        # args.lambda would be no Python
    runs_now = not args.dry_run
    if runs_now and args.lang is None:
        parser.error("--lang is needed: the target language, as in --lang sw")
    if runs_now and args.shard and "RANK" not in os.environ:
        parser.error("--shard needs several processes: torchrun --nproc-per-node N clo.py ... starts them")
    if runs_now and args.gpus is not None:
        parser.error(f"--gpus {args.gpus}: only --dry-run takes it; torchrun starts a run on several")
    stages = max(len(METHODS.get(name, [])) for name in (args.method, args.baseline))
    if len(flags.numbers(args.lr)) > stages:
        parser.error(f"--lr {args.lr}: one rate, or one for each stage, was expected; the most is {stages}")
    args.targets = [] if args.lang is None else language_list(args.lang)
    args.lang = None if args.lang is None else ",".join(args.targets)
    if len({args.source, *args.targets}) < 1 + len(args.targets):      # a language twice
        parser.error(f"--lang {args.lang}: different languages joined by commas were expected, "
                     f"{args.source} not among them")
    args.out = str(args.out or f"runs/{args.lang}")
    return args


def add_flags(parser) -> None:
    add = flags.group(parser, "main")
    add("--lang", str, None, "target language, or several for one adapter: sw,yo,ko")
    add("--model", str, "demo/llama", "base model: a Hugging Face directory, or a hub id (owner/name)")
    add("--data", str, "demo/english.jsonl", "training rows, in any format data.py reads, or oasst1")
    add("--eval-data", str, None, "questions in all languages; else eval.jsonl beside --data, or rows of it")
    add("--translator", str, "demo/m2m100", "M2M100 or NLLB, directory or hub id, for rows without a target")
    add("--out", flags.directory, None, "run directory; without it runs/LANG")
    add("--dry-run", bool, False, "tell memory and time, show samples; without --lang from config.json alone")
    add("--gpus", flags.positive_int, None, "with --dry-run: so many H200 instead of this machine")
    add("--fresh", bool, False, "start over; the run that is there is renamed aside")
    add = flags.group(parser, "method")
    add("--method", list(METHODS), "clo", "what to train")
    add("--baseline", [*METHODS, "none"], "sft", "trained too, for the comparison")
    add("--lambda", flags.fraction, LAMBDA, "weight of the NLL, 0 to 1")
    add("--nll", ["tgt", "en,tgt"], "tgt", "responses under clo's NLL; en,tgt is the paper's ablation")
    add("--preference", ["sigmoid", "ipo", "simpo"], "sigmoid", "its form; simpo wants --beta 2 or more")
    add("--beta", flags.positive, BETA, "strength of the preference term")
    add("--anchor", flags.not_negative, None, "penalty on English answers below the base's; else 1 for clo")
    add("--train", list(LEARNING_RATES), "lora", "LoRA on attention, attention itself, or everything")
    add("--lora-rank", flags.positive_int, 16, "rank R")
    add("--lora-alpha", flags.positive, 32.0, "scale: the product counts alpha / R")
    add = flags.group(parser, "data")
    add("--source", normal, "en", "language the model knows")
    add("--samples", flags.positive_int, None, "train on so many rows, drawn by --seed; without it on all")
    add("--holdout", flags.positive_int, 100, "rows for validation; of --data a fifth at most")
    add("--turns", ["first", "all"], "first", "of conversations: the first exchange, or each one")
    add("--system-prompt", str, None, "put before every question, in the checkpoint's chat template")
    add("--template-args", str, None, "variables of the chat template: '{\"enable_thinking\": false}'")
    add("--beams", flags.positive_int, 5, "beam width of the translation")
    add("--keep-failed", bool, False, "train on rows of which a translated segment failed its checks, too")
    add("--row-tokens", flags.positive_int, 1024, "tokens of a packed row; longer responses are cut")
    add = flags.group(parser, "optimisation")
    rates = ", ".join(f"{mode} {rate:g}" for mode, rate in LEARNING_RATES.items()) + ", dpo a 30th"
    add("--lr", flags.positives, None, f"peak rate, or one a stage: 3e-3,1e-4; else {rates}, x 4096 / width")
    add("--epochs", flags.positive, 2.0, "passes over the rows; 0.5 is half of one")
    add("--baseline-epochs", flags.positive, None, "of stages without a preference; else --epochs")
    add("--batch-size", flags.positive_int, 8, "rows (samples) per optimiser step")
    add("--micro-rows", flags.positive_int, None, "most packed rows a pass; else what is fast and fits")
    add("--warmup", flags.fraction, 0.1, "part of the steps over which the rate rises; then it falls to 0")
    add("--weight-decay", flags.not_negative, 0.0, "AdamW's decoupled decay of the trainable weights")
    add("--clip", flags.positive, 1.0, "largest gradient norm")
    add("--seed", flags.seed, 0, "of row choice, order and LoRA's start")
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
    add("--dtype", ["auto", *DTYPES], "auto", "compute type; auto: bf16 on CUDA, on a CPU what is faster")
    add("--shard", bool, False, "spread the model over the processes torchrun starts, each holding a part")
    add("--recompute", bool, False, "activation checkpointing: less memory, a fifth to two fifths more time")


if __name__ == "__main__":
    ranks.run(main)
