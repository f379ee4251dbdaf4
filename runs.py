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

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import ranks
from data import DataError
from model import (MAX_SHARD_BYTES, CheckpointError, add_update, load, open_checkpoint, open_weights,
                   read_adapter, read_json, save_sharded, save_tensors)

CHECKPOINTS_KEPT = 2
READ = ("model", "data", "eval_data", "translator")     # flags that name what a run reads: never deleted


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def fill_directory(path: Path, fill) -> None:
    """Call fill(temporary directory), then put it in the place of `path`."""
    with writing(path):
        temporary = empty_directory(path.with_name(path.name + ".tmp"))
        fill(temporary)
        put_in_place(temporary, path)


def empty_directory(path: Path) -> Path:
    remove(path)
    path.mkdir(parents=True)
    return path


def put_in_place(temporary: Path, path: Path) -> None:
    """Rename a directory, over another one if need be;
    a kill in between leaves the new one or none, never half of one."""
    old = path.with_name(path.name + ".old")
    remove(old)
    if path.exists():
        os.replace(path, old)
    os.replace(temporary, path)
    remove(old)


def remove(path: Path) -> None:
    """A file, a link, or a directory with all that is in it; nothing when nothing is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path):
    """What keeps `path` from being written, mostly a full disk, becomes one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} cannot be written ({error}): make room on its disk; "
                        f"the same command goes on from the last checkpoint") from None


