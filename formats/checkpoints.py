"""Writing models and adapters for other tools, and comparing what was written with what was trained."""

import shutil
from pathlib import Path

import torch
from torch import Tensor

from engine import ranks
from engine.files import InputError, fill_directory, read_json, write_json, write_text
from formats.configs import config_dict
from formats.weights import (ADAPTER_CONFIG, ADAPTER_WEIGHTS, DTYPE_NAMES, PREFIX, Weights, add_update,
                             read_adapter, save_sharded, save_tensors)
from model import Llama, load, open_checkpoint

COPIED = (".json", ".jinja", ".model", ".txt")        # a base's tokenizer and generation files, its licence
MORE_TEMPLATES = "additional_chat_templates"          # transformers' folder of those beside the default one
# How far logits may be from the trained model's, by dtype, and where that has 16 bits, as a part of the way
# that training went: the further, the more rounding takes (docs/log.md has measured parts).
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
TOLERATED_PART = 0.25


def save(model: Llama, directory, dtype: torch.dtype = torch.float32) -> None:
    """Write config.json and the weights as `dtype` in Hugging Face layout."""
    directory = Path(directory)
    parameters = dict(model.named_parameters())
    write_json(directory / "config.json", config_dict(model.config) | {"torch_dtype": DTYPE_NAMES[dtype]})
    sizes = {name: parameter.numel() * dtype.itemsize for name, parameter in parameters.items()}
    save_sharded(directory, sizes, lambda name: parameters[name].detach().to("cpu", dtype).contiguous())


def save_adapter(model, directory: Path, base: str, targets: tuple[str, ...], rank: int, alpha: float,
                 template: str) -> None:
    """The LoRA factors in PEFT's layout, fp32: loads in PEFT and vLLM over the base model `base`. With them
    the chat template they were trained in, which a server of a base model has to be given."""
    tensors = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            tensors[f"{PREFIX}{name}.weight"] = parameter.detach().float().cpu().contiguous()
    save_tensors(directory / ADAPTER_WEIGHTS, tensors)
    write_json(directory / ADAPTER_CONFIG, {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "target_modules": list(targets),
        "r": rank,
        "lora_alpha": alpha,
        "inference_mode": True,
        # PEFT's defaults, which vLLM wants to read
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    })
    write_text(directory / "chat_template.jinja", template)


def save_model(directory: Path, base, tokenizer, change) -> None:
    """The base checkpoint (its directory) with change(parameter name, tensor) in the place of every tensor,
    as a whole Hugging Face directory. A tensor keeps the dtype it has in the base, and one that is
    not changed its bits."""
    _, weights, names = open_checkpoint(base)

    def tensor(name: str) -> Tensor:
        old = weights[names[name]]
        return change(name, old).detach().to("cpu", old.dtype).contiguous()
    sizes = {name: weights[key].nbytes for name, key in names.items()}
    save_sharded(directory, sizes, tensor)
    copy_settings(Path(base), directory)
    write_generation_config(directory, tokenizer)
    write_tokenizer_config(directory, tokenizer)


def save_merged(directory: Path, base, adapter: Path, tokenizer) -> None:
    """save_model with the adapter's products added, in at least fp32."""
    _, weights, names = open_checkpoint(base)
    updates = read_adapter(adapter, weights, names)

    def change(name: str, old: Tensor) -> Tensor:
        return add_update(old, updates[name](), name) if name in updates else old
    save_model(directory, base, tokenizer, change)


def merge_later(directory: Path, path: str, tokenizer, ids: list[int]) -> None:
    """What `export` with `merge` would have left of a method that ended without it: the whole model beside
    the adapter, loaded again and compared. Nothing where a model is."""
    merged, adapter = directory / "model", directory / "adapter"
    if merged.exists():
        return
    print(f"writing {merged}")
    fill_directory(merged, lambda at: save_merged(at, path, adapter, tokenizer))
    check_outputs(load(path, adapter=adapter), {merged: {"path": merged}}, ids)


def copy_settings(base: Path, directory: Path) -> None:
    """All of a checkpoint but its weights: config, tokenizer, every chat template, licence."""
    for path in sorted([*base.iterdir(), *base.glob(f"{MORE_TEMPLATES}/*.jinja")]):
        is_index = path.name.endswith(".index.json")
        if path.suffix in COPIED and path.is_file() and not is_index:
            copy = directory / path.relative_to(base)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)


def write_generation_config(directory: Path, tokenizer) -> None:
    """Every id that ends a reply goes in, whatever the base's own says."""
    path = directory / "generation_config.json"
    stops = sorted(tokenizer.stop_ids)
    config = read_json(path, missing={"bos_token_id": tokenizer.bos_id})
    write_json(path, config | {"eos_token_id": stops if len(stops) > 1 else stops[0]})


