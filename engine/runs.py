"""The run directory: what a run is, what it has done, and how a killed one goes on where it stopped.

    runs/NAME/config.json            resolved flags, versions, seed, hashes of the inputs
             translated-LANG.jsonl   machine-translated rows, appended one by one
             reference/HASH.safetensors    reference log-probs, keyed by everything they depend on
             report.json, report.md
             METHOD/metrics.jsonl    one line a step
             METHOD/checkpoint/step-N/     trainable weights, optimiser state, step (the last two are kept)
             METHOD/adapter/ | model/      PEFT layout | Hugging Face layout
             METHOD/result.json      scores of the finished method

Everything is written under a temporary name and renamed, so a file that is there is whole.
"""

import json
import os
import platform
import re
import signal
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from engine import ranks
from engine.files import (InputError, empty_directory, fingerprint, put_in_place, read_json, remove,
                          write_json, write_text, writing)
from formats.weights import save_tensors

CHECKPOINTS_KEPT = 2
READ = ("model", "data", "eval_data", "translator")     # flags that name what a run reads: never moved away


def model_fingerprint(directory) -> str:
    """Of config.json and the names, sizes and modification times of the weight files
    (hashing 16 GB takes a minute)."""
    directory = Path(directory)
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns)
             for path in sorted(directory.glob("*.safetensors"))]
    return fingerprint(directory / "config.json", files)


def open_run(directory, flags: dict, inputs: dict, chosen: dict, fresh: bool = False) -> tuple[Path, dict]:
    """(run directory, what it chose when it began) for these flags and inputs: made, or taken up again when
    config.json says the same.

    flags: the identity of the run. inputs: a hash of each file it reads, by the flag that names it. chosen: what
    this machine would choose where a flag says auto; a run that goes on keeps what it chose when it began.
    InputError, naming the first difference, when the directory belongs to another run; nothing in it is touched
    then. fresh: a run that is there is renamed aside.
    """
    directory = Path(directory)
    config = {"flags": flags, "inputs": inputs, "chosen": chosen, "seed": flags["seed"],
              "versions": {"python": platform.python_version(), "torch": torch.__version__}}
    path = directory / "config.json"
    try:
        if fresh:
            move_aside(directory, [Path(flags[name]) for name in READ if flags.get(name)])
        before = read_run(path)
        if before is not None and list(directory.iterdir()) == [path]:
            before = None                    # it stopped before it had anything: its input was refused
            path.unlink()
        if before is None:
            check_vacant(directory)
            write_json(path, config)
            return directory, chosen
        compare_runs(directory, before, config)
    except OSError as error:
        raise InputError(f"cannot write to {directory} ({error.strerror}): choose another --out") from None
    print(f"{directory} is there with the same settings: going on where it stopped (--fresh starts over)")
    return directory, before.get("chosen", chosen)


def read_run(path: Path) -> dict | None:
    """The config.json of a run; None when it is none: missing, damaged, or another program's
    (a model's config.json has the same name)."""
    try:
        config = read_json(path)
    except InputError:
        return None
    whole = all(isinstance(config.get(part), dict) for part in ("flags", "inputs", "versions"))
    return config if whole else None


def compare_runs(directory: Path, before: dict, config: dict) -> None:
    """InputError that names the first difference between two runs."""
    for key in {**before["flags"], **config["flags"]}:
        old, new = before["flags"].get(key), config["flags"].get(key)
        if old != new:
            raise InputError(f"{directory} belongs to a run with {key} = {old!r}, now it is {new!r}: "
                             f"choose another --out, or start over with --fresh")
    for key in {**before["inputs"], **config["inputs"]}:
        if before["inputs"].get(key) != config["inputs"].get(key):
            name = config["flags"].get(key) or f"the {key} of {config['flags'].get('model')}"
            raise InputError(f"{directory} belongs to a run that began with another content of --{key}: the "
                             f"contents of {name} changed; choose another --out, or start over with --fresh")


def check_vacant(directory: Path) -> None:
    """InputError unless a run can begin here: nothing is there but what a kill leaves while config.json is being
    written."""
    path, half = directory / "config.json", directory / "config.json.tmp"
    if not directory.exists() or not set(directory.iterdir()) - {half}:
        return
    if path.exists():
        raise InputError(f"{directory} is not empty and its config.json is not a run's, or damaged: "
                         f"choose another --out")
    raise InputError(f"{directory} is not empty and holds no run: choose another --out")


def move_aside(directory: Path, needed: list[Path]) -> None:
    """Give the directory of a run, and no other one, a name of its own, so that nothing is lost."""
    if read_run(directory / "config.json") is None:
        return
    for kept in needed:
        if kept.exists() and directory.resolve() in (kept.resolve(), *kept.resolve().parents):
            raise InputError(f"--fresh would move {kept} away, which the new run reads: choose another --out")
    number = 1
    while (aside := directory.with_name(f"{directory.name}.old-{number}")).exists():
        number += 1
    os.replace(directory, aside)
    print(f"{directory} is now {aside}: delete it when nobody needs it")


