"""What all methods of a run share: rows read, translated and made into forks, and the directory they go to.

A run is what its flags (IDENTITY) and the content of the files it reads make it. Only `make_job`, `plan_of`
and `ending_lines` see `args`.
"""

import importlib.util
import os
import shlex
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

import data
import kernels
import model as llama
import translate
from engine import ranks, runs, scale
from engine.files import InputError, directory_fingerprint, fingerprint
from evals import heldout
from evals.language import LanguageModel, fit_languages, texts_by_language
from formats import hub
from formats.chat import Tokenizer
from formats.checkpoints import merge_later
from formats.configs import Config, read_config
from formats.records import describe_counts

# Flags that decide what a run gives: with other ones it is another run.
IDENTITY = """
    lang model data eval_data translator method baseline lam nll preference beta anchor train
    lora_rank lora_alpha source samples holdout turns system_prompt template_args beams keep_failed
    row_tokens lr epochs baseline_epochs batch_size micro_rows warmup weight_decay clip seed
    eval_split answers max_new_tokens eval_every device dtype shard
""".split()
CLASSIFIER_ROWS = 400           # rows that the classifier of reply language learns from
SIMPO_BETA = 2.0                # the least that its authors take (arXiv 2405.14734)
LOOK = 4                        # rows that a dry run translates


@dataclass
class Job:
    run: Path | None                    # the run directory; a dry run has none
    identity: str                       # hash of the flags in IDENTITY and of the files the run reads
    device: torch.device
    plan: scale.Plan                    # what "auto" stood for when the run began
    packing: data.Packing
    tokenizer: Tokenizer
    rows: int                           # to train on, if a translation's checks drop none
    groups: list[list[data.Fork]]       # a group of forks for every training row
    heldout: list[list[data.Fork]]      # and for every held-out one
    answered: list[dict]                # rows that are answered at the end
    classifier: LanguageModel | None

    @property
    def prompt(self) -> list[int]:
        """A text to compare the model with what is written of it by."""
        return self.groups[0][0].prompt


def make_job(args, device: torch.device, plan: scale.Plan, methods: dict[str, list]) -> Job:
    """Read, translate and tokenise all that a run of these methods (lists of clo.Stage) needs. Its directory
    is claimed once the input is usable; a dry run claims nothing and translates the first rows alone."""
    stages = sum(methods.values(), [])
    refuse_unused(args.anchor, args.tensorboard, stages)
    print(f"reading the tokenizer of {args.base}")
    tokenizer = data.load_tokenizer(args.model, args.template_args)
    config = read_config(args.model)
    print(f"device {device}; model {args.base}: {config.model_type}, {config.num_hidden_layers} layers, "
          f"width {config.hidden_size}; run directory {args.out}")
    data.print_notes(tokenizer)

    languages = args.source, *args.targets
    print(f"\n1. Rows: {args.source} and {', '.join(args.targets)}")
    eval_data = args.eval_data
    if eval_data is None:
        eval_data = ranks.on_first(lambda: evaluation_file(args.data, languages))
    split = ranks.on_first(lambda: read_split(              # the other ranks get the rows from the first
        args.data, eval_data, languages, args.turns, args.samples, args.holdout, args.eval_split, args.seed))
    count = len(split.rows) - split.apart

    described = {name: getattr(args, name) for name in IDENTITY}
    # The model as it was named: where it lies differs when the command is given in another directory.
    described |= {"model": args.base, "eval_data": eval_data, "row_tokens": plan.row_tokens,
                  "device": device.type}
    # Claimed last, so that input that is refused leaves no directory; a translation goes there, and needs it.
    out = None if args.dry_run else args.out
    claim = partial(open_run, out, described, args.model, tokenizer, plan, args.fresh)
    missing = data.missing_targets(split.rows, args.targets)
    if missing:
        translator = translate.translator_for(split.rows, missing, args.translator, device)
        run, identity, plan = claim()
        rows = translated(split, translator, args.source, missing, args.beams, args.keep_failed, run)
        split = replace(split, rows=rows)
    rows, heldout_rows, answered = split.parts(args.data)

    print("\n2. Forks")
    options = tokenizer, args.source, args.targets, plan.row_tokens, args.system_prompt
    with data.naming(args.data):
        groups, counts = data.make_forks(rows, *options)
    print(describe_counts(counts))
    with data.naming(eval_data if split.heldout else args.data):
        heldout_groups, _ = data.make_forks(heldout_rows, *options)
    if not (args.dry_run and missing):                 # else the rows not looked at may have pairs
        check_pairs(groups, args.data, methods)
    if not missing:
        run, identity, plan = claim()
    print_choices(plan, stages)
    packing = data.packing_for(plan.device, args.batch_size, plan.row_tokens, plan.micro_rows, ranks.size())
    classifier = None
    if not args.dry_run:
        print(f"reply language: learned from {min(len(rows), CLASSIFIER_ROWS):,} of {len(rows):,} rows")
        classifier = fit_languages(texts_by_language(rows[:CLASSIFIER_ROWS], languages))
    return Job(run, identity, device, plan, packing, tokenizer, count, groups, heldout_groups, answered,
               classifier)


