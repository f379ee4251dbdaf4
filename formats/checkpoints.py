"""Writing models and adapters for other tools, and comparing what was written with what was trained."""

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor

from engine.files import InputError, read_json, write_json, write_text, writing
from formats.configs import config_dict
from formats.weights import (DTYPE_NAMES, MAX_SHARD_BYTES, add_update, open_weights, read_adapter,
                             save_sharded, save_tensors)
from model import Llama, load, open_checkpoint

COPIED = (".json", ".jinja", ".model", ".txt")        # a base's tokenizer and generation files, its licence
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def save(model: Llama, directory, dtype: torch.dtype = torch.float32,
         max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write config.json and the weights as `dtype` in Hugging Face layout."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    raw = {**config_dict(model.config), "torch_dtype": DTYPE_NAMES[dtype]}
    (directory / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    parameters = dict(model.named_parameters())
    save_sharded(directory,
                 {name: parameter.numel() * dtype.itemsize for name, parameter in parameters.items()},
                 lambda name: parameters[name].detach().to("cpu", dtype).contiguous(), max_shard_bytes)


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


def save_model(directory: Path | None, base, tokenizer, change, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """The base checkpoint (its directory) with change(parameter name, tensor) in the place of every tensor,
    as a whole Hugging Face directory. A tensor keeps the dtype it has in the base, and one that is
    not changed its bits. Without a directory change() is called alone: a rank takes part in gathering what
    another one writes."""
    _, weights, names = open_checkpoint(base)
    if directory is None:
        for name in names:
            change(name, weights[names[name]])
        return

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
    device, dtype = model.head.device, model.compute_dtype
    expected = (model(tokens)[0] @ model.head.to(dtype).T).float().cpu()
    model.to("meta")
    for path, arguments in outputs.items():
        again = load(device=device, dtype=dtype, **arguments)
        found = (again(tokens)[0] @ again.head.T).float().cpu()
        difference = ((found - expected).norm() / expected.norm()).item()
        weights = open_weights(arguments["path"])
        stored = weights[next(iter(weights))].dtype
        if not difference < max(TOLERANCE[dtype], TOLERANCE[stored]):
            raise InputError(f"{path} was written, but its logits differ from the trained model's "
                            f"by {difference:.1e} of their size: do not use it, and report this")
        print(f"{path}: written, loaded again; "
              f"its logits differ from the trained model's by {difference:.1e} of their size")
