"""Tensors in files: safetensors, whole or sharded, read lazily; LoRA adapters in PEFT's layout."""

import math
import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from engine.progress import progress
from engine.files import InputError, read_json, say_once, write_json
from formats.configs import positive

# what flags call the dtypes of tensors and sums, and what checkpoints call them
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
DTYPE_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES.values()}
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MAX_SHARD_BYTES = 5_000_000_000


# ------------------------------------------------------------------------------------------------ checkpoints

class Weights(Mapping):
    """The tensors of a checkpoint by name, read lazily through memory maps.

    Takes model.safetensors or, without it, the files that model.safetensors.index.json names and no others.
    One file is open at a time: read in the order of `where`'s files, a sharded checkpoint never holds more
    than a shard in memory. InputError when a file is missing, damaged, outside the directory, or does not
    hold what the index promises.
    """

    def __init__(self, directory):
        self.directory = Path(directory)
        index = self.directory / INDEX
        self.where = None if self.is_whole() else read_index(index)
        self.opened, self.shapes = (None, None), {}
        for name in [WHOLE] if self.where is None else sorted(set(self.where.values())):
            file = open_safetensors(self.directory / name)
            for key in file.keys():
                self.shapes[key, name] = tuple(file.get_slice(key).get_shape())
        self.where = self.where or {key: name for key, name in self.shapes}
        for key, name in self.where.items():
            if (key, name) not in self.shapes:
                raise InputError(f"{index} promises {key} in {name}, which does not hold it: "
                                 f"download it again")

    def is_whole(self) -> bool:
        """Whether one file holds all. It comes first, as in transformers: saving a model again whole leaves
        the index of its old shards behind."""
        whole, index = ((self.directory / name).is_file() for name in (WHOLE, INDEX))
        if whole and index:
            say_once(f"{self.directory} holds {WHOLE} and an index of shards: "
                     f"{WHOLE} is read, as transformers does, and no shard")
        if not whole and not index:
            raise InputError(f"{self.directory} holds neither {WHOLE} nor {INDEX}: "
                             f"download the weights, or convert .bin files to safetensors")
        return whole

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


def read_index(path: Path) -> dict[str, str]:
    """{tensor name: file name} of model.safetensors.index.json. InputError when it names other than
    safetensors files of its directory."""
    where = read_json(path).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise InputError(f"{path} has no weight_map: download it again")
    for name in where.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(f"{path} names {name!r}, which is not a safetensors file of its directory")
    return where


def open_safetensors(path: Path):
    try:
        return safe_open(path, framework="pt", device="cpu")
    except FileNotFoundError:
        raise InputError(f"{path} is missing: download it again, "
                         f"or convert .bin files to safetensors") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged or not a safetensors file ({error}): "
                         f"download it again") from None


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
    if len(shards) == 1:
        save_tensors(directory / WHOLE, {name: tensor(name) for name in sizes})
        return
    where = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        made = progress(names, desc=f"write {file}", unit="tensor", leave=False, delay=1)
        save_tensors(directory / file, {name: tensor(name) for name in made})
        where |= dict.fromkeys(names, file)
    write_json(directory / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where})


def save_tensors(path: Path, tensors: dict[str, Tensor], **metadata: str) -> None:
    """Write to a temporary name, then rename: a kill leaves the old file or the new one.
    Readers want format: pt."""
    temporary = path.with_name(path.name + ".tmp")
    save_file(tensors, temporary, metadata={"format": "pt", **metadata})
    mask = os.umask(0)                       # asking for it sets it
    os.umask(mask)
    temporary.chmod(0o666 & ~mask)           # safetensors lets only the owner read: no server could
    os.replace(temporary, path)


# --------------------------------------------------------------------------------------------------- adapters

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, LORA_A, LORA_B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
# Keys of adapter_config.json with all they may say.
# Anything else means more, or another base, than W + scale B A.
ADAPTER_SETTINGS = {
    "bias": ("none",), "init_lora_weights": (True, "gaussian", "orthogonal", "eva"), **dict.fromkeys((
        "use_dora", "fan_in_fan_out", "lora_bias", "trainable_token_indices", "use_qalora", "use_bdlora",
        "layer_replication", "target_parameters", "alora_invocation_tokens", "arrow_config", "kasa_config",
        "monteclora_config"), ())}


