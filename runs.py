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

from data import DataError
from model import DTYPE_NAMES, read_json, save, save_tensors

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
    temporary = path.with_name(path.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    fill(temporary)
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
    """Of config.json and the names, sizes and modification times of the weight files (hashing 16 GB takes a minute)."""
    directory = Path(directory)
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns)
             for path in sorted(directory.glob("*.safetensors"))]
    return fingerprint(directory / "config.json", files)


def open_run(directory, flags: dict, inputs: dict, fresh: bool = False) -> Path:
    """The run directory for these flags and inputs: made, or taken up again when config.json says the same.

    DataError, naming the first difference, when it belongs to another run; nothing in it is touched then.
    """
    directory = Path(directory)
    config = {"flags": flags, "inputs": inputs, "seed": flags["seed"],
              "versions": {"python": platform.python_version(), "torch": torch.__version__}}
    path = directory / "config.json"
    if fresh and path.exists():
        shutil.rmtree(directory)
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


# ----------------------------------------------------------------------------------------------- reference log-probs

def load_reference(run: Path, key: str, sizes: list[int]) -> list[Tensor] | None:
    """Summed log-probs (S,) per micro-batch from the cache file of this key; None when there is none, or it is damaged or of
    other sizes: then they are computed again, never trusted."""
    try:
        flat = load_file(run / "reference" / f"{key}.safetensors")["logp"]
    except (FileNotFoundError, SafetensorError, KeyError):
        return None
    return list(flat.split(sizes)) if flat.numel() == sum(sizes) else None


def save_reference(run: Path, key: str, sums: list[Tensor]) -> None:
    path = run / "reference" / f"{key}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, {"logp": torch.cat(sums)})


# -------------------------------------------------------------------------------------------------------- checkpoints

def save_checkpoint(directory: Path, step: int, parameters: dict[str, Tensor], optimizer) -> None:
    """Everything the next step depends on: fp32 trainables, AdamW's two moments, the step. Keeps the last two."""
    tensors = {}
    for name, parameter in parameters.items():
        tensors[f"weight.{name}"] = parameter.detach().cpu().contiguous()
        for moment, value in optimizer.state[parameter].items():
            tensors[f"{moment}.{name}"] = value.detach().cpu().contiguous()

    def fill(temporary: Path) -> None:
        save_tensors(temporary / "state.safetensors", tensors)
        write_json(temporary / "state.json", {"step": step})
    fill_directory(directory / f"step-{step:06d}", fill)
    for old in sorted(directory.glob("step-*[0-9]"))[:-CHECKPOINTS_KEPT]:
        shutil.rmtree(old)


def load_checkpoint(directory: Path, parameters: dict[str, Tensor], optimizer) -> int:
    """Restore the newest checkpoint into parameters and optimiser; the number of steps done (0 without one)."""
    found = sorted(directory.glob("step-*[0-9]"))
    if not found:
        return 0
    tensors = load_file(found[-1] / "state.safetensors")
    for name, parameter in parameters.items():
        with torch.no_grad():
            parameter.copy_(tensors[f"weight.{name}"])
        optimizer.state[parameter] = {moment: tensors[f"{moment}.{name}"].to(parameter.device)
                                      for moment in ("step", "exp_avg", "exp_avg_sq")}
        if not optimizer.defaults["fused"]:                       # AdamW counts steps on the CPU unless it is fused
            optimizer.state[parameter]["step"] = optimizer.state[parameter]["step"].cpu()
    return json.loads((found[-1] / "state.json").read_text())["step"]


def open_metrics(directory: Path, writer: bool):
    """metrics.jsonl to append to, line by line; nowhere for the ranks that do not write."""
    directory.mkdir(parents=True, exist_ok=True)
    return open(directory / "metrics.jsonl" if writer else os.devnull, "a", encoding="utf-8", buffering=1)


def write_metrics(log, metrics: dict) -> None:
    log.write(json.dumps(metrics) + "\n")


def truncate_metrics(path: Path, steps: int) -> None:
    """Drop the lines past step `steps` (a killed run wrote further than its checkpoint) and a half-written last one."""
    if path.exists():
        lines = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= steps:
                    lines.append(line + "\n")
            except json.JSONDecodeError:
                break
        write_text(path, "".join(lines))


# ------------------------------------------------------------------------------------------------------------ exports

def save_adapter(model, directory: Path, base: str, targets: tuple[str, ...], rank: int, alpha: float) -> None:
    """The LoRA factors in PEFT's layout, fp32: loads in PEFT and vLLM over the base model `base`."""
    tensors = {f"base_model.model.{name}.weight": parameter.detach().float().cpu().contiguous()
               for name, parameter in model.named_parameters() if ".lora_" in name}
    save_tensors(directory / "adapter_model.safetensors", tensors)
    write_json(directory / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank, "lora_alpha": alpha,
        "lora_dropout": 0.0, "target_modules": list(targets), "bias": "none", "fan_in_fan_out": False,
        "inference_mode": True, "modules_to_save": None, "use_rslora": False, "use_dora": False, "rank_pattern": {},
        "alpha_pattern": {}})


def save_model(model, directory: Path, base: str) -> None:
    """The whole model in the base's dtype, with the base's tokenizer and generation files: opens as the base does."""
    raw = read_json(Path(base) / "config.json")
    name = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    dtype = {text: dtype for dtype, text in DTYPE_NAMES.items()}.get(name, torch.float32)
    save(model, directory, dtype)
    for path in sorted(Path(base).glob("*")):
        if path.suffix in (".json", ".jinja", ".model") and not path.name.endswith(".index.json"):
            shutil.copyfile(path, directory / path.name)