def refuse_unused(anchor: float | None, tensorboard: bool, stages: list) -> None:
    """InputError for a flag that could do nothing here."""
    if anchor and not any(stage.objective.prefers for stage in stages):
        raise InputError(f"--anchor {anchor:g}: no stage of this run has a preference term, and so none "
                         f"has a reference to hold answers to; leave it out, or give a --lambda below 1")
    if tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise InputError("--tensorboard needs the tensorboard package: pip install tensorboard")


def print_choices(plan: scale.Plan, stages: list) -> None:
    """What was chosen where the flags leave it open, and what is left weak."""
    print(f"compute type {plan.dtype} ({plan.dtype_why}), at most {plan.micro_rows} packed rows a pass")
    for stage in stages:
        objective = stage.objective
        if objective.prefers and objective.anchor:
            print(f"{stage.name}: --anchor {objective.anchor:g} holds English answers up; "
                  f"the paper's loss is --anchor 0")
        if objective.prefers and objective.kind == "simpo" and objective.beta < SIMPO_BETA:
            print(f"{stage.name}: --beta {objective.beta:g} hardly makes simpo prefer anything: its margins "
                  f"are of mean log-probs, not of sums; its authors take --beta {SIMPO_BETA:g} to 10")


def plan_of(args, config: Config, device: torch.device) -> scale.Plan:
    """How the model is trained, on this machine or with --gpus on others."""
    row_tokens = min(args.row_tokens, config.max_position_embeddings)
    where = device.type if args.gpus is None else "cuda"
    plan = scale.Plan(args.train, args.lora_rank, args.dtype, row_tokens, args.micro_rows, args.recompute,
                      args.gpus or 1, args.shard, device=where)
    return scale.choose(config, plan, scale.DEVICE_BYTES if args.gpus else scale.device_bytes(device))


def evaluation_file(rows: str, languages: tuple[str, ...]) -> str | None:
    """The eval.jsonl beside the training rows, if there is one with the languages."""
    beside = Path(rows).parent / "eval.jsonl"
    if beside == Path(rows) or not hub.find(rows).is_file() or not hub.find(beside).is_file():
        return None
    source, *targets = languages
    return str(beside) if data.holds_languages(str(beside), source, targets) else None


def read_split(path: str, eval_data: str | None, languages: tuple[str, ...], turns: str, samples: int | None,
               holdout: int, eval_split: str, seed: int) -> data.Split:
    """The rows of both files, read, counted and dealt out; some perhaps without the targets."""
    source, *targets = languages
    rows = data.training_rows(path, source, targets, turns)
    evaluated = []
    if eval_data:
        if fingerprint(hub.data_file(path)) == fingerprint(hub.data_file(eval_data)):
            raise InputError(f"--eval-data {eval_data} is the same as --data: the run would train on "
                             f"its test; leave it out, and rows are held out of --data")
        evaluated = data.evaluation_rows(eval_data, source, targets, rows)
    with data.naming(eval_data):
        split = data.split_rows(rows, evaluated, samples, holdout, eval_split, seed)
    left = len(split.rows) - split.apart
    if samples and left < samples:
        print(f"--samples {samples:,}: there are {left:,} rows to train on, all of them are taken")
    split.parts(path)                                  # which refuses too few
    return split


def translated(split: data.Split, translator, source: str, missing: list[str], beams: int, keep_failed: bool,
               run: Path | None) -> list[dict]:
    """The rows of a split with the languages they lack; without a run directory the first few."""
    rows = split.rows if run else split.rows[:split.apart + LOOK]
    path = run and run / f"translated-{','.join(missing)}.jsonl"
    rows = translate.translate_rows(rows, translator, source, missing, path, beams, keep_failed=keep_failed)
    if run:
        ranks.on_first(lambda: runs.hold_translation(run, path, fingerprint(rows)))
    return rows