def fingerprint(*parts) -> str:
    """Short hash of JSON-able values and of the contents of files (Path)."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            with open(part, "rb") as file:
                for block in iter(lambda: file.read(1 << 20), b""):
                    digest.update(block)
        else:
            digest.update(json.dumps(part, sort_keys=True, default=str).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def model_fingerprint(directory) -> str:
    """Of config.json and the names, sizes and modification times of the weight files
    (hashing 16 GB takes a minute)."""
    directory = Path(directory)
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns)
             for path in sorted(directory.glob("*.safetensors"))]
    return fingerprint(directory / "config.json", files)


def open_run(directory, flags: dict, inputs: dict, fresh: bool = False, resume: bool = False) -> Path:
    """The run directory for these flags and inputs: made, or taken up again when config.json says the same.

    DataError, naming the first difference, when it belongs to another run; nothing in it is touched then.
    With `resume` there has to be a run; with `fresh` the one that is there is deleted.
    """
    directory = Path(directory)
    config = {"flags": flags, "inputs": inputs, "seed": flags["seed"],
              "versions": {"python": platform.python_version(), "torch": torch.__version__}}
    path = directory / "config.json"
    try:
        if fresh:
            delete_run(directory, [Path(flags[name]) for name in READ if flags.get(name)])
        before = read_run(path)
        if before is not None and not resume and list(directory.iterdir()) == [path]:
            before = None                    # it stopped before it had anything: its input was refused
            path.unlink()
        if before is not None:
            compare_runs(directory, before, config)
            print(f"{directory} is there with the same settings: "
                  f"going on where it stopped (--fresh starts over)")
        elif resume:
            raise DataError(f"--resume: {directory} holds no run to go on with: "
                            f"see --out, or leave --resume out to start one")
        else:
            check_vacant(directory)
            write_json(path, config)
    except OSError as error:
        raise DataError(f"cannot write to {directory} ({error.strerror}): choose another --out") from None
    return directory


def read_run(path: Path) -> dict | None:
    """The config.json of a run; None when it is none: missing, damaged, or another program's
    (a model's config.json has the same name)."""
    try:
        config = read_json(path)
    except CheckpointError:
        return None
    whole = all(isinstance(config.get(part), dict) for part in ("flags", "inputs", "versions"))
    return config if whole else None


def compare_runs(directory: Path, before: dict, config: dict) -> None:
    for part in ("flags", "inputs"):
        for key in {**before[part], **config[part]}:
            old, new = before[part].get(key), config[part].get(key)
            if old != new:
                raise DataError(f"{directory} belongs to a run with {key} = {old!r}, now it is {new!r}: "
                                f"choose another --out, or start over with --fresh")


def check_vacant(directory: Path) -> None:
    """DataError unless a run can begin here:
    nothing is there but what a kill leaves while config.json is being written."""
    path, half = directory / "config.json", directory / "config.json.tmp"
    if not directory.exists() or not set(directory.iterdir()) - {half}:
        return
    if path.exists():
        raise DataError(f"{directory} is not empty and its config.json is not a run's, or damaged: "
                        f"choose another --out")
    if read_run(half) is not None:
        raise DataError(f"{directory} holds the rest of a run whose deletion was killed: "
                        f"delete it with --fresh, or choose another --out")
    raise DataError(f"{directory} is not empty and holds no run: choose another --out")


def delete_run(directory: Path, needed: list[Path]) -> None:
    """Empty the directory of a run, and no other one. config.json gets another name first and goes last, so
    that a deletion that was killed leaves no run to go on with, and can be repeated."""
    path, half = directory / "config.json", directory / "config.json.tmp"
    if read_run(path) is None and (path.exists() or read_run(half) is None):
        return
    for kept in needed:
        if kept.exists() and directory.resolve() in (kept.resolve(), *kept.resolve().parents):
            raise DataError(f"--fresh would delete {kept}, which the new run reads: choose another --out")
    if path.exists():
        os.replace(path, half)
    for entry in set(directory.iterdir()) - {half}:
        remove(entry)
    half.unlink()


def read_result(path: Path) -> dict:
    """The scores of a finished method; DataError when the file is damaged."""
    try:
        scores = read_json(path)
    except CheckpointError:
        scores = {}
    if not isinstance(scores.get("heldout"), dict) or "train_seconds" not in scores:
        raise DataError(f"{path} is damaged: delete it, and the same command writes it again")
    return scores


def check_disk_space(directory: Path, parameters: dict[str, Tensor], exported: int) -> None:
    """DataError unless the disk has room for a method's files: checkpoints (the kept ones and one being
    written, each the trainable weights and AdamW's two moments) and `exported` bytes of results, which are
    written before old ones go."""
    checkpoint = 3 * sum(parameter.nbytes for parameter in parameters.values())
    needed, free = (CHECKPOINTS_KEPT + 1) * checkpoint + exported, shutil.disk_usage(directory).free
    if needed > free:
        raise DataError(f"{directory} needs about {needed / 1e9:.1f} GB for checkpoints and results, "
                        f"its disk has {free / 1e9:.1f} GB free: make room, or choose another --out")


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
        ranks.wait_for_all()
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
        try:
            step, tensors = read_checkpoint(path, parameters)
        except CheckpointError as error:
            step, why = -1, error
        if not ranks.largest(int(step < 0), device):
            restore_(parameters, optimizer, tensors)
            ranks.on_first(lambda: prune(directory, found[max(i + 1 - CHECKPOINTS_KEPT, 0):]))
            return step
        print(f"checkpoint passed over, going back to the one before: "
              f"{why if step < 0 else f'{path} is damaged'}")
    return 0


def read_checkpoint(path: Path, parameters: dict[str, Tensor]) -> tuple[int, dict[str, Tensor]]:
    """Step and tensors of this rank's part of a checkpoint. CheckpointError when it is damaged or
    not complete, DataError when it was written by another number of ranks."""
    state, (part, parts) = read_json(path / "state.json"), own_part(parameters)
    step, written = state.get("step"), state.get("parts")
    if type(step) is not int or not 0 < step == step_of(path) or type(written) is not int or written < 1:
        raise CheckpointError(f"{path}/state.json is damaged (step {step!r:.20}, parts {written!r:.20})")
    if written != parts:
        raise DataError(f"{path} was written by {written} ranks with --shard, now there are {parts}: "
                        f"start as many, or start over with --fresh")
    try:
        tensors = load_file(path / f"state-{part}.safetensors")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}/state-{part}.safetensors cannot be read ({error})") from None
    for name, parameter in parameters.items():
        for kind, shape in {"weight": ranks.local(parameter).shape, "exp_avg": ranks.local(parameter).shape,
                            "exp_avg_sq": ranks.local(parameter).shape, "step": ()}.items():
            if f"{kind}.{name}" not in tensors or tensors[f"{kind}.{name}"].shape != shape:
                raise CheckpointError(f"{path}: {kind}.{name} is missing or has another shape")
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


def open_metrics(directory: Path, writer: bool):
    """metrics.jsonl to append to, line by line; nowhere for the ranks that do not write."""
    directory.mkdir(parents=True, exist_ok=True)
    return open(directory / "metrics.jsonl" if writer else os.devnull, "a", encoding="utf-8", buffering=1)


def write_metrics(log, metrics: dict, board=None) -> None:
    log.write(json.dumps(metrics) + "\n")
    if board is not None:
        for name, value in metrics.items():
            if isinstance(value, (int, float)) and name != "step":
                board.add_scalar(name, value, metrics["step"])


def open_board(directory: Path, wanted: bool, step: int):
    """TensorBoard's writer of the curves after `step`, or None when they are not wanted."""
    if not wanted:
        return None
    from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter(str(directory / "tensorboard"), purge_step=step)