def write_tokenizer_config(directory: Path, tokenizer) -> None:
    """What makes other tools tokenise as it was trained: a template where the base brought none, and for a
    class that transformers 5 builds anew whether each stretch of text begins with a space ("legacy")."""
    path = directory / "tokenizer_config.json"
    config = read_json(path, missing={})
    if str(config.get("tokenizer_class")).startswith("LlamaTokenizer"):
        legacy = begins_with_space(read_json(directory / "tokenizer.json"))
        write_json(path, config | {"legacy": legacy})
    default = directory / "chat_template.jinja"
    more = directory / MORE_TEMPLATES
    if not (config.get("chat_template") or default.exists() or more.exists()):
        write_text(default, tokenizer.template)


def begins_with_space(tokenizer: dict) -> bool:
    """Whether a SentencePiece tokenizer.json puts a space before every stretch of text between special
    tokens, as Meta's code and transformers 4 do ("legacy"), and not before a text's start alone."""
    parts = [tokenizer.get(name) or {} for name in ("normalizer", "pre_tokenizer")]
    parts += parts[0].get("normalizers", []) + parts[1].get("pretokenizers", [])
    return any(part.get("type") == "Prepend" or part.get("prepend_scheme") == "always"
               for part in parts)


@torch.no_grad()
def logits_of(model, tokens: Tensor) -> Tensor:
    """(T, V) fp32 on the CPU, of tokens (1, T)."""
    hidden = model(tokens)[0]              # FSDP gathers a sharded head in here: it is read below, not before
    return (hidden @ model.head.to(hidden.dtype).T).float().cpu()


def distance(logits: Tensor, expected: Tensor) -> float:
    return ((logits - expected).norm() / expected.norm()).item()


@torch.no_grad()
def check_outputs(model, outputs: dict[Path, dict], ids: list[int], added=(), load=load) -> None:
    """Load what was written (`outputs`: path -> arguments of `load`, model's or ranks') and compare its
    logits of a text with the trained model's, on the same device in the same dtype. The model gives up its
    memory for that: it ends on the meta device. added: parameters without which it is the untrained one."""
    device = model.head.device
    dtype = model.compute_dtype
    tokens = torch.tensor([ids], device=device)
    expected = logits_of(model, tokens)
    for parameter in added:
        parameter.zero_()
    way = distance(logits_of(model, tokens), expected) if added else 0.0
    model.to("meta")
    for path, arguments in outputs.items():
        difference = distance(logits_of(load(device=device, dtype=dtype, **arguments), tokens), expected)
        stored = next(iter(Weights(arguments["path"]).values())).dtype
        allowed = max(TOLERANCE[dtype], TOLERANCE[stored])
        if dtype.itemsize == 2:
            allowed = max(allowed, TOLERATED_PART * way)
        finding = f"its logits differ from the trained model's by {difference:.1e} of their size"
        if way:
            finding += f" (the untrained model's by {way:.1e})"
        if not difference < allowed:
            raise InputError(f"{path} was written, but {finding}: do not use it, and report this")
        print(f"{path}: written, loaded again; {finding}")


def export(model, parameters: dict[str, Tensor], directory: Path, path: str, base: str, tokenizer,
           ids: list[int], lora: tuple | None, merge: bool, shard: bool) -> None:
    """The trained part in the layout other tools read: a PEFT adapter, and with `merge` or without LoRA a
    whole Hugging Face directory. Each is loaded again and compared with the model, which ends without memory.

    path: where the base model lies; base: its name. ids: a text to compare by. lora: (target modules, rank,
    alpha); None: weights learned.
    """
    adapter = directory / "adapter"
    merged = directory / "model"

    def write(output: Path, fill) -> None:
        ranks.on_first(lambda: fill_directory(output, fill))

    def trained(name: str, old: Tensor) -> Tensor:
        return ranks.full(parameters[name].detach()) if name in parameters else old
    print(f"writing the results to {directory}")
    if lora is None:
        if shard and ranks.rank() > 0:           # all ranks gather a sharded parameter, the first one writes
            _, _, names = open_checkpoint(path)
            for name in names:
                trained(name, None)
        write(merged, lambda at: save_model(at, path, tokenizer, trained))
        outputs = {merged: {"path": merged}}
    else:
        write(adapter, lambda at: save_adapter(model, at, base, *lora, tokenizer.template))
        outputs = {adapter: {"path": path, "adapter": adapter}}
        if merge:
            write(merged, lambda at: save_merged(at, path, adapter, tokenizer))
            outputs[merged] = {"path": merged}
    added = [parameter for name, parameter in parameters.items() if ".lora_B" in name]
    if shard:
        check_outputs(model, outputs, ids, added, ranks.load)
    else:
        ranks.on_first(lambda: check_outputs(model, outputs, ids, added))