def disk_bytes(directory: Path) -> int:
    """Bytes of all files below a directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def read_result(path: Path) -> dict:
    """The scores of a finished method; InputError when the file is damaged."""
    try:
        scores = read_json(path)
    except InputError:
        scores = {}
    if not isinstance(scores.get("heldout"), dict) or "train_seconds" not in scores:
        raise InputError(f"{path} is damaged: delete it, and the same command writes it again")
    return scores


class StopSignal:
    """SIGINT and SIGTERM ask for a stop after the running step, which is saved; `number` is the signal, or 0.
    A second Ctrl-C stops at once; not under torchrun, which passes one on that every process has had."""

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
            again = "; Ctrl-C again stops at once, back at the last checkpoint" * alone
            # Not print: the signal may have come inside of one.
            os.write(2, f"signal {number}: stopping after the running step{again}\n".encode())
        self.number = number

    def goodbye(self, number: int, step: int) -> int:
        """Says what was kept; the exit code of a process that a signal ended."""
        print(f"stopped by signal {number} after step {step}, saved; the same command goes on from there")
        return 128 + number

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------- reference log-probs

def load_reference(run: Path, key: str, sizes: list[int]) -> list[Tensor] | None:
    """Summed log-probs (S,) per micro-batch from the cache file of this key; None when there is none, or it
    is damaged or holds anything but finite log-probs of these sizes: then they are computed again."""
    try:
        flat = load_file(run / "reference" / f"{key}.safetensors")["logp"]
    except (OSError, SafetensorError, KeyError):
        return None
    sound = (flat.shape == (sum(sizes),) and flat.dtype in (torch.float32, torch.float64)
             and bool(flat.isfinite().all()))
    return list(flat.split(sizes)) if sound else None


def cached_reference(run: Path, key: str, sizes: list[int], compute) -> list[Tensor]:
    """Summed log-probs (S,) per micro-batch: from the cache file of this key, else by compute(), and kept."""
    sums = ranks.on_first(lambda: load_reference(run, key, sizes))
    if sums is None:
        sums = compute()
        ranks.on_first(lambda: save_reference(run, key, sums))
    return sums


def save_reference(run: Path, key: str, sums: list[Tensor]) -> None:
    path = run / "reference" / f"{key}.safetensors"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(path)                                               # which load_reference found no use for
        save_tensors(path, {"logp": torch.cat(sums)})


# ------------------------------------------------------------------------------------------------ checkpoints

def save_checkpoint(directory: Path, step: int, parameters: dict[str, Tensor], optimizer) -> None:
    """Everything the next step depends on: fp32 trainables, AdamW's two moments, the step. All ranks call
    this; the first one writes, or each its own part where parameters are sharded. Keeps the last two."""
    path = directory / f"step-{step:06d}"
    temporary = path.with_name(path.name + ".tmp")

    def finish() -> None:
        write_json(temporary / "state.json", {"step": step, "parts": parts})
        put_in_place(temporary, path)
        # one of a later step was passed over when this run went on: damaged
        prune(directory, [old for old in checkpoints(directory) if step_of(old) <= step][-CHECKPOINTS_KEPT:])
    with writing(path):
        ranks.on_first(lambda: empty_directory(temporary))
        part, parts = own_part(parameters)
        if parts > 1 or ranks.rank() == 0:
            save_tensors(temporary / f"state-{part}.safetensors", state_tensors(parameters, optimizer))
        ranks.barrier()
        ranks.on_first(finish)


def checkpoints(directory: Path) -> list[Path]:
    """Oldest first."""
    return sorted((path for path in directory.glob("step-*") if re.fullmatch("step-[0-9]+", path.name)),
                  key=step_of)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def prune(directory: Path, kept: list[Path]) -> None:
    """Delete the checkpoints not to be kept, and what a kill left of others."""
    for path in set(directory.glob("step-*")) - set(kept):
        if re.fullmatch(r"step-[0-9]+(\.tmp|\.old)?", path.name):
            remove(path)


def own_part(parameters: dict[str, Tensor]) -> tuple[int, int]:
    """Which part of the state this rank holds, of how many: the only one unless parameters are sharded."""
    return (ranks.rank(), ranks.size()) if any(map(ranks.is_sharded, parameters.values())) else (0, 1)


def state_tensors(parameters: dict[str, Tensor], optimizer) -> dict[str, Tensor]:
    tensors = {}
    for name, parameter in parameters.items():
        for kind, value in {"weight": parameter.detach(), **optimizer.state[parameter]}.items():
            tensors[f"{kind}.{name}"] = ranks.local(value).cpu().contiguous()
    return tensors


def load_checkpoint(directory: Path, parameters: dict[str, Tensor], optimizer) -> int:
    """Restore the newest whole checkpoint into parameters and optimiser; the number of steps done
    (0 without one). One that any rank finds damaged is named and passed over."""
    device, found = next(iter(parameters.values())).device, checkpoints(directory)
    for i, path in reversed(list(enumerate(found))):
        ranks.on_first(lambda: refuse_other_ranks(path, parameters))
        try:
            step, tensors = read_checkpoint(path, parameters)
        except InputError as error:
            step, why = -1, error
        if not ranks.largest(int(step < 0), device):
            restore_(parameters, optimizer, tensors)
            ranks.on_first(lambda: prune(directory, found[max(i + 1 - CHECKPOINTS_KEPT, 0):]))
            return step
        print(f"checkpoint passed over, going back to the one before: "
              f"{why if step < 0 else f'{path} is damaged'}")
    return 0


def refuse_other_ranks(path: Path, parameters: dict[str, Tensor]) -> None:
    """InputError when another number of ranks wrote the checkpoint: no rank would find its part."""
    try:
        written = read_json(path / "state.json").get("parts")
    except InputError:                                             # damaged: read_checkpoint says so
        return
    parts = own_part(parameters)[1]
    if type(written) is int and written > 0 and written != parts:
        raise InputError(f"{path} was written by {written} ranks with --shard, now there are {parts}: "
                         f"start as many, or start over with --fresh")


def read_checkpoint(path: Path, parameters: dict[str, Tensor]) -> tuple[int, dict[str, Tensor]]:
    """Step and tensors of this rank's part of a checkpoint. InputError when it is damaged or incomplete."""
    state, (part, _) = read_json(path / "state.json"), own_part(parameters)
    step, written = state.get("step"), state.get("parts")
    if type(step) is not int or not 0 < step == step_of(path) or type(written) is not int or written < 1:
        raise InputError(f"{path}/state.json is damaged (step {step!r:.20}, parts {written!r:.20})")
    try:
        tensors = load_file(path / f"state-{part}.safetensors")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}/state-{part}.safetensors cannot be read ({error})") from None
    for name, parameter in parameters.items():
        for kind, shape in {"weight": ranks.local(parameter).shape, "exp_avg": ranks.local(parameter).shape,
                            "exp_avg_sq": ranks.local(parameter).shape, "step": ()}.items():
            if f"{kind}.{name}" not in tensors or tensors[f"{kind}.{name}"].shape != shape:
                raise InputError(f"{path}: {kind}.{name} is missing or has another shape")
    return step, tensors


