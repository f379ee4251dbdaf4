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
from model import (MAX_SHARD_BYTES, add_update, load, open_checkpoint, open_weights, read_adapter, read_json, save_sharded,
                   save_tensors)

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

COPIED = (".json", ".jinja", ".model", ".txt")        # a base's tokenizer and generation files, its licence
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def save_adapter(model, directory: Path, base: str, targets: tuple[str, ...], rank: int, alpha: float, template: str) -> None:
    """The LoRA factors in PEFT's layout, fp32: loads in PEFT and vLLM over the base model `base`. With them the chat template
    they were trained in, which a server of a base model has to be given."""
    tensors = {f"base_model.model.{name}.weight": parameter.detach().float().cpu().contiguous()
               for name, parameter in model.named_parameters() if ".lora_" in name}
    save_tensors(directory / "adapter_model.safetensors", tensors)
    write_json(directory / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank, "lora_alpha": alpha,
        "lora_dropout": 0.0, "target_modules": list(targets), "bias": "none", "fan_in_fan_out": False,
        "inference_mode": True, "modules_to_save": None, "use_rslora": False, "use_dora": False, "rank_pattern": {},
        "alpha_pattern": {}})
    write_text(directory / "chat_template.jinja", template)


def save_model(directory: Path, base, tokenizer, change, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """The base checkpoint (its directory) with change(parameter name, tensor) in the place of every tensor, as a whole Hugging
    Face directory. A tensor keeps the dtype it has in the base, and one that is not changed its bits."""
    _, weights, names = open_checkpoint(base)

    def tensor(name: str) -> Tensor:
        old = weights[names[name]]
        return change(name, old).detach().to("cpu", old.dtype).contiguous()
    save_sharded(directory, {name: weights[key].nbytes for name, key in names.items()}, tensor, max_shard_bytes)
    for path in sorted(Path(base).iterdir()):
        if path.suffix in COPIED and not path.name.endswith(".index.json"):
            shutil.copyfile(path, directory / path.name)
    generation = directory / "generation_config.json"
    raw = read_json(generation) if generation.exists() else {"bos_token_id": tokenizer.bos_id}
    stops = sorted(tokenizer.stop_ids)
    write_json(generation, raw | {"eos_token_id": stops if len(stops) > 1 else stops[0]})
    write_text(directory / "chat_template.jinja", tokenizer.template)        # base models bring none: ours is what was trained


def save_merged(directory: Path, base, adapter: Path, tokenizer, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """save_model with the adapter's products added, in at least fp32."""
    updates = read_adapter(adapter, set(open_checkpoint(base)[2]))

    def change(name: str, old: Tensor) -> Tensor:
        return add_update(old, updates[name](), name) if name in updates else old
    save_model(directory, base, tokenizer, change, max_shard_bytes)


def save_delta(path: Path, base, parameters: dict[str, Tensor], named: str) -> None:
    """What training added to the base's tensors, in their dtype: a small file that `--adapter` takes over the base `named`."""
    _, weights, names = open_checkpoint(base)
    tensors = {}
    for name, parameter in parameters.items():
        old = weights[names[name]]
        tensors[name] = (parameter.detach().cpu() - old.to(parameter.dtype)).to(old.dtype)
    save_tensors(path, tensors, base_model_name_or_path=named)


@torch.no_grad()
def check_outputs(model, outputs: dict[Path, dict], ids: list[int]) -> None:
    """Load what was written (`outputs`: path -> arguments of model.load) and compare its logits of a text with the trained
    model's, on the same device in the same dtype. The model gives up its memory for that: it ends on the meta device."""
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
            raise DataError(f"{path} was written, but its logits differ from the trained model's by {difference:.1e} of their "
                            f"size: do not use it, and report this")
        print(f"{path}: written, loaded again; its logits differ from the trained model's by {difference:.1e} of their size")
