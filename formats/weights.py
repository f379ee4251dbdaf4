"""Tensors in files: safetensors checkpoints, whole or sharded, read lazily; LoRA adapters in PEFT's layout."""

import json
import math
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from engine.files import InputError, read_json
from formats.configs import positive

# what flags call the dtypes of tensors and sums, and what checkpoints call them
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
DTYPE_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES.values()}
MAX_SHARD_BYTES = 5_000_000_000
# Keys of adapter_config.json with all they may say.
# Anything else means more, or another base, than W + scale B A.
ADAPTER_SETTINGS = {
    "bias": ("none",), "init_lora_weights": (True, "gaussian", "orthogonal", "eva"), **dict.fromkeys((
        "use_dora", "fan_in_fan_out", "alpha_pattern", "modules_to_save", "lora_bias",
        "trainable_token_indices", "use_qalora", "use_bdlora", "layer_replication", "target_parameters",
        "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config"), ())}


class Weights(Mapping):
    """The tensors of a checkpoint by name, read lazily through memory maps.

    Takes model.safetensors, or the files that model.safetensors.index.json names and no others. One file
    is open at a time: read in the order of `where`'s files, a sharded checkpoint never holds more than a
    shard in memory. InputError when a file is missing, damaged, outside the directory, or does not
    hold what the index promises.
    """

    def __init__(self, directory):
        self.directory = Path(directory)
        single, index = self.directory / "model.safetensors", self.directory / "model.safetensors.index.json"
        if not self.directory.is_dir():
            raise InputError(f"{directory} is not a directory: "
                                  f"give a model directory in Hugging Face layout")
        if index.is_file():
            self.where = self.read_index(index)
        elif single.is_file():
            self.where = None
        else:
            raise InputError(
                f"{directory} holds neither model.safetensors nor model.safetensors.index.json: "
                f"download the weights, or convert .bin files to safetensors")
        self.opened, self.shapes = (None, None), {}
        for name in [single.name] if self.where is None else sorted(set(self.where.values())):
            file = open_safetensors(self.directory / name)
            for key in file.keys():
                self.shapes[key, name] = tuple(file.get_slice(key).get_shape())
        self.where = self.where or {key: name for key, name in self.shapes}
        for key, name in self.where.items():
            if (key, name) not in self.shapes:
                raise InputError(f"{index} promises {key} in {name}, which does not hold it: "
                                      f"download it again")

    def read_index(self, index: Path) -> dict:
        where = read_json(index).get("weight_map")
        if not isinstance(where, dict) or not where:
            raise InputError(f"{index} has no weight_map")
        for name in where.values():
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise InputError(f"{index} names {name!r}, "
                                      f"which is not a safetensors file of its directory")
        return where

    def __getitem__(self, key: str) -> Tensor:
        name = self.where[key]
        if self.opened[0] != name:
            self.opened = (None, None)                          # unmap the last file before the next one
            self.opened = (name, open_safetensors(self.directory / name))
        tensor = self.opened[1].get_tensor(key)
        if tensor.dtype not in DTYPE_NAMES:
            raise InputError(f"{self.directory}: tensor {key} has dtype {tensor.dtype}: "
                                  f"quantised checkpoints are not supported")
        return tensor

    def __contains__(self, key) -> bool:             # Mapping's own reads the tensor
        return key in self.where

    def shape(self, key: str) -> tuple[int, ...]:
        return self.shapes[key, self.where[key]]

    def __iter__(self):
        return iter(self.where)

    def __len__(self):
        return len(self.where)


def open_safetensors(path: Path):
    try:
        return safe_open(path, framework="pt", device="cpu")
    except FileNotFoundError:
        raise InputError(f"{path} is missing: download it again, "
                              f"or convert .bin files to safetensors") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged or not a safetensors file ({error}): "
                              f"download it again") from None


def open_weights(directory) -> Weights:
    return Weights(directory)


