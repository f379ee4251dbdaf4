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
from engine.files import InputError, as_kind, read_json, refuse_pointer, say_once, write_json
from formats.configs import positive

# what flags call the dtypes of tensors and sums, and what checkpoints call them
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
DTYPE_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES.values()}
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MAX_SHARD_BYTES = 5_000_000_000


# ------------------------------------------------------------------------------------------------ checkpoints

class Weights(Mapping):
    """The tensors of a checkpoint by name, read lazily through memory maps, and their `shapes`.

    Takes model.safetensors or, without it, the files that model.safetensors.index.json names and no others.
    No file stays open: a checkpoint takes no more memory than the tensors that somebody keeps. InputError
    when a file is missing, damaged, outside the directory, or does not hold what the index promises.
    """

    def __init__(self, directory):
        self.directory = Path(directory)
        index = self.directory / INDEX
        is_whole, is_sharded = (self.directory / WHOLE).is_file(), index.is_file()
        if not is_whole and not is_sharded:
            raise InputError(f"{directory} holds neither {WHOLE} nor {INDEX}: "
                             f"download the weights; {CONVERT}")
        if is_whole and is_sharded:                 # saving a model again whole leaves its old index behind
            say_once(f"{directory} holds {WHOLE} and an index of shards: "
                     f"{WHOLE} is read, as transformers does, and no shard")
        promised = {} if is_whole else read_index(index)
        self.where, self.shapes = {}, {}
        for name in sorted({*promised.values()}) or [WHOLE]:
            file = open_safetensors(self.directory / name)
            for key in file.keys():
                if promised.get(key, WHOLE) == name:
                    self.where[key] = name
                    self.shapes[key] = tuple(file.get_slice(key).get_shape())
        for key in promised.keys() - self.where.keys():
            raise InputError(f"{index} promises {key} in {promised[key]}, which does not hold it: "
                             f"download it again")

    def __getitem__(self, key: str) -> Tensor:
        tensor = open_safetensors(self.directory / self.where[key]).get_tensor(key)
        if tensor.dtype not in DTYPE_NAMES:
            raise InputError(f"{self.directory}: tensor {key} has dtype {tensor.dtype}: "
                             f"quantised checkpoints are not supported")
        return tensor

    def __contains__(self, key) -> bool:             # Mapping's own reads the tensor
        return key in self.where

    def __iter__(self):
        return iter(self.where)

    def __len__(self):
        return len(self.where)


def read_index(path: Path) -> dict[str, str]:
    """{tensor name: file name} of model.safetensors.index.json. InputError when it names other than
    safetensors files of its directory."""
    where = as_kind(read_json(path).get("weight_map"), dict, f"{path}: weight_map")
    for name in where.values():
        if Path(str(name)).name != name or not name.endswith(".safetensors"):
            raise InputError(f"{path} names {name!r}, which is not a safetensors file of its directory")
    return where


CONVERT = "of a .bin file, load it with transformers or PEFT: save_pretrained() writes safetensors"


def open_safetensors(path: Path):
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        if path.is_file():
            refuse_pointer(path, path.open("rb").read(1024))
        raise InputError(f"{path} is missing, damaged or not a safetensors file ({error}): "
                         f"download it again; {CONVERT}") from None


def check_depth(weights: Weights, layers: int) -> None:
    """InputError unless the last of so many layers is there."""
    last = f"model.layers.{layers - 1}.input_layernorm.weight"
    if last in weights:
        return
    found = [key for key in weights if key.endswith(last) or last.endswith("." + key)]
    also = f"; {found[0]} is there: save the model itself, not what is wrapped around it" if found else ""
    raise InputError(f"{weights.directory}: tensor {last} is missing, the last layer's of config.json{also}")


