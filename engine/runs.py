"""The run directory: what a run is, what it has done, and how a killed one goes on where it stopped.

    runs/NAME/config.json            flags, versions, hashes of the inputs
             translated-LANG.jsonl   machine-translated rows, appended some at a time
             reference/HASH.safetensors    reference log-probs, keyed by everything they depend on
             report.json, report.md
             METHOD/metrics.jsonl    one line a step
             METHOD/checkpoint/step-N/     trainable weights, optimiser state, step (the last two are kept)
             METHOD/adapter/ | model/      PEFT layout | Hugging Face layout
             METHOD/result.json      scores of the finished method

What is appended to (.jsonl) may end in half a line after a kill, which is dropped. All else is written under
a temporary name and renamed: a file that is there is whole.
"""

import contextlib
import itertools
import math
import os
import platform
import re
import signal
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from engine import ranks
from engine.files import (InputError, append_jsonl, empty_directory, first_difference, free_name,
                          put_in_place, read_journal, read_json, remove, write_json, write_jsonl, writing)
from formats.weights import ADAPTER_CONFIG, INDEX, read_index, save_tensors

CHECKPOINTS_KEPT = 2
STATE = ("weight", "step", "exp_avg", "exp_avg_sq")     # of a parameter: itself, and what AdamW knows of it
READ = ("model", "data", "eval_data", "translator")     # flags that name what a run reads: never moved away


def claim_run(directory, flags: dict, inputs: dict, chosen: dict, fresh: bool = False) -> tuple[Path, dict]:
    """(run directory, what it chose when it began) for these flags and inputs: made, or taken up again when
    config.json says the same.

    flags: the identity of the run. inputs: a hash of each file it reads, by the flag that names it. chosen:
    what this machine would choose where a flag says auto; a run that goes on keeps what it chose before.
    InputError, naming the first difference, when the directory belongs to another run; nothing in it is
    touched then. fresh: a run that is there is renamed aside.
    """
    directory = Path(directory)
    path = directory / "config.json"
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    with writing(directory):
        if fresh:
            move_aside(directory, [Path(flags[name]) for name in READ if flags.get(name)])
        before = read_run_config(path)
        there = {entry.name for entry in directory.iterdir()} if directory.exists() else set()
        # A run of other flags that has done nothing yet gives up its place. So does what a kill left of one:
        # half a config.json under its temporary name.
        idle = {"config.json.tmp", "config.json"} if before else {"config.json.tmp"}
        if there <= idle:
            write_json(path, {"flags": flags, "inputs": inputs, "chosen": chosen, "versions": versions})
            return directory, chosen
    if before is None:
        raise InputError(f"{directory} is not empty and holds no run (config.json is missing, damaged or "
                         f"another program's): choose another --out")
    compare_runs(directory, before, flags, inputs)
    print(f"{directory} is there with the same settings: going on where it stopped (--fresh starts over)")
    return directory, before.get("chosen", chosen)


def read_run_config(path: Path) -> dict | None:
    """The config.json of a run; None when it is none: missing, damaged, or another program's
    (a model's config.json has the same name)."""
    try:
        config = read_json(path)
    except InputError:
        return None
    is_run = all(isinstance(config.get(part), dict) for part in ("flags", "inputs", "versions"))
    return config if is_run else None


def compare_runs(directory: Path, before: dict, flags: dict, inputs: dict) -> None:
    """InputError that names the first difference between two runs. What only an older version held for a part
    of a run's identity is no difference."""
    known = {flag: value for flag, value in before["flags"].items() if flag in flags}
    if found := first_difference(known, flags):
        raise InputError(f"{directory} belongs to a run with {found}: choose another --out, or start over "
                         f"with --fresh")
    if found := first_difference(before["inputs"], inputs):
        key = found.key
        name = flags.get(key) or f"the {key} of {flags.get('model')}"
        raise InputError(f"{directory} belongs to a run that began with another content of --{key}: the "
                         f"contents of {name} changed; choose another --out, or start over with --fresh")