def truncate_metrics(path: Path, done: int) -> None:
    """Keep the lines of steps 0 to `done`, none for -1: a killed run wrote further than its checkpoint,
    perhaps half a line. DataError when one of those is missing or damaged: nothing writes it again."""
    try:
        lines = path.read_bytes().split(b"\n")[:done + 1] if done >= 0 else []
        sound = [json.loads(line.decode())["step"] for line in lines] == list(range(done + 1))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        sound = False
    if not sound:
        raise DataError(f"{path} is damaged: not every step up to {done}, where the checkpoint is, "
                        f"has its line: start over with --fresh, or choose another --out")
    write_text(path, "".join(line.decode() + "\n" for line in lines))


# ---------------------------------------------------------------------------------------------------- exports

COPIED = (".json", ".jinja", ".model", ".txt")        # a base's tokenizer and generation files, its licence
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def save_adapter(model, directory: Path, base: str, targets: tuple[str, ...], rank: int, alpha: float,
                 template: str) -> None:
    """The LoRA factors in PEFT's layout, fp32: loads in PEFT and vLLM over the base model `base`. With them
    the chat template they were trained in, which a server of a base model has to be given."""
    tensors = {f"base_model.model.{name}.weight": parameter.detach().float().cpu().contiguous()
               for name, parameter in model.named_parameters() if ".lora_" in name}
    save_tensors(directory / "adapter_model.safetensors", tensors)
    write_json(directory / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank,
        "lora_alpha": alpha, "lora_dropout": 0.0, "target_modules": list(targets), "bias": "none",
        "fan_in_fan_out": False, "inference_mode": True, "modules_to_save": None, "use_rslora": False,
        "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}})
    write_text(directory / "chat_template.jinja", template)


def save_model(directory: Path, base, tokenizer, change, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """The base checkpoint (its directory) with change(parameter name, tensor) in the place of every tensor,
    as a whole Hugging Face directory. A tensor keeps the dtype it has in the base, and one that is
    not changed its bits."""
    _, weights, names = open_checkpoint(base)

    def tensor(name: str) -> Tensor:
        old = weights[names[name]]
        return change(name, old).detach().to("cpu", old.dtype).contiguous()
    save_sharded(directory, {name: weights[key].nbytes for name, key in names.items()}, tensor,
                 max_shard_bytes)
    for path in sorted(Path(base).iterdir()):
        if path.suffix in COPIED and not path.name.endswith(".index.json"):
            shutil.copyfile(path, directory / path.name)
    generation = directory / "generation_config.json"
    raw = read_json(generation) if generation.exists() else {"bos_token_id": tokenizer.bos_id}
    stops = sorted(tokenizer.stop_ids)
    write_json(generation, raw | {"eos_token_id": stops if len(stops) > 1 else stops[0]})
    # base models bring none: ours is what was trained
    write_text(directory / "chat_template.jinja", tokenizer.template)


def save_merged(directory: Path, base, adapter: Path, tokenizer,
                max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """save_model with the adapter's products added, in at least fp32."""
    updates = read_adapter(adapter, set(open_checkpoint(base)[2]))

    def change(name: str, old: Tensor) -> Tensor:
        return add_update(old, updates[name](), name) if name in updates else old
    save_model(directory, base, tokenizer, change, max_shard_bytes)


def save_delta(path: Path, base, parameters: dict[str, Tensor], named: str) -> None:
    """What training added to the base's tensors, in their dtype:
    a small file that `--adapter` takes over the base `named`."""
    _, weights, names = open_checkpoint(base)
    tensors = {}
    for name, parameter in parameters.items():
        old = weights[names[name]]
        tensors[name] = (parameter.detach().cpu() - old.to(parameter.dtype)).to(old.dtype)
    with writing(path):
        save_tensors(path, tensors, base_model_name_or_path=named)


@torch.no_grad()
def check_outputs(model, outputs: dict[Path, dict], ids: list[int], load=load) -> None:
    """Load what was written (`outputs`: path -> arguments of `load`, model's or ranks') and compare its
    logits of a text with the trained model's, on the same device in the same dtype. The model gives up its
    memory for that: it ends on the meta device."""
    tokens = torch.tensor([ids], device=model.head.device)
    device, dtype = model.head.device, model.compute_dtype or model.head.dtype
    expected = (model(tokens)[0] @ model.head.to(dtype).T).float().cpu()
    model.to("meta")
    for path, arguments in outputs.items():
        again = load(device=device, dtype=dtype, **arguments)
        found = (again(tokens)[0] @ again.head.T).float().cpu()
        difference = ((found - expected).norm() / expected.norm()).item()
        weights = open_weights(arguments["path"])
        stored = weights[next(iter(weights))].dtype
        if not difference < max(TOLERANCE[dtype], TOLERANCE[stored]):
            raise DataError(f"{path} was written, but its logits differ from the trained model's "
                            f"by {difference:.1e} of their size: do not use it, and report this")
        print(f"{path}: written, loaded again; "
              f"its logits differ from the trained model's by {difference:.1e} of their size")