def match_names(weights: Weights, shapes: dict[str, tuple]) -> dict[str, str]:
    """Parameter name -> tensor name in the order of the files, for a model's parameters by name and shape.
    They are equal but for a tied head, which files hold under one or both names.

    InputError when the tensors are not exactly the parameters; old files' angles do not count.
    """
    names, tied = {name: name for name in shapes}, HEAD not in shapes
    if tied and HEAD in weights:
        if EMBEDDING not in weights:
            names[EMBEDDING] = HEAD
        elif not torch.equal(weights[EMBEDDING], weights[HEAD]):
            raise InputError(f"{weights.directory}: tie_word_embeddings is true, yet {EMBEDDING} and {HEAD} "
                             f"differ: if both were trained, write tie_word_embeddings false in config.json; "
                             f"if the head is a leftover, take {HEAD} out of the file")
    if not tied and HEAD not in weights:
        raise InputError(f"{weights.directory}: tie_word_embeddings is false, yet there is no {HEAD}: if the "
                         f"embedding is the head too, write tie_word_embeddings true in config.json")
    known = {*names.values(), HEAD if tied else None}
    check_none(weights, "is missing", [key for key in names.values() if key not in weights])
    check_none(weights, "is unknown to this architecture",
               [key for key in weights if key not in known and not key.endswith("rotary_emb.inv_freq")])
    for name, key in names.items():
        if weights.shapes[key] != shapes[name]:
            raise InputError(f"{weights.directory}: tensor {key} has shape {list(weights.shapes[key])}, "
                             f"config.json asks for {list(shapes[name])}")
    return dict(sorted(names.items(), key=lambda pair: weights.where[pair[1]]))


def check_none(weights: Weights, what: str, keys: list[str]) -> None:
    if keys:
        raise InputError(f"{weights.directory}: tensor {keys[0]} {what} ({len(keys)} in all): "
                         f"the weights do not belong to this config.json")


def save_sharded(directory: Path, sizes: dict[str, int], tensor: Callable[[str], Tensor]) -> None:
    """Write tensor(name) for every name of `sizes` (bytes), in files of at most MAX_SHARD_BYTES unless one
    tensor is larger, with an index if there are several. A file's tensors are made when it is written, so no
    more than those are in memory."""
    shards, size = [[]], 0
    for name, nbytes in sizes.items():
        if shards[-1] and size + nbytes > MAX_SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    where = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else WHOLE
        made = progress(names, desc=f"write {file}", unit="tensor", leave=False, delay=1)
        save_tensors(directory / file, {name: tensor(name) for name in made})
        where |= dict.fromkeys(names, file)
    if len(shards) > 1:
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

MERGE = "merge it with PEFT (merge_and_unload), and give that directory with --model"


def read_adapter(directory, weights: Weights, names: dict[str, str]) -> dict[str, Callable[[], Tensor]]:
    """{parameter name: function giving what is to be added to it} of a PEFT LoRA directory: scale B A
    (arXiv 2106.09685). names: parameter name -> its tensor in the base's `weights`. InputError when the
    adapter does not fit the base, or holds more than factors and copies of the base's tensors."""
    config = read_lora_config(Path(directory) / ADAPTER_CONFIG)
    file = open_safetensors(Path(directory) / ADAPTER_WEIGHTS)
    keys, updates = {*file.keys()}, {}
    for key in sorted(keys):
        module = key.removesuffix(LORA_A).removesuffix(LORA_B)
        name = module.removeprefix(PREFIX) + ".weight"
        if module == key:
            check_carried(file, key, weights, names, directory)
        elif not key.startswith(PREFIX):                       # PEFT would leave it out
            raise InputError(f"{directory}: {key} does not begin with {PREFIX}, as PEFT's tensors do")
        elif not {module + LORA_A, module + LORA_B} <= keys:
            raise InputError(f"{directory}: {key} is no factor of a pair lora_A, lora_B")
        elif name == HEAD and HEAD not in names:
            raise InputError(f"{directory} changes lm_head, which is the embedding "
                             f"(tie_word_embeddings): train it without lm_head in target_modules")
        elif name not in names:
            raise InputError(f"{directory}: {name} is no parameter of the model: "
                             f"another base model's adapter?")
        elif key.endswith(LORA_A):
            updates[name] = read_product(file, module, config, directory)
    if not updates:
        raise InputError(f"{directory}: {ADAPTER_WEIGHTS} holds no LoRA factors")
    return updates