def hold_translation(directory: Path, path: Path, rows: str) -> None:
    """Note in config.json a hash of the rows as they are translated. InputError when something rests on other
    ones: the file was edited since, or another translator made it anew."""
    config = read_json(directory / "config.json")
    worked = any(directory.glob("*/answers.jsonl"))         # base's come before all training
    if worked and config.get("translation", rows) != rows:
        raise InputError(f"{path} has changed since {directory} began with it (an edited line, another "
                         f"translator): put the old lines back, or give --data {path} and another --out")
    write_json(directory / "config.json", config | {"translation": rows})


def move_aside(directory: Path, needed: list[Path]) -> None:
    """Give the directory of a run, and no other one, a name of its own, so that nothing is lost."""
    if read_run_config(directory / "config.json") is None:
        return
    for kept in needed:
        if kept.exists() and kept.resolve().is_relative_to(directory.resolve()):
            raise InputError(f"--fresh would move {kept} away, which the new run reads: choose another --out")
    aside = free_name(directory)
    os.replace(directory, aside)
    print(f"{directory} is now {aside}: delete it when nobody needs it")


def disk_bytes(directory: Path) -> int:
    """Bytes of all files below a directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def read_result(path: Path, trained: bool) -> dict:
    """The scores of a finished method; InputError when the file is damaged, or the weights beside it."""
    try:
        scores = read_json(path)
    except InputError:
        scores = {}
    if not isinstance(scores.get("heldout"), dict) or "train_seconds" not in scores:
        raise InputError(f"{path} is damaged: delete it, and the same command writes it again")
    if trained:
        check_weights(path)
    return scores


def check_weights(result: Path) -> None:
    """InputError when the adapter or model that was written beside a result is gone, or a file of it gone or
    cut."""
    written = [*result.parent.glob("adapter/*.safetensors"), *result.parent.glob("model/*.safetensors")]
    index = result.parent / "model" / INDEX
    if index.exists():
        written += [index.with_name(name) for name in read_index(index).values()]
    try:
        for file in {*written}:
            read_json(file.with_name(ADAPTER_CONFIG if file.parent.name == "adapter" else "config.json"))
            with safe_open(file, "pt"):         # reads the header, and compares its sizes with the file's
                pass
    except (OSError, InputError, SafetensorError):
        written = []
    if not written:
        raise InputError(f"{result.parent} has lost what was trained (adapter/ or model/ is gone or "
                         f"damaged): delete {result}, and the same command writes all of it again")


class StopSignal:
    """SIGINT and SIGTERM ask for a stop after the running step, which is saved; `number` is the signal, or 0.
    A second Ctrl-C stops at once; not under torchrun, which passes one on that every process has had, and
    kills those that have not ended in time."""

    def __enter__(self):
        self.number, self.before = 0, {}
        for number in (signal.SIGINT, signal.SIGTERM):
            self.before[number] = signal.signal(number, self.ask)
        return self

    def ask(self, number, frame):
        alone = "RANK" not in os.environ
        if self.number and number == signal.SIGINT and alone:
            raise KeyboardInterrupt
        if not self.number and os.environ.get("RANK", "0") == "0":
            more = "Ctrl-C again stops at once, back at the last checkpoint"
            if not alone:
                more = "torchrun kills what has not saved within its --shutdown-timeout (without it 30 s)"
            # Not print: the signal may have come inside of one.
            os.write(2, f"signal {number}: stopping after the running step; {more}\n".encode())
        self.number = number

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def say_stopped(number: int, step: int) -> int:
    """Says what was kept; the exit code of a process that a signal ended."""
    print(f"stopped by signal {number} after step {step}, saved; the same command goes on from there")
    return 128 + number


# ---------------------------------------------------------------------------------------- reference log-probs

def load_reference(path: Path, sizes: list[int]) -> list[Tensor] | None:
    """Summed log-probs (S,) per micro-batch; None when there is no whole file: then they are made again."""
    try:
        logp = load_file(path)["logp"]
    except (OSError, SafetensorError):
        return None
    return list(logp.split(sizes)) if len(logp) == sum(sizes) else None


def save_reference(path: Path, sums: list[Tensor]) -> None:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(path, {"logp": torch.cat(sums)})


def cached_reference(run: Path, key: str, sizes: list[int], compute) -> list[Tensor]:
    """Summed log-probs (S,) per micro-batch: from the cache file of this key, which says all that they depend
    on, else by compute(), and kept."""
    path = run / "reference" / f"{key}.safetensors"
    sums = ranks.on_first(lambda: load_reference(path, sizes))
    if sums is None:
        sums = compute()
        ranks.on_first(lambda: save_reference(path, sums))
    return sums


# ------------------------------------------------------------------------------------------------ checkpoints

def save_checkpoint(directory: Path, step: int, parameters: dict[str, Tensor], optimizer) -> None:
    """Everything the next step depends on: fp32 trainables, AdamW's two moments, the step. All ranks call
    this; the first one writes, or each its own part where parameters are sharded. Keeps the last two."""
    path = directory / f"step-{step:06d}"
    temporary = path.with_name(path.name + ".tmp")

    def finish() -> None:
        put_in_place(temporary, path)
        prune(directory, step)
    with writing(path):
        ranks.on_first(lambda: empty_directory(temporary))
        part, parts = own_part(parameters)
        if parts > 1 or ranks.rank() == 0:
            save_tensors(temporary / file_name(part, parts), state_tensors(parameters, optimizer))
        ranks.barrier()
        ranks.on_first(finish)


def checkpoints(directory: Path) -> list[Path]:
    """Oldest first."""
    found = [path for path in directory.glob("step-*") if re.fullmatch("step-[0-9]+", path.name)]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def prune(directory: Path, step: int) -> None:
    """Delete all checkpoints but the last two up to this step: later ones were passed over, damaged. And
    what a kill left of others."""
    kept = [path for path in checkpoints(directory) if step_of(path) <= step][-CHECKPOINTS_KEPT:]
    for path in set(directory.glob("step-*")) - set(kept):
        if re.fullmatch(r"step-[0-9]+(\.tmp|\.old)?", path.name):
            remove(path)


def own_part(parameters: dict[str, Tensor]) -> tuple[int, int]:
    """Which part of the state this rank holds, of how many: the only one unless parameters are sharded."""
    return (ranks.rank(), ranks.size()) if any(map(ranks.is_sharded, parameters.values())) else (0, 1)


def file_name(part: int, parts: int) -> str:
    return f"state-{part}-of-{parts}.safetensors"


def state_tensors(parameters: dict[str, Tensor], optimizer) -> dict[str, Tensor]:
    tensors = {}
    for name, parameter in parameters.items():
        state = {"weight": parameter.detach()} | optimizer.state[parameter]
        for kind in STATE:
            tensors[f"{kind}.{name}"] = ranks.local_part(state[kind]).cpu().contiguous()
    return tensors


def load_checkpoint(directory: Path, parameters: dict[str, Tensor], optimizer) -> int:
    """Restore the newest whole checkpoint into parameters and optimiser; the number of steps done
    (0 without one). One that any rank finds damaged is named and passed over."""
    device = next(iter(parameters.values())).device
    found = checkpoints(directory)
    for path in reversed(found):
        ranks.on_first(lambda: refuse_other_ranks(path, parameters))
        tensors = read_checkpoint(path, parameters)
        if ranks.largest(int(tensors is None), device):
            left = "the training begins anew" if path == found[0] else "going back to the one before"
            print(f"checkpoint passed over, {left}: {path} is damaged")
            continue
        restore_(parameters, optimizer, tensors)
        ranks.on_first(lambda: prune(directory, step_of(path)))
        return step_of(path)
    return 0


def refuse_other_ranks(path: Path, parameters: dict[str, Tensor]) -> None:
    """InputError when another number of ranks wrote the checkpoint: no rank would find its part."""
    _, parts = own_part(parameters)
    for file in path.glob("state-*-of-*.safetensors"):
        written = file.stem.rpartition("-")[2]
        if written != str(parts):
            raise InputError(f"{path} was written by {written} ranks with --shard, now there are {parts}: "
                             f"start as many, or start over with --fresh")


def read_checkpoint(path: Path, parameters: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """This rank's part of a checkpoint; None when it is damaged or incomplete."""
    try:
        tensors = load_file(path / file_name(*own_part(parameters)))
    except (OSError, SafetensorError):
        return None
    names = {f"{kind}.{name}" for kind in STATE for name in parameters}
    return tensors if names <= tensors.keys() else None