def check_pairs(groups: list[list[data.Fork]], path: str, methods: dict[str, list]) -> None:
    """InputError when a method has a stage that prefers and no sample of the file gives it a pair."""
    prefers = [name for name, stages in methods.items() if stages and stages[-1].objective.prefers]
    if prefers and all(fork.equal for group in groups for fork in group):
        raise InputError(f"{path}: every row has the same response in all languages, so {prefers[0]} finds "
                         f"nothing to prefer: give other rows, or --method sft")


def open_run(out: str | None, identity: dict, model: str, tokenizer: Tokenizer, plan: scale.Plan,
             fresh: bool) -> tuple[Path | None, str, scale.Plan]:
    """The run directory, a hash of what the run is, and its plan as it was when it began; of a dry run, which
    has no directory, the plan alone."""
    if out is None:
        return None, "", plan
    inputs = {"model": directory_fingerprint(Path(model), *hub.MODEL_FILES),
              "tokenizer": tokenizer.fingerprint}
    for flag in ("data", "eval_data"):
        inputs[flag] = identity[flag] and fingerprint(hub.data_file(identity[flag]))
    chosen = {"dtype": plan.dtype, "dtype_why": plan.dtype_why, "micro_rows": plan.micro_rows}
    run, chosen = ranks.on_first(lambda: runs.claim_run(out, identity, inputs, chosen, fresh))
    return run, fingerprint(identity, inputs), replace(plan, **chosen)


def reference_logps(model: llama.Llama, batches: list[data.Batch], job: Job, history: str,
                    label: str) -> list[torch.Tensor]:
    """Summed log-probs (S,) of every batch under the model as it is now, from the run's cache if they are
    there: a key covers all they depend on. `history` names the model's training so far."""
    # The code too: another order of sums gives other last bits, and rewards would not begin at 0.
    code = [Path(llama.__file__), *sorted(Path(kernels.__file__).parent.glob("*.py"))]
    shapes = [list(batch.tokens.shape) for batch in batches]
    forks = [(fork.prompt, fork.continuations) for batch in batches for fork in batch.forks]
    key = fingerprint(job.identity, job.plan.dtype, history, model.compiled, forks, shapes, torch.__version__,
                      torch.get_num_threads(), *code)
    sizes = [len(batch.length) for batch in batches]
    return runs.cached_reference(job.run, key, sizes, lambda: heldout.summed_logps(model, batches, label))


def read_back(job: Job, result: Path, stages: list, model: str, merge: bool) -> dict:
    """The scores of a method that an earlier command finished. merge: its whole model is written now, if that
    command did not."""
    print(f"{result.parent.name}: done before, read from {result}")
    scores = runs.read_result(result, trained=bool(stages))
    if merge and stages:
        merge_later(result.parent, model, job.tokenizer, job.prompt)
    return scores


def ending_lines(args, job: Job, seconds: float) -> list[str]:
    """Where everything is, what it takes on the disk, and how to talk to the result."""
    run, trained = job.run, job.run / args.method
    curves = ", ".join(map(str, sorted(trained.rglob("metrics.jsonl"))))       # one for each stage
    checkpoints = shlex.join(map(str, sorted(run.glob("**/checkpoint"))))
    option = ["--adapter", f"{trained}/adapter"] if args.train == "lora" else ["--model", f"{trained}/model"]
    for flag, value in (("--system-prompt", args.system_prompt), ("--template-args", args.template_args)):
        option += [flag, value] if value else []
    question = job.answered[0][args.targets[0]]["prompt"].strip().splitlines()[0]
    words = ["python", os.path.relpath(hub.ROOT / "eval.py"), "ask", *option]
    words += ["--"] * question.startswith("-")                         # else it would be read as a flag
    return [f"Took {seconds:.0f} s, peak memory {scale.peak_memory_gb():.2f} GB. "
            f"Report: {run}/report.md, report.json; curves: {curves}",
            f"{run} takes {runs.disk_bytes(run) / 1e6:.1f} MB; what only resuming needs: rm -r {checkpoints}",
            "Talk to it:\n  " + shlex.join([*words, question])]