def save_sharded(directory: Path, sizes: dict[str, int], tensor: Callable[[str], Tensor],
                 max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write tensor(name) for every name of `sizes` (bytes), in files of at most max_shard_bytes unless one
    tensor is larger, with an index if there are several. A file's tensors are made when it is written, so no
    more than those are in memory."""
    shards, size = [[]], 0
    for name, nbytes in sizes.items():
        if shards[-1] and size + nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        files = ["model.safetensors"]
    for file, names in zip(files, shards):
        save_tensors(directory / file, {name: tensor(name) for name in names})
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())},
                 "weight_map": {name: file for file, names in zip(files, shards) for name in names}}
        (directory / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2) + "\n", encoding="utf-8")


def save_tensors(path: Path, tensors: dict[str, Tensor], **metadata: str) -> None:
    """Write to a temporary name, then rename: a kill leaves the old file or the new one.
    Readers want format: pt."""
    temporary = path.with_name(path.name + ".tmp")
    save_file(tensors, temporary, metadata={"format": "pt", **metadata})
    os.replace(temporary, path)


def read_adapter(path, parameters: set[str]) -> dict[str, Callable[[], Tensor]]:
    """{parameter name: function giving what is to be added to it}, of a PEFT LoRA directory (scale B A, arXiv
    2106.09685) or of an attn_delta.safetensors file. InputError when it does not fit the parameters."""
    if Path(path).suffix == ".safetensors":
        file = open_delta(Path(path))
        return {known(key, parameters, path): partial(read_update, file, key, path) for key in file.keys()}
    raw = read_lora_config(Path(path) / "adapter_config.json")
    file = open_safetensors(Path(path) / "adapter_model.safetensors")
    keys, updates = set(file.keys()), {}
    for key in sorted(keys):
        module = key.removesuffix(".lora_A.weight").removesuffix(".lora_B.weight")
        pair = (module + ".lora_A.weight", module + ".lora_B.weight")
        if not keys.issuperset(pair):
            raise InputError(f"{path}: {key} is no factor of a pair lora_A, lora_B")
        if key == pair[0]:
            name = known(module.removeprefix("base_model.model.") + ".weight", parameters, path)
            A, B = (read_update(file, factor, path) for factor in pair)
            if A.ndim != 2 or B.ndim != 2 or not A.shape[0] == B.shape[1] > 0:
                raise InputError(f"{path}: {module}: factors {list(B.shape)} x {list(A.shape)} "
                                      f"do not fit each other: write the adapter again")
            R = A.shape[0]
            updates[name] = partial(lora_product, A, B,
                                    raw["lora_alpha"] / (math.sqrt(R) if raw.get("use_rslora") else R))
    if not updates:
        raise InputError(f"{path}: adapter_model.safetensors holds no LoRA factors")
    return updates


def open_delta(path: Path):
    """The file that save_delta wrote. InputError for a whole model, which added to another one's
    weights would fit them."""
    file = open_safetensors(path)
    other = [key for key in file.keys() if ".self_attn." not in key or "_proj." not in key]
    why = (f"holds {other[0]}" if other else "holds no tensors" if not file.keys() else
           "names no base model" if "base_model_name_or_path" not in (file.metadata() or {}) else None)
    if why:
        raise InputError(f"{path} {why}: it is not the difference of attention's weights that "
                              f"clo.py --train attention writes; a whole model is given by its directory, "
                              f"with --model")
    return file


def read_update(file, key: str, path) -> Tensor:
    """A tensor of an adapter's file. InputError for one that no training gives."""
    tensor = file.get_tensor(key)
    if tensor.dtype not in DTYPE_NAMES:
        raise InputError(f"{path}: {key} has dtype {tensor.dtype}, only "
                              f"{', '.join(DTYPE_NAMES.values())} are supported: write the adapter again")
    if not tensor.isfinite().all():
        raise InputError(f"{path}: {key} holds NaN or infinite numbers: its training failed, "
                              f"or the file is damaged")
    return tensor


def known(name: str, parameters: set[str], path) -> str:
    if name not in parameters:
        raise InputError(f"{path}: {name} is no parameter of the model: another base model's adapter?")
    return name


def read_lora_config(path: Path) -> dict:
    raw = {"lora_alpha": 8} | read_json(path)
    if str(raw.get("peft_type")).upper() != "LORA":
        raise InputError(f"{path}: peft_type is {raw.get('peft_type')!r}, "
                              f"only LORA adapters are supported")
    for key, fine in ADAPTER_SETTINGS.items():
        if raw.get(key) and raw[key] not in fine:
            raise InputError(f"{path}: {key} = {raw[key]!r} is not supported")
    positive(path, raw, "lora_alpha", kind=float)
    return raw


def adapter_base(path) -> str:
    """The base model an adapter names: a path or a hub id. InputError when it names none."""
    raw = (open_delta(Path(path)).metadata() if Path(path).suffix == ".safetensors"
           else read_json(Path(path) / "adapter_config.json"))
    base = raw.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise InputError(f"{path} names no base model (base_model_name_or_path is {base!r}): "
                              f"say which with --model")
    return base


def lora_product(A: Tensor, B: Tensor, scale: float) -> Tensor:
    """scale B A, in at least fp32; A (R, in), B (out, R)."""
    wide = torch.promote_types(A.dtype, torch.float32)
    return scale * (B.to(wide) @ A.to(wide))


def add_update(weight: Tensor, update: Tensor, where: str) -> Tensor:
    """W + update, in at least fp32."""
    if weight.shape != update.shape:
        raise InputError(f"{where}: an update of shape {list(update.shape)} does not fit the weight "
                              f"{list(weight.shape)}: another base model's adapter?")
    wide = torch.promote_types(weight.dtype, torch.float32)
    return weight.to(wide) + update.to(wide)