@torch.no_grad()
def restore_(parameters: dict[str, Tensor], optimizer, tensors: dict[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        ranks.local_part(parameter).copy_(tensors[f"weight.{name}"])
        step = tensors[f"step.{name}"]
        if parameter.is_cuda:                                      # elsewhere AdamW has it on the CPU
            step = step.to(parameter.device)
        state = optimizer.state[parameter] = {"step": step}
        for moment in ("exp_avg", "exp_avg_sq"):
            state[moment] = torch.zeros_like(parameter)
            ranks.local_part(state[moment]).copy_(tensors[f"{moment}.{name}"])


def stop_unless_finite(metrics: dict, stage: str, rate: float) -> None:
    """InputError for a step whose loss or gradient is no number."""
    if math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"]):
        return
    remedy = f"the last checkpoint is kept; try a lower --lr than {rate:.2g}"
    if metrics["step"] == 1:                        # before any update: no rate had a part in it
        remedy = "no update had a part in it: try another --dtype, and a smaller --lora-alpha if it is large"
    raise InputError(f"{stage}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']} at step "
                     f"{metrics['step']}: stopped; {remedy}")


class MetricsLog:
    """metrics.jsonl, one line a step, and TensorBoard's curves when they are wanted. Lines past step `done`,
    where the checkpoint is, are dropped: a killed run wrote further. Only the first rank writes."""

    def __init__(self, directory: Path, done: int, tensorboard: bool = False):
        self.path = directory / "metrics.jsonl"
        ranks.on_first(lambda: truncate_metrics(self.path, done))
        self.board = None
        if tensorboard and ranks.rank() == 0:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(str(directory / "tensorboard"), purge_step=done)

    def write(self, metrics: dict) -> None:
        if ranks.rank() == 0:
            append_jsonl(self.path, [metrics])
        for name, value in metrics.items() if self.board else ():
            if isinstance(value, (int, float)) and name != "step":
                self.board.add_scalar(name, value, metrics["step"])


def logged_seconds(directory: Path) -> float:
    """Of the steps of a method that earlier commands ran, up to a damaged line: whether there may be one,
    truncate_metrics says. What else they did is not known."""
    seconds = 0.0
    for path in directory.rglob("metrics.jsonl"):                      # one for each stage
        with contextlib.suppress(InputError):
            for _, metrics in read_journal(path, ""):
                seconds += metrics.get("seconds", 0.0)                 # step 0 is a validation alone
    return seconds


def truncate_metrics(path: Path, done: int) -> None:
    """Keep the lines of steps 0 to `done`, none where none is done: a killed run wrote further than its
    checkpoint, perhaps half a line. InputError when one of those is missing or damaged (a power failure may
    take lines and spare the checkpoint): only steps behind an earlier checkpoint write theirs again."""
    steps = [*range(done + 1)] if done else []
    remedy = (f"delete {path.parent}/checkpoint/step-{done:06d} to go on from the checkpoint before it, or "
              f"start over with --fresh")
    lines = itertools.islice(read_journal(path, remedy), len(steps))
    kept = [metrics for _, metrics in lines]
    if [metrics.get("step") for metrics in kept] != steps:
        raise InputError(f"{path} is damaged: not every step up to {done}, where the checkpoint is, "
                         f"has its line: {remedy}")
    write_jsonl(path, kept)