def read_adapter(directory, weights: Weights, names: dict[str, str]) -> dict[str, Callable[[], Tensor]]:
    """{parameter name: function giving what is to be added to it} of a PEFT LoRA directory: scale B A
    (arXiv 2106.09685). names: parameter name -> its tensor in the base's `weights`. InputError when the
    adapter does not fit the base, or holds more than factors and copies of the base's tensors."""
    config = read_lora_config(Path(directory) / ADAPTER_CONFIG)
    file = open_safetensors(Path(directory) / ADAPTER_WEIGHTS)
    keys, updates = set(file.keys()), {}
    for key in sorted(keys):
        module = key.removesuffix(LORA_A).removesuffix(LORA_B)
        if module == key:
            check_carried(file, key, weights, names, directory)
        elif not keys.issuperset((module + LORA_A, module + LORA_B)):
            raise InputError(f"{directory}: {key} is no factor of a pair lora_A, lora_B")
        elif key == module + LORA_A:
            layer = module.removeprefix(PREFIX)
            if layer + ".weight" not in names:
                raise InputError(f"{directory}: {layer}.weight is no parameter of the model: "
                                 f"another base model's adapter?")
            updates[layer + ".weight"] = read_product(file, module, config, directory)
    if not updates:
        raise InputError(f"{directory}: {ADAPTER_WEIGHTS} holds no LoRA factors")
    return updates


def read_product(file, module: str, config: dict, where) -> Callable[[], Tensor]:
    """Function giving scale B A of a module. The scale is alpha / R, with rslora alpha / sqrt(R)."""
    A, B = (read_finite(file, module + factor, where) for factor in (LORA_A, LORA_B))
    if A.ndim != 2 or B.ndim != 2 or not A.shape[0] == B.shape[1] > 0:
        raise InputError(f"{where}: {module}: factors {list(B.shape)} x {list(A.shape)} "
                         f"do not fit each other: write the adapter again")
    R, layer = A.shape[0], module.removeprefix(PREFIX)
    rank = by_pattern(config["rank_pattern"], layer, config["r"])
    if R != rank:
        raise InputError(f"{where}: {module}: factors of rank {R}, {ADAPTER_CONFIG} says {rank}: "
                         f"files of different adapters?")
    alpha = by_pattern(config["alpha_pattern"], layer, config["lora_alpha"])
    return partial(lora_product, A, B, alpha / (math.sqrt(R) if config.get("use_rslora") else R))


def by_pattern(patterns: dict[str, float], layer: str, default: float) -> float:
    """The value of the first pattern that matches the end of a layer's name (peft.utils.get_pattern_key)."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return default


def check_carried(file, key: str, weights: Weights, names: dict[str, str], where) -> None:
    """InputError unless a tensor that is no factor is the base's own: PEFT writes the embedding and the head
    beside the factors when it thinks that they changed."""
    name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
    if name == HEAD and HEAD not in names:                     # a tied head
        name = EMBEDDING
    if name not in names:
        raise InputError(f"{where}: {key} is no factor of a pair lora_A, lora_B")
    carried, base = read_finite(file, key, where), weights[names[name]]
    if carried.shape != base.shape or not torch.equal(carried, base.to(carried.dtype)):
        raise InputError(f"{where} carries {key}, trained or resized; only LoRA factors are added to a base: "
                         f"merge it with PEFT (merge_and_unload), and give that directory with --model")


def read_finite(file, key: str, where) -> Tensor:
    """A tensor of an adapter's file. InputError for one that no training gives."""
    tensor = file.get_tensor(key)
    if tensor.dtype not in DTYPE_NAMES:
        raise InputError(f"{where}: {key} has dtype {tensor.dtype}, only "
                         f"{', '.join(DTYPE_NAMES.values())} are supported: write the adapter again")
    if not tensor.isfinite().all():
        raise InputError(f"{where}: {key} holds NaN or infinite numbers: its training failed, "
                         f"or the file is damaged")
    return tensor


def read_lora_config(path: Path) -> dict:
    """adapter_config.json with PEFT's defaults. InputError when it says more than LoRA."""
    config = {"r": 8, "lora_alpha": 8} | read_json(path)
    if str(config.get("peft_type")).upper() != "LORA":
        raise InputError(f"{path}: peft_type is {config.get('peft_type')!r}, "
                         f"only LORA adapters are supported")
    for key, fine in ADAPTER_SETTINGS.items():
        if config.get(key) and config[key] not in fine:
            raise InputError(f"{path}: {key} = {config[key]!r} is not supported")
    positive(path, config, "r")
    positive(path, config, "lora_alpha", float)
    for key in ("rank_pattern", "alpha_pattern"):
        config[key] = config.get(key) or {}
        check_patterns(path, key, config[key])
    return config


def check_patterns(path: Path, key: str, patterns) -> None:
    if not isinstance(patterns, dict):
        raise InputError(f"{path}: {key} is {patterns!r}, an object was expected")
    for pattern in patterns:
        positive(f"{path}: {key}", patterns, pattern, float)
        try:
            re.compile(pattern)
        except re.error as error:
            raise InputError(f"{path}: {key}: {pattern!r} is no regular expression ({error})") from None


def adapter_base(directory) -> str:
    """The base model an adapter names: a path or a hub id. InputError when it names none."""
    base = read_json(Path(directory) / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise InputError(f"{directory} names no base model (base_model_name_or_path is {base!r}): "
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