@torch.no_grad()
def restore_(parameters: dict[str, Tensor], optimizer, tensors: dict[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        ranks.local(parameter).copy_(tensors[f"weight.{name}"])
        state = {"step": tensors[f"step.{name}"]}                  # on the CPU, unless AdamW is fused
        if optimizer.defaults["fused"]:
            state["step"] = state["step"].to(parameter.device)
        for moment in ("exp_avg", "exp_avg_sq"):
            state[moment] = torch.zeros_like(parameter)
            ranks.local(state[moment]).copy_(tensors[f"{moment}.{name}"])
        optimizer.state[parameter] = state


class Metrics:
    """metrics.jsonl, one line a step, and TensorBoard's curves when they are wanted. Lines past step `done`, where
    the checkpoint is, are dropped: a killed run wrote further. Only the first rank writes."""

    def __init__(self, directory: Path, done: int, tensorboard: bool = False):
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "metrics.jsonl"
        ranks.on_first(lambda: truncate_metrics(path, done if done else -1))
        writes = ranks.rank() == 0
        self.file = open(path if writes else os.devnull, "a", encoding="utf-8", buffering=1)
        self.board = None
        if tensorboard and writes:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(str(directory / "tensorboard"), purge_step=done)

    def write(self, metrics: dict) -> None:
        self.file.write(json.dumps(metrics) + "\n")
        if self.board is None:
            return
        for name, value in metrics.items():
            if isinstance(value, (int, float)) and name != "step":
                self.board.add_scalar(name, value, metrics["step"])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def truncate_metrics(path: Path, done: int) -> None:
    """Keep the lines of steps 0 to `done`, none for -1: a killed run wrote further than its checkpoint,
    perhaps half a line. InputError when one of those is missing or damaged: nothing writes it again."""
    try:
        lines = path.read_bytes().split(b"\n")[:done + 1] if done >= 0 else []
        sound = [json.loads(line.decode())["step"] for line in lines] == list(range(done + 1))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        sound = False
    if not sound:
        raise InputError(f"{path} is damaged: not every step up to {done}, where the checkpoint is, "
                        f"has its line: start over with --fresh, or choose another --out")
    write_text(path, "".join(line.decode() + "\n" for line in lines))
