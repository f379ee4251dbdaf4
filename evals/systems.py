"""Which model an evaluation looks at, and where its results lie."""

import re
from pathlib import Path

import torch

import model as llama
from engine.files import fingerprint
from evals.answers import HASH_DIGITS
from formats import hub
from formats.chat import Tokenizer, load_tokenizer
from formats.weights import DTYPES, adapter_base, read_adapter

DEFAULT_MODEL = "demo/llama"
LONGEST_NAME = 120          # characters of a directory's name; file systems hold 255 bytes


def find_base(model: str | None, adapter: str | None) -> str:
    """The checkpoint that --model or else the adapter names."""
    if model or not adapter:
        return model or DEFAULT_MODEL
    return adapter_base(adapter)


def check_system(base: str, adapter: str | None) -> None:
    """Fetch what is not on this machine, and refuse a checkpoint or an adapter that will not load, before
    hours of other work."""
    directory = hub.local(base)
    load_tokenizer(directory)
    _, weights, names = llama.open_checkpoint(directory)
    if adapter:
        read_adapter(adapter, weights, names)


def compute_dtype(dtype: str, device: str) -> str:
    if dtype != "auto":
        return dtype
    return "bf16" if device.startswith("cuda") else "fp32"


def open_model(model: str | None, adapter: str | None, device: str, dtype: str,
               template_args: str | None = None) -> tuple[llama.Llama, Tokenizer, dict]:
    """The model that --model and --adapter name, its tokenizer,
    and the settings that stand beside its numbers."""
    base, dtype = find_base(model, adapter), compute_dtype(dtype, device)
    tokenizer = load_tokenizer(hub.local(base), template_args)
    print(f"loading {base}{f' with {adapter}' if adapter else ''}: {dtype} on {device}", flush=True)
    loaded = llama.load(base, device, DTYPES[dtype], adapter)
    settings = {
        "model": str(base),
        "model hash": weights_hash(hub.local(base)),
        "adapter": adapter,
        "adapter hash": adapter and weights_hash(Path(adapter)),
        "tokenizer and template": tokenizer.fingerprint[:HASH_DIGITS],
        "template_args": template_args,
        "dtype": dtype,
        "device": device,
        "torch": torch.__version__}
    return loaded, tokenizer, settings


def weights_hash(path: Path) -> str:
    """Of the contents of a checkpoint's or adapter's weight files."""
    return fingerprint(*sorted(path.glob("*.safetensors")))[:HASH_DIGITS]


def out_directory(system: str | None, *names: str) -> Path:
    """runs/eval/NAMES-SYSTEM: one directory for each evaluation of each model or adapter."""
    name = Path(system or DEFAULT_MODEL).as_posix().strip("./")
    return Path("runs/eval") / directory_name(*names, name)


def directory_name(*names: str) -> str:
    """The names that say something, joined; a long one is cut and gets a hash."""
    name = re.sub(r"[\s/]+", "-", "-".join(filter(None, names)))
    if len(name) > LONGEST_NAME:
        name = f"{name[:LONGEST_NAME]}-{fingerprint(name)[:6]}"
    return name
