"""Cross-Lingual Optimization: move an English-centric Llama-style model into another language and keep its English.

    python clo.py --lang sw

English rows are translated, and every row gives two *forks*: the English question with the English response (chosen)
and the translated one (rejected), and the translated question the other way round. With y_w the chosen, y_l the rejected
response to x, log-probs summed over response tokens, and ref the model before training:

    margin = [log pi(y_w|x) - log ref(y_w|x)] - [log pi(y_l|x) - log ref(y_l|x)]                             (eq. 1)
    L_CL   = mean over pairs of both directions of  -log sigmoid(beta * margin)                              (eq. 2)
    L_SFT  = -(sum of log pi(y_t|x_t)) / (number of tokens), target language only                            (eq. 3)
    L_CLO  = lambda * L_SFT + (1 - lambda) * L_CL                                                            (eq. 4)

Means are over an optimiser step: all micro-batches share the step's pair and token counts, so how a step is cut into
micro-batches changes nothing. Only attention is trained: as LoRA by default, W' = W + (alpha / R) B A      (eq. 5)

References: CLO (ACL 2025, arXiv 2505.14297), DPO (arXiv 2305.18290), LoRA (arXiv 2106.09685).
"""

import argparse
import json
import math
import resource
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import data
import eval as evaluation
import hub
import kernels
import model as llama
import ranks
import runs
import translate

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
REFERENCE_WIDTH = 4096          # the learning rates below are for this hidden width and scale with its inverse (muP)
SIMPO_GAMMA = 0.5               # nats a token by which simpo wants the right response ahead
LEARNING_RATES = {"lora": 1e-4, "attention": 3e-5, "full": 1.5e-5}


@dataclass(frozen=True)
class Stage:
    """One training stage: which languages' responses the NLL term covers, and whether there is a preference term."""
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


# ------------------------------------------------------------------------------------------------------------- LoRA

class LoraLinear(llama.Linear):
    """A frozen Linear plus a trainable product of rank R, eq. 5. B starts at zero: at first nothing changes."""

    def __init__(self, base: llama.Linear, rank: int, alpha: float, generator: torch.Generator):
        nn.Module.__init__(self)
        self.weight, self.bias, self.scale = base.weight, base.bias, alpha / rank
        out_features, in_features = base.weight.shape
        bound = 1 / math.sqrt(in_features)                           # PEFT's start: kaiming_uniform with a = sqrt(5)
        A = torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)
        wide = torch.promote_types(base.weight.dtype, torch.float32)
        self.lora_A = nn.Parameter(A.to(base.weight.device, wide))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, device=base.weight.device, dtype=wide))

    def forward(self, x: Tensor) -> Tensor:
        product = F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
        return super().forward(x) + self.scale * product