def read_product(file, module: str, config: dict, where) -> Callable[[], Tensor]:
    """Function giving scale B A of a module. The scale is alpha / R, with rslora alpha / sqrt(R)."""
    A, B = read_finite(file, module + LORA_A, where), read_finite(file, module + LORA_B, where)
    layer = module.removeprefix(PREFIX)
    R = by_pattern(config["rank_pattern"], layer, config["r"])
    if A.ndim != 2 or B.ndim != 2 or not A.shape[0] == B.shape[1] == R:
        raise InputError(f"{where}: {module}: factors {list(B.shape)} x {list(A.shape)}, {ADAPTER_CONFIG} "
                         f"says rank {R}: files of different adapters?")
    alpha = by_pattern(config["alpha_pattern"], layer, config["lora_alpha"])
    return partial(lora_product, A, B, alpha / (math.sqrt(R) if config.get("use_rslora") else R))


def by_pattern(patterns: dict[str, float], layer: str, default: float) -> float:
    """The value of the first pattern that matches the end of a layer's name (peft.utils.get_pattern_key)."""
    found = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", layer))
    return next(found, default)


def check_carried(file, key: str, weights: Weights, names: dict[str, str], where) -> None:
    """InputError unless a tensor that is no factor is the base's own: PEFT writes the embedding and the head
    beside the factors when it thinks that they changed."""
    if ".lora_A." in key or ".lora_B." in key:
        raise InputError(f"{where}: {key} is no name that PEFT writes (…{LORA_A}, …{LORA_B}): "
                         f"save the adapter with PEFT's save_pretrained()")
    name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
    if name == HEAD and HEAD not in names:                     # a tied head
        name = EMBEDDING
    carried = read_finite(file, key, where)
    if name not in names or not torch.equal(carried, weights[names[name]].to(carried.dtype)):
        raise InputError(f"{where} carries {key}, trained or resized or of another kind; "
                         f"only LoRA factors are added to a base: {MERGE}")


def read_finite(file, key: str, where) -> Tensor:
    """A tensor of an adapter's file. InputError for one that no training gives."""
    tensor = file.get_tensor(key)
    if tensor.dtype not in DTYPE_NAMES or not tensor.isfinite().all():
        raise InputError(f"{where}: {key} ({tensor.dtype}) holds other than finite numbers: its training "
                         f"failed, or the file is damaged")
    return tensor


def read_lora_config(path: Path) -> dict:
    """adapter_config.json with PEFT's defaults. InputError when it says more than LoRA."""
    config = {"r": 8, "lora_alpha": 8} | read_json(path)
    if str(config.get("peft_type")).upper() != "LORA":
        raise InputError(f"{path}: peft_type is {config.get('peft_type')!r}, "
                         f"only LORA adapters are supported")
    for key, fine in ADAPTER_SETTINGS.items():
        if config.get(key) and config[key] not in fine:
            raise InputError(f"{path}: {key} = {config[key]!r} is not supported: {MERGE}")
    positive(path, config, "r")
    positive(path, config, "lora_alpha", float)
    for key in ("rank_pattern", "alpha_pattern"):
        config[key] = as_kind(config.get(key) or {}, dict, f"{path}: {key}")
        for pattern in config[key]:
            positive(f"{path}: {key}", config[key], pattern, float)
            try:
                re.compile(pattern)
            except re.error as error:
                raise InputError(f"{path}: {key}: {pattern!r} is no regular expression ({error})") from None
    return config


def adapter_base(directory) -> str:
    """The base model an adapter names: a path or a hub id. InputError when it names none."""
    config = read_json(Path(directory) / ADAPTER_CONFIG)
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(base, str) or not base:
        raise InputError(f"{directory} names no base model (base_model_name_or_path is {base!r}): "
                         f"say which with --model")
    if revision not in (None, "main"):
        raise InputError(f"{directory} names {base} at its revision {revision!r}: download that one, and "
                         f"give its directory with --model")
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


def read_tensors(weights: Weights, names: dict[str, str], adapter=None, rows=lambda name: slice(None)):
    """Yields (parameter name, tensor) in the order of the files, a PEFT adapter's product added to those that
    have one. rows(name): which rows of it are wanted."""
    updates = {} if adapter is None else read_adapter(adapter, weights, names)
    for name, key in progress(names.items(), desc="load", unit="tensor", leave=False, delay=1):
        wanted = rows(name)
        tensor = weights[key][wanted]
        if name in updates:
            tensor = add_update(tensor, updates[name]()[wanted], f"{adapter}: {name}")
        yield name, tensor
