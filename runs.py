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

import hashlib
import json
import os
import platform
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


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def fill_directory(path: Path, fill) -> None:
    """Call fill(temporary directory), then put it in the place of `path`."""
    temporary = empty_directory(path.with_name(path.name + ".tmp"))
    fill(temporary)
    put_in_place(temporary, path)


def empty_directory(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def put_in_place(temporary: Path, path: Path) -> None:
    """Rename a directory, over another one if need be;
    a kill in between leaves the new one or none, never half of one."""
    if path.exists():
        old = path.with_name(path.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)
        os.replace(temporary, path)
        shutil.rmtree(old)
    else:
        os.replace(temporary, path)


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
    With `resume` there has to be a run.
    """
    directory = Path(directory)
    config = {"flags": flags, "inputs": inputs, "seed": flags["seed"],
              "versions": {"python": platform.python_version(), "torch": torch.__version__}}
    path = directory / "config.json"
    if fresh and path.exists():
        shutil.rmtree(directory)
    if resume and not path.exists():
        raise DataError(f"--resume: {directory} holds no run to go on with: "
                        f"see --out, or leave --resume out to start one")
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError):
            raise DataError(f"{path} is damaged: start over with --fresh, or choose another --out") from None
        for part in ("flags", "inputs"):
            for key in {**before.get(part, {}), **config[part]}:
                old, new = before.get(part, {}).get(key), config[part].get(key)
                if old != new:
                    raise DataError(f"{directory} belongs to a run with {key} = {old!r}, now it is {new!r}: "
                                    f"choose another --out, or start over with --fresh")
        print(f"{directory} is there with the same settings: going on where it stopped (--fresh starts over)")
        return directory
    if directory.exists() and any(directory.iterdir()):
        raise DataError(f"{directory} is not empty and holds no run: choose another --out")
    try:
        write_json(path, config)
    except OSError as error:
        raise DataError(f"cannot write to {directory} ({error.strerror}): choose another --out") from None
    return directory


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
    """Summed log-probs (S,) per micro-batch from the cache file of this key; None when there is none,
    or it is damaged or of other sizes: then they are computed again, never trusted."""
    try:
        flat = load_file(run / "reference" / f"{key}.safetensors")["logp"]
    except (FileNotFoundError, SafetensorError, KeyError):
        return None
    return list(flat.split(sizes)) if flat.numel() == sum(sizes) else None


def save_reference(run: Path, key: str, sums: list[Tensor]) -> None:
    path = run / "reference" / f"{key}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, {"logp": torch.cat(sums)})


# ------------------------------------------------------------------------------------------------ checkpoints

def save_checkpoint(directory: Path, step: int, parameters: dict[str, Tensor], optimizer) -> None:
    """Everything the next step depends on: fp32 trainables, AdamW's two moments, the step. All ranks call
    this; the first one writes, or each its own part where parameters are sharded. Keeps the last two."""
    path = directory / f"step-{step:06d}"
    temporary = path.with_name(path.name + ".tmp")
    ranks.on_first(lambda: empty_directory(temporary))
    part, parts = own_part(parameters)
    if parts > 1 or ranks.rank() == 0:
        save_tensors(temporary / f"state-{part}.safetensors", state_tensors(parameters, optimizer))
    ranks.wait_for_all()

    def finish() -> None:
        write_json(temporary / "state.json", {"step": step, "parts": parts})
        put_in_place(temporary, path)
        kept = checkpoints(directory)[-CHECKPOINTS_KEPT:]
        for old in set(directory.glob("step-*")) - set(kept):         # and what a kill left behind
            shutil.rmtree(old)
    ranks.on_first(finish)


def checkpoints(directory: Path) -> list[Path]:
    """Oldest first."""
    return sorted(directory.glob("step-*[0-9]"), key=lambda path: int(path.name.removeprefix("step-")))


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
    device = next(iter(parameters.values())).device
    for path in reversed(checkpoints(directory)):
        try:
            step, tensors = read_checkpoint(path, parameters)
        except CheckpointError as error:
            step, why = -1, error
        if not ranks.largest(int(step < 0), device):
            restore_(parameters, optimizer, tensors)
            return step
        print(f"checkpoint passed over, going back to the one before: "
              f"{why if step < 0 else f'{path} is damaged'}")
    return 0


def read_checkpoint(path: Path, parameters: dict[str, Tensor]) -> tuple[int, dict[str, Tensor]]:
    """Step and tensors of this rank's part of a checkpoint. CheckpointError when it is damaged or
    not complete, DataError when it was written by another number of ranks."""
    state, (part, parts) = read_json(path / "state.json"), own_part(parameters)
    if state.get("parts") != parts and isinstance(state.get("parts"), int):
        raise DataError(f"{path} was written by {state['parts']} ranks with --shard, now there are {parts}: "
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
    if not isinstance(state.get("step"), int):
        raise CheckpointError(f"{path}/state.json names no step")
    return state["step"], tensors


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


def truncate_metrics(path: Path, steps: int) -> None:
    """Drop the lines past step `steps` (a killed run wrote further than its checkpoint)
    and a half-written last one."""
    if path.exists():
        lines = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= steps:
                    lines.append(line + "\n")
            except json.JSONDecodeError:
                break
        write_text(path, "".join(lines))


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