def add_lora(model: llama.Llama, rank: int = 16, alpha: float = 32, seed: int = 0) -> llama.Llama:
    """Freeze the model and put a LoRA product beside every attention projection. The model is changed and returned."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for block in model.model["layers"]:
        for name in ATTENTION:
            setattr(block.self_attn, name, LoraLinear(getattr(block.self_attn, name), rank, alpha, generator))
    return model


def merge_lora(model: llama.Llama) -> llama.Llama:
    """Fold every LoRA product into its weight (in at least fp32) and drop the factors."""
    for block in model.model["layers"]:
        for name in ATTENTION:
            layer = getattr(block.self_attn, name)
            if isinstance(layer, LoraLinear):
                plain = llama.Linear(1, 1)
                product = llama.lora_product(layer.lora_A.detach(), layer.lora_B.detach(), layer.scale)
                merged = llama.add_update(layer.weight.detach(), product, name).to(layer.weight.dtype)
                plain.weight, plain.bias = nn.Parameter(merged, requires_grad=False), layer.bias
                setattr(block.self_attn, name, plain)
    return model


def make_trainable(model: llama.Llama, train: str, rank: int, alpha: float, seed: int) -> dict[str, nn.Parameter]:
    """Choose what learns: 'lora' on attention, the 'attention' projections themselves, or the 'full' model.

    Returns {name: parameter}; those are fp32 (fp64 stays), everything else is frozen in the model's dtype.
    """
    model.compute_dtype = model.head.dtype
    if train == "lora":
        add_lora(model, rank, alpha, seed)
    for name, parameter in model.named_parameters():
        projection = ".self_attn." in name and name.split(".")[-2] in ATTENTION
        wanted = {"lora": ".lora_" in name, "attention": projection, "full": True}[train]
        parameter.requires_grad_(wanted)
        if wanted:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


# -------------------------------------------------------------------------------------------------------------- loss

def margins(policy_chosen_logp: Tensor, policy_rejected_logp: Tensor, ref_chosen_logp: Tensor,
            ref_rejected_logp: Tensor) -> Tensor:
    """Eq. 1, (P,). All inputs (P,) are log-probs summed over the tokens of a continuation."""
    return (policy_chosen_logp - ref_chosen_logp) - (policy_rejected_logp - ref_rejected_logp)


def preference_losses(margin: Tensor, kind: str = "sigmoid", beta: float = 0.1) -> Tensor:
    """The preference term of each pair, (P,), from its margin (P,).

    sigmoid: -log sigmoid(beta * margin), DPO's (arXiv 2305.18290, eq. 7); the default and the paper's.            eq. 2
    ipo: (margin - 1 / (2 beta))^2, which stops pulling once the margin is there (arXiv 2310.12036, eq. 17).
    simpo: -log sigmoid(beta * (margin - gamma)) over the margin of *mean* log-probs without a reference, gamma being
    SIMPO_GAMMA nats a token (arXiv 2405.14734, eq. 6, whose gamma is beta times ours). Its beta is larger: 2 to 10.
    """
    if kind == "ipo":
        return (margin - 1 / (2 * beta)) ** 2
    return -F.logsigmoid(beta * (margin - SIMPO_GAMMA if kind == "simpo" else margin))


def clo_loss(policy_chosen_logp: Tensor, policy_rejected_logp: Tensor, ref_chosen_logp: Tensor,
             ref_rejected_logp: Tensor, tgt_logp: Tensor, tgt_tokens, pairs=None, beta: float = 0.1,
             lam: float = 0.5, kind: str = "sigmoid") -> Tensor:
    """Eq. 4, a scalar, from sums of log-probs (for simpo: means in the first two and zeros for the reference).

    The four (P,) tensors are the pairs of both directions. tgt_logp (any shape) holds the summed log-probs of the
    responses under NLL and tgt_tokens the tokens they count. For a part of a step pass the whole step's tgt_tokens and
    pairs: the parts' losses then add up to the step's.
    """
    pairs = policy_chosen_logp.numel() if pairs is None else pairs
    margin = margins(policy_chosen_logp, policy_rejected_logp, ref_chosen_logp, ref_rejected_logp)
    preference = preference_losses(margin, kind, beta).sum() / max(pairs, 1)                               # eq. 2
    nll = -tgt_logp.sum() / max(tgt_tokens, 1)                                                             # eq. 3
    return lam * nll + (1 - lam) * preference


def anchor_loss(policy_logp: Tensor, ref_logp: Tensor, tokens) -> Tensor:
    """How far right responses fell below the reference, in nats per token: sum of max(0, ref - policy) / tokens.

    A margin also grows when both responses fall; this term keeps the English one from it. The penalty is that of
    DPO-Positive (arXiv 2402.13228, eq. 3), added to the loss instead of to the margin. Inputs (S',) are summed log-probs.
    """
    return F.relu(ref_logp - policy_logp).sum() / max(tokens, 1)


# ------------------------------------------------------------------------------------------------- steps of training

@dataclass
class Micro:
    """One micro-batch: packed rows, and which of its S continuations form pairs and enter the NLL."""
    batch: data.Batch
    sequences: int                   # S
    chosen: Tensor                   # (P,) index of the chosen continuation of each pair
    rejected: Tensor                 # (P,)
    pair_tgt: Tensor                 # (P,) bool: the prompt is in the target language
    right: Tensor                    # (S',) index of each fork's right (chosen) continuation
    right_tgt: Tensor                # (S',) bool
    right_tokens: Tensor             # (S',) its length in tokens
    lengths: Tensor                  # (S,) length of every continuation in tokens
    nll: Tensor                      # index of the continuations under NLL
    nll_tokens: int

    def to(self, device) -> "Micro":
        moved = {name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
                 for name, value in vars(self).items() if name != "batch"}
        return Micro(batch=self.batch.to(device), **moved)


def make_micro(batch: data.Batch, source: str, nll: tuple[str, ...]) -> Micro:
    lengths, chosen, rejected, pair_tgt, right, right_tgt, covered = [], [], [], [], [], [], []
    for fork in batch.forks:
        first, tgt = len(lengths), fork.language != source
        lengths += map(len, fork.continuations)
        right.append(first)
        right_tgt.append(tgt)
        if ("tgt" if tgt else "en") in nll:
            covered.append(first)
        for other in range(first + 1, len(lengths)):
            chosen.append(first)
            rejected.append(other)
            pair_tgt.append(tgt)
    chosen, rejected, right, lengths, covered = (torch.tensor(x, dtype=torch.int64)
                                                 for x in (chosen, rejected, right, lengths, covered))
    return Micro(batch, len(lengths), chosen, rejected, torch.tensor(pair_tgt, dtype=torch.bool), right,
                 torch.tensor(right_tgt, dtype=torch.bool), lengths[right], lengths, covered, int(lengths[covered].sum()))


def stage_forks(group: list[data.Fork], stage: Stage, source: str) -> list[data.Fork]:
    """What a stage reads of one sample's forks: the right continuation and, for a preference, the wrong ones that differ
    from it. A fork that then serves neither term is left out."""
    forks = []
    for fork in group:
        right, others = fork.continuations[0], fork.continuations[1:] if stage.preference else []
        wrong = [ids for ids in others if ids != right]
        if wrong or ("en" if fork.language == source else "tgt") in stage.nll:
            forks.append(data.Fork(fork.prompt, [right, *wrong], fork.language, fork.row))
    return forks


def make_steps(groups: list[list[data.Fork]], stage: Stage, args, seed: int | None) -> list[list[Micro]]:
    """Optimiser steps of args.batch_size samples, each a list of micro-batches. Packed once: reference and training see
    the same rows (a GEMM row's bits depend on the row count). On CUDA rows keep one length, since its attention is compiled
    for a shape; elsewhere they are trimmed. seed None keeps the order."""
    trim = not args.device.startswith("cuda")
    order = list(range(len(groups)))
    if seed is not None:
        order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    steps = []
    for first in range(0, len(order), args.batch_size):
        forks = [fork for i in order[first:first + args.batch_size] for fork in stage_forks(groups[i], stage, args.source)]
        if forks:
            steps.append([make_micro(batch, args.source, stage.nll)
                          for batch in data.micro_batches(forks, args.row_tokens, args.micro_rows, trim)])
    return steps


def step_order(steps: int, epochs: int, seed: int) -> list[int]:
    """Which packed step each optimiser step runs: every epoch its own permutation, a pure function of the seed."""
    generator = torch.Generator().manual_seed(seed + 1)
    return [i for _ in range(epochs) for i in torch.randperm(steps, generator=generator).tolist()]


def continuation_logps(model: llama.Llama, micro: Micro) -> Tensor:
    """Log-prob of each of the micro-batch's S continuations, summed over its tokens, (S,)."""
    batch = micro.batch
    hidden = model(batch.tokens, batch.positions, batch.fork, batch.branch)                              # (B, T, H)
    predicted = hidden.reshape(-1, hidden.shape[-1]).index_select(0, batch.row_index)                    # (N, H)
    token_logp = kernels.token_logp(predicted, model.head.to(predicted.dtype), batch.targets)
    return token_logp.new_zeros(micro.sequences).index_add(0, batch.sequence, token_logp)


@torch.no_grad()
def reference_logps(model: llama.Llama, steps: list[list[Micro]], device, label: str | None = None) -> list[Tensor]:
    """continuation_logps of every micro-batch in order, on the CPU; the code path of training, without its gradient."""
    micros = ranks.mine([micro for step in steps for micro in step])
    bar = tqdm(micros, desc=label, unit="batch", disable=label is None or ranks.rank() > 0)
    return ranks.collect([continuation_logps(model, micro.to(device)).cpu() for micro in bar])


# -------------------------------------------------------------------------------------------------------- validation

def score_heldout(model: llama.Llama, steps: list[list[Micro]], reference: list[Tensor], beta: float, device) -> dict:
    """Held-out metrics, TRL's names split by direction: rewards, margins, accuracies, summed log-probs, and the NLL per
    token of the right response in each language (watch nll_en: a preference loss alone lets it rise)."""
    rewards, logps, pair_tgt, nll = [], [], [], {"en": [0.0, 0], "tgt": [0.0, 0]}
    for micro, ref, policy in zip([micro for step in steps for micro in step], reference, reference_logps(model, steps, device)):
        pair = torch.stack((micro.chosen, micro.rejected))
        logps.append(policy[pair])
        rewards.append(beta * (policy - ref)[pair])
        pair_tgt.append(micro.pair_tgt)
        for direction, mask in (("en", ~micro.right_tgt), ("tgt", micro.right_tgt)):
            nll[direction][0] -= policy[micro.right[mask]].sum().item()
            nll[direction][1] += micro.right_tokens[mask].sum().item()
    rewards, logps, pair_tgt = torch.cat(rewards, 1), torch.cat(logps, 1), torch.cat(pair_tgt)
    metrics = pair_metrics(rewards, logps, pair_tgt)
    return metrics | {f"nll_{d}": total / tokens for d, (total, tokens) in nll.items() if tokens}


def pair_metrics(rewards: Tensor, logps: Tensor, pair_tgt: Tensor) -> dict:
    """Means over the pairs of each direction; rewards and logps are (2, P): chosen, rejected."""
    metrics = {}
    for direction, mask in (("en", ~pair_tgt), ("tgt", pair_tgt)):
        if mask.any():
            chosen, rejected = rewards[:, mask]
            metrics |= {f"rewards/chosen_{direction}": chosen.mean().item(),
                        f"rewards/rejected_{direction}": rejected.mean().item(),
                        f"rewards/margins_{direction}": (chosen - rejected).mean().item(),
                        f"rewards/accuracies_{direction}": (chosen > rejected).double().mean().item(),
                        f"logps/chosen_{direction}": logps[0, mask].mean().item(),
                        f"logps/rejected_{direction}": logps[1, mask].mean().item()}
    return metrics


# ---------------------------------------------------------------------------------------------------------- training

def learning_rate(step: int, steps: int, warmup: float) -> float:
    """Factor on the peak rate at 0-based `step`: linear up over warmup * steps, then linear down towards 0."""
    rising = max(1, round(warmup * steps))
    return (step + 1) / rising if step < rising else (steps - step) / max(1, steps - rising)


def backward_step(model, step: list[Micro], reference: list[Tensor] | None, stage: Stage, args, device) -> dict:
    """Accumulate the gradient of one optimiser step, over its micro-batches and all ranks; its loss and pair statistics as
    tensors. Nothing waits for the device here, unless there are several ranks."""
    lam = {(True, True): args.lam, (False, True): 1.0, (True, False): 0.0}[stage.preference, bool(stage.nll)]
    pairs, tokens = sum(len(micro.chosen) for micro in step), sum(micro.nll_tokens for micro in step)
    en_tokens = sum(int(micro.right_tokens[~micro.right_tgt].sum()) for micro in step)
    parts = []                                                       # of each micro-batch: loss, nll, rewards, logps
    for i in ranks.mine(range(len(step))):
        micro = step[i].to(device)
        policy = continuation_logps(model, micro)
        ref = policy.detach() if reference is None else reference[i].to(device)
        scores, base = (policy / micro.lengths, torch.zeros_like(ref)) if args.preference == "simpo" else (policy, ref)
        loss = clo_loss(scores[micro.chosen], scores[micro.rejected], base[micro.chosen], base[micro.rejected],
                        policy[micro.nll], tokens, pairs, args.beta, lam, args.preference)
        if args.anchor and stage.preference:
            english = micro.right[~micro.right_tgt]
            loss = loss + args.anchor * anchor_loss(policy[english], ref[english], en_tokens)
        loss.backward()
        policy, pair = policy.detach(), torch.stack((micro.chosen, micro.rejected))
        parts.append((loss.detach(), -policy[micro.nll].sum() / max(tokens, 1), args.beta * (policy - ref)[pair], policy[pair]))
    ranks.sum_gradients_(parameter for parameter in model.parameters() if parameter.requires_grad)
    if ranks.size() > 1:
        parts = ranks.collect([tuple(value.cpu() for value in part) for part in parts])
    losses, nll, rewards, logps = zip(*parts)
    return {"loss": sum(losses), "nll": sum(nll), "rewards": torch.cat(rewards, 1), "logps": torch.cat(logps, 1)}


class Interrupt:
    """SIGINT and SIGTERM ask for a stop after the running step, which is saved; then the exit code is 128 + signal."""

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


def train(model: llama.Llama, parameters: dict, stage: Stage, steps: list[list[Micro]], reference: list[list[Tensor]] | None,
          epochs: int, validate, args, device, directory: Path) -> None:
    """Run a stage from its last checkpoint to its end; metrics go to directory/metrics.jsonl, one line a step."""
    order = step_order(len(steps), epochs, args.seed)
    rate = args.lr or LEARNING_RATES[args.train] * REFERENCE_WIDTH / model.config.hidden_size
    optimizer = torch.optim.AdamW(parameters.values(), lr=rate, betas=(0.9, 0.999), weight_decay=args.weight_decay,
                                  fused=device.type == "cuda")
    done = runs.load_checkpoint(directory / "checkpoint", parameters, optimizer)
    ranks.on_first(lambda: runs.truncate_metrics(directory / "metrics.jsonl", done if done else -1))
    if done:
        print(f"{stage.name}: resuming after step {done} of {len(order)}")
    with runs.open_metrics(directory, ranks.rank() == 0) as log, Interrupt() as interrupt, \
            tqdm(total=len(order), initial=done, desc=f"train {stage.name}", unit="step", disable=ranks.rank() > 0) as bar:
        if not done:
            runs.write_metrics(log, {"step": 0} | validate())
        for i in range(done, len(order)):
            started = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = rate * learning_rate(i, len(order), args.warmup)
            step = steps[order[i]]
            result = backward_step(model, step, reference and reference[order[i]], stage, args, device)
            if i == 0 and reference is not None:
                check_first_rewards(result["rewards"])
            norm = nn.utils.clip_grad_norm_(parameters.values(), args.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            metrics = step_metrics(i + 1, result, norm, group["lr"], step, time.perf_counter() - started)
            stop_unless_finite(metrics, stage.name, rate)
            last = i + 1 == len(order)
            if last or (i + 1) % (args.eval_every or len(steps)) == 0:
                metrics |= validate()
            runs.write_metrics(log, metrics)
            bar.set_postfix_str(f"loss {metrics['loss']:.3f}")
            bar.update()
            signalled = ranks.largest(interrupt.signal, device)
            if signalled or last or (i + 1) % args.save_every == 0:
                ranks.on_first(lambda: runs.save_checkpoint(directory / "checkpoint", i + 1, parameters, optimizer))
            if signalled:
                bar.close()
                print(f"stopped by signal {signalled} after step {i + 1}, saved; the same command goes on from there")
                sys.exit(128 + signalled)


def stop_unless_finite(metrics: dict, name: str, rate: float) -> None:
    if not math.isfinite(metrics["loss"]) or not math.isfinite(metrics["grad_norm"]):
        raise data.DataError(f"{name}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']} at step {metrics['step']}: "
                             f"stopped, the last checkpoint is kept; try a lower --lr than {rate:.2g}")


def check_first_rewards(rewards: Tensor) -> None:
    """Before the first update policy and reference are one model: any reward is an error in one of the two paths."""
    worst = rewards.abs().max().item()
    if not worst < 1e-2:
        raise data.DataError(f"rewards before the first update reach {worst:.3g} and should be 0: the reference log-probs "
                             f"do not belong to this model; start over with --fresh")
    print("rewards before the first update: " + (f"at most {worst:.1g} (rounding)" if worst else "0, as they should be"))


def step_metrics(step: int, result: dict, norm: Tensor, rate: float, micros: list[Micro], seconds: float) -> dict:
    """One line of metrics.jsonl. The only place of a step that waits for the device."""
    pair_tgt = torch.cat([micro.pair_tgt for micro in micros])
    metrics = {"step": step, "loss": result["loss"].item(), "nll": result["nll"].item(), "grad_norm": norm.item(), "lr": rate}
    metrics |= pair_metrics(result["rewards"].cpu(), result["logps"].cpu(), pair_tgt)
    tokens = sum(int((micro.batch.fork >= 0).sum()) for micro in micros)
    return metrics | {"tokens": tokens, "tokens_per_second": tokens / seconds, "seconds": seconds,
                      "peak_memory_gb": peak_memory_gb()}


def peak_memory_gb() -> float:
    """Most memory this process ever held: on the GPU when there is one, else resident (GB = 1e9 bytes)."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024                    # ru_maxrss: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


# ------------------------------------------------------------------------------------------------------------ stages

def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if torch.backends.mps.is_available():
            print("device: an Apple GPU is there, but MPS has not passed the tests; using the CPU (--device mps tries it)")
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise data.DataError(f"--device {name} cannot be used ({str(error).splitlines()[0]}): try --device auto") from None
    return torch.device(name)


def read_inputs(args) -> tuple[list[dict], list[dict], list[dict], int]:
    """Training rows (some perhaps without the target language yet), held-out rows, rows to answer at the end, and how many
    of the training rows are to be set apart as held-out ones: none when --eval-data has a validation split."""
    rows = usable_rows(read_counted(args.data, args), args)
    evaluated = data.require_languages(read_counted(args.eval_data, args), args.source, args.lang) if args.eval_data else []
    heldout = [row for row in evaluated if row.get("split") == "validation"][:args.holdout]
    answered = [row for row in evaluated if row.get("split", args.eval_split) == args.eval_split]
    if evaluated and not answered:
        raise data.DataError(f"{args.eval_data} has no row of split {args.eval_split!r}: see --eval-split")
    apart = 0 if heldout else min(args.holdout, len(rows) // 5)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(args.seed)).tolist()
    rows = [rows[i] for i in order[:apart + (args.samples or len(rows))]]
    if args.samples and len(rows) < apart + args.samples:
        print(f"{args.data} has {len(rows) - apart} rows to train on, fewer than --samples {args.samples}: all are used")
    return rows, heldout, answered, apart


def read_counted(path: str, args) -> list[dict]:
    counts = Counter()
    rows = data.read_rows(path, args.source, args.turns, counts)
    print(f"{path}: {data.describe(counts)}")
    return rows


def usable_rows(rows: list[dict], args) -> list[dict]:
    """Rows with both languages if any has the target; else rows with the source, to be translated."""
    both = [row for row in rows if args.source in row and args.lang in row]
    if both:
        if len(both) < len(rows):
            print(f"{len(rows) - len(both)} rows without {args.source} or {args.lang} are left out")
        return both
    return data.require_languages(rows, args.source)


def load_translator(rows: list[dict], args, device):
    """The translator, or None when no row needs it; DataError when it does not know the language either."""
    if all(args.lang in row for row in rows):
        return None
    translator = translate.load(args.translator, device)
    if args.lang not in translator.languages:
        held = sorted({language for row in rows for language in data.languages(row)})
        raise data.DataError(f"--lang {args.lang}: {args.data} holds {', '.join(held)} and the translator {args.translator} "
                             f"knows {', '.join(translator.languages)}")
    return translator


def prepare_rows(args, inputs: dict, device) -> tuple[list[dict], list[dict], list[dict]]:
    """Rows to train on, to hold out and to answer, all with both languages. The run directory is claimed once all input has
    been read, and before anything is translated into it."""
    rows, heldout, answered, apart = read_inputs(args)
    translator = load_translator(rows, args, device)
    flags = {key: value for key, value in vars(args).items() if key not in ("fresh", "out")}
    inputs = inputs | {"data": runs.fingerprint(hub.data_file(args.data)),
                       "eval_data": args.eval_data and runs.fingerprint(Path(args.eval_data))}
    run = runs.open_run(args.out, flags, inputs, args.fresh)
    if translator is not None:
        rows = translate.translate_rows(rows, translator, args.source, args.lang, run / f"translated-{args.lang}.jsonl",
                                        args.beams, keep_failed=args.keep_failed)
    heldout, rows = heldout or rows[:apart], rows[apart:]
    if not rows or not heldout:
        raise data.DataError(f"{args.data}: {len(rows)} rows are left to train on and {len(heldout)} to hold out, one of each "
                             f"is needed: give more rows, or --keep-failed if the translation checks dropped them")
    return rows, heldout, answered or heldout


def reference_of(model, steps, run: Path, args, device, history: str, label: str) -> list[Tensor]:
    """Cached reference log-probs of these steps under the model as it is now. `history` names its training so far."""
    micros = [micro for step in steps for micro in step]
    content = [[fork.prompt, fork.continuations] for micro in micros for fork in micro.batch.forks]
    shapes = [list(micro.batch.tokens.shape) for micro in micros]
    key = runs.fingerprint(runs.model_fingerprint(args.model), history, content, shapes, args.train, args.dtype,
                           device.type, torch.__version__, torch.get_num_threads())
    sizes = [micro.sequences for micro in micros]
    sums = ranks.on_first(lambda: runs.load_reference(run, key, sizes))
    if sums is None:
        sums = reference_logps(model, steps, device, label)
        ranks.on_first(lambda: runs.save_reference(run, key, sums))
    return sums


def group_by_step(flat: list[Tensor], steps: list[list[Micro]]) -> list[list[Tensor]]:
    values = iter(flat)
    return [[next(values) for _ in step] for step in steps]


def run_method(name: str, groups, heldout, tokenizer, args, run: Path, device, finish) -> dict:
    """Load the base model, train it by one method (or not at all: 'base'), export it and score it. A finished method is
    read back from its result.json. `finish(model)` scores the model's answers."""
    directory = run / name
    result = directory / "result.json"
    if ranks.on_first(result.exists):
        print(f"{name}: done before, read from {result}")
        return json.loads(result.read_text(encoding="utf-8"))
    model = llama.load(args.model, device, DTYPES[args.dtype])
    started, seconds = time.perf_counter(), 0.0
    pairs = make_steps(heldout, METHODS["clo"][0], args, None)
    stages = METHODS.get(name, ())
    parameters = make_trainable(model, args.train, args.lora_rank, args.lora_alpha, args.seed) if stages else {}
    epochs = args.epochs if any(stage.preference for stage in stages) else args.baseline_epochs or args.epochs
    for number, stage in enumerate(stages):
        steps = make_steps(groups, stage, args, args.seed)
        history = "" if number == 0 else runs.fingerprint(vars(args), name, number)
        reference = None
        if stage.preference:
            flat = reference_of(model, steps, run, args, device, history, f"reference {name}")
            reference = group_by_step(flat, steps)
        heldout_reference = reference_of(model, pairs, run, args, device, history, "reference held-out")
        train(model, parameters, stage, steps, reference, epochs,
              lambda: score_heldout(model, pairs, heldout_reference, args.beta, device), args, device,
              directory if len(stages) == 1 else directory / f"{number + 1}-{stage.name}")
        seconds = time.perf_counter() - started
    scores = ranks.on_first(lambda: finish(model))
    reference = reference_of(llama.load(args.model, device, DTYPES[args.dtype]) if stages else model, pairs, run, args,
                             device, "", "reference held-out")
    scores["heldout"] = score_heldout(model, pairs, reference, args.beta, device)
    scores["train_seconds"] = round(seconds, 2)
    if stages:
        ids = groups[0][0].prompt + groups[0][0].continuations[0]
        ranks.on_first(lambda: export(model, parameters, tokenizer, args, directory, ids))
    ranks.on_first(lambda: runs.write_json(result, scores))
    return scores


def export(model: llama.Llama, parameters: dict, tokenizer, args, directory: Path, ids: list[int]) -> None:
    """The trained part in the layout other tools read, loaded again and compared on the tokens `ids`: a PEFT adapter, and with
    --merge a whole Hugging Face directory too; without LoRA that directory, and the difference of attention's weights."""
    adapter, whole, delta = directory / "adapter", directory / "model", directory / "attn_delta.safetensors"
    outputs = {}
    if args.train == "lora":
        runs.fill_directory(adapter, lambda path: runs.save_adapter(
            model, path, args.base, ATTENTION, args.lora_rank, args.lora_alpha, tokenizer.template))
        outputs[adapter] = {"path": args.model, "adapter": adapter}
    elif args.train == "attention":
        runs.save_delta(delta, args.model, parameters, args.base)
        outputs[delta] = {"path": args.model, "adapter": delta}
    if args.train != "lora":
        runs.fill_directory(whole, lambda path: runs.save_model(
            path, args.model, tokenizer, lambda name, old: parameters.get(name, old)))
    elif args.merge:
        runs.fill_directory(whole, lambda path: runs.save_merged(path, args.model, adapter, tokenizer))
    if whole.exists():
        outputs[whole] = {"path": whole}
    runs.check_outputs(model, outputs, ids)


def main(argv=None) -> None:
    args = parse_args(argv)
    began = time.perf_counter()
    device = ranks.start(str(pick_device(args.device)))
    args.device = device.type
    args.dtype = args.dtype if args.dtype != "auto" else "bf16" if device.type == "cuda" else "fp32"
    args.base, args.model = args.model, str(hub.local(args.model))     # what the adapter names, and where it lies
    tokenizer = data.load_tokenizer(args.model)
    config = llama.read_config(args.model)
    print(f"device {device}, {args.dtype}; model {args.base}: {config.model_type}, {config.num_hidden_layers} layers, "
          f"width {config.hidden_size}; run directory {args.out}")

    print(f"\n1. Rows: {args.source} and {args.lang}")
    inputs = {"model": runs.model_fingerprint(args.model), "tokenizer": tokenizer.fingerprint}
    rows, heldout_rows, eval_rows = ranks.on_first(lambda: prepare_rows(args, inputs, device))
    run = Path(args.out)

    print("\n2. Forks")
    row_tokens = min(args.row_tokens, config.max_position_embeddings)
    groups, counts = data.make_forks(rows, tokenizer, args.source, args.lang, row_tokens, args.system_prompt)
    heldout, _ = data.make_forks(heldout_rows, tokenizer, args.source, args.lang, row_tokens, args.system_prompt)
    print(data.describe(counts))

    names = ["base"] + [name for name in (args.baseline, args.method) if name != "none"]
    classifier = evaluation.fit_languages(evaluation.texts_by_language(rows, (args.source, args.lang)))
    report = {"lang": args.lang, "samples": len(rows), "seed": args.seed, "methods": {}}
    answers = {}
    for number, name in enumerate(dict.fromkeys(names)):
        print(f"\n{number + 3}. {'Base model' if name == 'base' else 'Train ' + name}")

        def finish(model):
            return evaluation.answer_and_score(model, tokenizer, eval_rows, (args.source, args.lang), classifier,
                                               args.max_new_tokens, args.system_prompt, run / name / "answers.jsonl")
        report["methods"][name] = run_method(name, groups, heldout, tokenizer, args, run, device, finish)
        answers[name] = [line for _, line in data.read_records(run / name / "answers.jsonl")]

    text = evaluation.report_text(report, answers, args.source)
    ranks.on_first(lambda: (runs.write_json(run / "report.json", report), runs.write_text(run / "report.md", text)))
    print("\n" + text)
    print_ending(args, run, eval_rows, time.perf_counter() - began)
    ranks.stop()


def print_ending(args, run: Path, eval_rows: list[dict], seconds: float) -> None:
    trained = run / args.method
    print(f"Took {seconds:.0f} s, peak memory {peak_memory_gb():.2f} GB. Report: {run}/report.md, report.json; "
          f"curves: {trained}/metrics.jsonl")
    option = f"--adapter {trained}/adapter" if args.train == "lora" else f"--model {trained}/model"
    question = eval_rows[0][args.lang]["prompt"].replace('"', "'").splitlines()[0]
    print(f"Talk to it:\n  python eval.py ask {option} \"{question}\"")


# ------------------------------------------------------------------------------------------------------ command line

def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="clo.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Teach an English-centric model another language by Cross-Lingual Optimization, beside a baseline.",
        epilog="Example: python clo.py --lang sw --model Llama-3.2-1B --data alpaca.json --translator m2m100_1.2B. "
               "The same command goes on where a killed run stopped.")
    add = parser.add_argument_group("main").add_argument
    add("--lang", required=True, help="target language code: one the data holds or the translator knows")
    add("--model", default="demo/llama", help="base model: a directory in Hugging Face layout, or a hub id (owner/name)")
    add("--data", default="demo/english.jsonl", help="training rows: parallel JSONL, Alpaca, OASST, ShareGPT, messages; oasst1 "
                                                    "is fetched from the hub")
    add("--eval-data", default=None, help="questions and answers in both languages; default: eval.jsonl beside --data "
                                          "if there is one, else the held-out rows are answered")
    add("--translator", default="demo/m2m100", help="M2M100 or NLLB, directory or hub id, for rows without the target language")
    add("--out", default=None, help="run directory; default: runs/LANG")
    add("--fresh", action="store_true", help="delete the run directory and start over")
    add = parser.add_argument_group("method").add_argument
    add("--method", default="clo", choices=list(METHODS), help="what to train")
    add("--baseline", default="sft", choices=[*METHODS, "none"], help="trained too, for the comparison")
    add("--lambda", dest="lam", type=float, default=0.5, help="weight of the NLL of target responses, 0 to 1")
    add("--preference", default="sigmoid", choices=["sigmoid", "ipo", "simpo"], help="form of the preference term; simpo wants "
                                                                                 "a --beta of 2 or more")
    add("--beta", type=float, default=0.5, help="strength of the preference term")
    add("--anchor", type=float, default=0.0, help="weight of a penalty on right English responses that fall below the base")
    add("--train", default="lora", choices=list(LEARNING_RATES), help="LoRA on attention, attention itself, or everything")
    add("--lora-rank", type=int, default=16, help="rank R")
    add("--lora-alpha", type=float, default=32, help="scale: the product counts alpha / R")
    add = parser.add_argument_group("data").add_argument
    add("--source", default="en", help="language the model knows")
    add("--samples", type=int, default=None, help="train on this many rows, drawn by --seed; default: all")
    add("--holdout", type=int, default=100, help="rows for validation during training: from the validation split of "
                                                "--eval-data if it has one, else set apart from --data (a fifth at most)")
    add("--turns", default="first", choices=["first", "all"], help="of conversations: the first exchange, or each one")
    add("--system-prompt", default=None, help="put before every question, in the checkpoint's chat template")
    add("--beams", type=int, default=5, help="beam width of the translation")
    add("--keep-failed", action="store_true", help="train on rows of which a translated segment failed its checks, too")
    add("--row-tokens", type=int, default=1024, help="tokens of a packed row; longer responses are cut")
    add = parser.add_argument_group("optimisation").add_argument
    add("--lr", type=float, default=None, help="peak learning rate; default by --train: "
        + ", ".join(f"{mode} {rate:g}" for mode, rate in LEARNING_RATES.items()) + " times 4096 / hidden width")
    add("--epochs", type=int, default=2, help="passes over the rows")
    add("--baseline-epochs", type=int, default=None, help="passes for methods without a preference term; default: --epochs")
    add("--batch-size", type=int, default=8, help="rows (samples) per optimiser step")
    add("--micro-rows", type=int, default=1, help="packed rows per forward pass; memory, not the result, depends on it")
    add("--warmup", type=float, default=0.1, help="part of the steps over which the rate rises; then it falls to 0")
    add("--weight-decay", type=float, default=0.0, help="AdamW's decoupled decay of the trainable weights")
    add("--clip", type=float, default=1.0, help="largest gradient norm")
    add("--seed", type=int, default=0, help="of row choice, order and LoRA's start")
    add = parser.add_argument_group("evaluation and files").add_argument
    add("--eval-split", default="test", help="rows of --eval-data that are answered at the end")
    add("--max-new-tokens", type=int, default=64, help="longest answer, in tokens")
    add("--eval-every", type=int, default=0, help="steps between validations; 0: once an epoch")
    add("--merge", action="store_true", help="LoRA: also write METHOD/model, the whole model with the adapter added")
    add("--save-every", type=int, default=100, help="steps between checkpoints")
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--dtype", default="auto", choices=["auto", *DTYPES], help="compute type; auto: bf16 on CUDA, else fp32")
    args = parser.parse_args(argv)
    if not 0 <= args.lam <= 1:
        parser.error(f"--lambda {args.lam}: a number from 0 to 1 was expected")
    for name in ("lora_rank", "epochs", "batch_size", "micro_rows", "row_tokens", "beams", "max_new_tokens", "save_every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: at least 1 was expected")
    args.out = args.out or f"runs/{args.lang}"
    beside = Path(args.data).with_name("eval.jsonl")
    args.eval_data = args.eval_data or (str(beside) if beside.is_file() else None)
    return args


if __name__ == "__main__":
    data.run(main)
