"""Which model an evaluation looks at, where its results lie, and how they get there."""

import re
from pathlib import Path

import torch

import model as llama
from engine.files import (InputError, Journal, directory_fingerprint, fingerprint, read_json, say_once,
                          write_json)
from engine.progress import progress
from engine.ranks import pick_dtype
from formats import hub
from formats.chat import Tokenizer, brings_tokenizer, load_tokenizer
from formats.configs import read_config
from formats.weights import ADAPTER_CONFIG, ADAPTER_WEIGHTS, DTYPES, adapter_base, read_adapter

DEFAULT_MODEL = "demo/llama"
LONGEST_NAME = 120          # characters of a directory's name; file systems hold 255 bytes


def locate(model: str | None, adapter: str | None) -> tuple[str, str | None]:
    """The checkpoint that --model or else the adapter names, and the adapter's directory."""
    if not adapter:
        return model or DEFAULT_MODEL, None
    adapter = str(hub.adapter_directory(adapter))
    return model or adapter_base(adapter), adapter


def is_same(one: str, other: str) -> bool:
    """Whether two names of a checkpoint, paths or hub ids, mean one."""
    return hub.find(one).resolve() == hub.find(other).resolve()


def say_other_base(model: str | None, adapter: str | None) -> None:
    """--model may name the adapter's base where it lies now; the weights of another one of its shape would
    give numbers, too."""
    if model and adapter:
        own = read_json(Path(adapter) / ADAPTER_CONFIG).get("base_model_name_or_path")
        if own and not is_same(str(own), model):
            say_once(f"{adapter} was trained on {own}, --model {model} is taken: is that the same model?")


def base_directory(base: str, model: str | None, adapter: str | None) -> Path:
    """Where the checkpoint lies, downloaded if need be. Of one that an adapter names the error says so."""
    try:
        directory = hub.model_directory(base)
        read_config(directory)
        return directory
    except InputError as error:
        if model or not adapter:
            raise
        raise InputError(f"{error} ({adapter} names this base, --model would take another)") from None


def tokenizer_for(directory: Path, adapter: str | None, template_args: str | None = None) -> Tokenizer:
    """The base's tokenizer; or the adapter's, if it brings one with a chat template, as other tools write it:
    that is what it was trained in."""
    brings = adapter and brings_tokenizer(adapter)
    if brings:
        say_once(f"{adapter} brings a tokenizer and a chat template: they are used, not those of the base")
    return load_tokenizer(adapter if brings else directory, template_args, directory)


def check_system(model: str | None, adapter: str | None) -> None:
    """Fetch what is not on this machine, and refuse a checkpoint or an adapter that will not load, before
    hours of other work."""
    base, adapter = locate(model, adapter)
    directory = base_directory(base, model, adapter)
    tokenizer_for(directory, adapter)
    _, weights, names = llama.open_checkpoint(directory)
    if adapter:
        read_adapter(adapter, weights, names)


def open_model(model: str | None, adapter: str | None, device: str, dtype: str,
               template_args: str | None = None) -> tuple[llama.Llama, Tokenizer, dict]:
    """The model that --model and --adapter name, its tokenizer,
    and the settings that stand beside its numbers."""
    base, adapter = locate(model, adapter)
    say_other_base(model, adapter)
    dtype = pick_dtype(dtype, device)
    directory = base_directory(base, model, adapter)   # once: on the hub a branch may move meanwhile
    tokenizer = tokenizer_for(directory, adapter, template_args)
    print(f"loading {base}{f' with {adapter}' if adapter else ''}: {dtype} on {device}", flush=True)
    loaded = llama.load(directory, device, DTYPES[dtype], adapter)
    return loaded, tokenizer, {
        "model": base,
        "model hash": directory_fingerprint(directory, *hub.MODEL_FILES),
        "adapter": adapter,
        "adapter hash": adapter and directory_fingerprint(Path(adapter), ADAPTER_CONFIG, ADAPTER_WEIGHTS),
        "tokenizer and template": tokenizer.fingerprint,
        "template_args": template_args,
        "dtype": dtype,
        "device": device,
        "torch": torch.__version__}


def out_directory(settings: dict, *names: str) -> Path:
    """runs/eval/NAMES-SYSTEM: one directory for each evaluation of each model or adapter."""
    system = Path(settings["adapter"] or settings["model"]).as_posix().strip("./")
    return Path("runs/eval") / directory_name(*names, system)


def directory_name(*names: str) -> str:
    """The names that say something, joined; a long one is cut and gets a hash."""
    name = re.sub(r"[\s/]+", "-", "-".join(filter(None, names)))
    if len(name) > LONGEST_NAME:
        name = f"{name[:LONGEST_NAME]}-{fingerprint(name)[:6]}"
    return name


def unusual(value, usual, text: str = "{}") -> str:
    """What a value adds to a name: nothing if it is the usual one."""
    return "" if value == usual else text.format(value)


def keep(journal: Journal, lines, total: int, label: str, unit: str) -> None:
    """Add lines to the journal as they come."""
    with progress(total=total, initial=len(journal.done), desc=label, unit=unit) as bar:
        for line in lines:
            journal.add(line)
            bar.update()


def count_cut(journal: Journal) -> int:
    """How many prompts were cut; said, since it lowers scores."""
    cut = sum(line["cut"] for line in journal.done)
    if cut:
        print(f"{cut} of {len(journal.done)} prompts were longer than the model reads and lost their start")
    return cut


def finish(out: Path, settings: dict, figures: dict, **details) -> None:
    """result.json: the figures and everything they depend on. `compare` reads it."""
    write_json(out / "result.json", {"figures": figures, **details, "settings": settings})
    print(f"settings and details: {out}/result.json; answers: {out}/answers.jsonl")
