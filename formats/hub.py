"""What a flag names: a path, a path beside clo.py (`demo/llama`), or a hub id (`Qwen/Qwen2.5-0.5B`).

    model_directory("Qwen/Qwen2.5-0.5B")    # where it lies, downloaded at first use
    model_directory("demo/llama")           # what is a path stays a path
    adapter_directory("runs/sw/clo")        # runs/sw/clo/adapter
    data_file("oasst1")                     # a data set known by name

huggingface_hub, which comes with tokenizers, does the work: it keeps finished files in its cache
(HF_HOME), goes on after a broken connection, and answers from the cache when the hub is out of reach. It
is imported only when an id is met.
"""

import difflib
import re
from pathlib import Path

from engine.files import InputError, first_line, read_json, say_once
from formats.configs import read_config
from formats.weights import ADAPTER_CONFIG, ADAPTER_WEIGHTS, INDEX, WHOLE, read_index

ROOT = Path(__file__).parents[1]       # where clo.py and demo/ lie
SETTINGS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
            "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
            "additional_chat_templates/*.jinja")
WEIGHTS = (WHOLE, INDEX)
TRANSLATOR_SETTINGS = (*SETTINGS, "vocab.json", "sentencepiece.bpe.model")
TRANSLATOR_WEIGHTS = (*WEIGHTS, "pytorch_model.bin")
# What a hash is made of; that of a model's tokenizer and template is another one.
MODEL_FILES = ("config.json", "*.safetensors")
TRANSLATOR_FILES = ("*.json", "*.model", "*.safetensors", "*.bin")
DATASETS = {"oasst1": ("OpenAssistant/oasst1", "2023-04-12_oasst_ready.trees.jsonl.gz")}


def find(name) -> Path:
    """The file or directory of this name, if there is one: in the working directory, else beside clo.py."""
    path = Path(name)
    if path.exists() or not (ROOT / path).exists():
        return path
    if path.parts[0] != "demo":                                # where the defaults lie
        say_once(f"{name}: {ROOT / path} is taken, here there is none")
    return ROOT / path


def is_id(name) -> bool:
    """owner/name, unless a directory `owner` is here or beside clo.py, which makes it a path."""
    named = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(name), re.ASCII)
    return named is not None and not any(place.parent.exists() for place in (Path(name), ROOT / name))


def model_directory(name, settings=SETTINGS, weights=WEIGHTS) -> Path:
    """The directory of a model given as path or hub id. Downloads what is not there yet: the small files of
    `settings`, then the first of `weights` that the hub has, with the shards if it is an index. InputError,
    also for a directory that is no model's where weights are wanted."""
    if not is_id(name):
        return check_directory(name, find(name), "config.json" if weights else None)
    directory = fetch(name, settings)
    if weights == WEIGHTS:
        read_config(directory)              # before gigabytes of a model that is not read here
    for file in weights:
        if (fetch(name, (file,), directory.name) / file).is_file():
            if file == INDEX:
                shards = set(read_index(directory / INDEX).values())
                fetch(name, tuple(sorted(shards)), directory.name)
            break
    return directory


def adapter_directory(name) -> Path:
    """The directory of an adapter given as path, hub id, or directory that holds it as `adapter`."""
    if is_id(name):
        return fetch(name, (ADAPTER_CONFIG, ADAPTER_WEIGHTS, *SETTINGS))
    directory = find(name)
    if not (directory / ADAPTER_CONFIG).is_file() and (directory / "adapter" / ADAPTER_CONFIG).is_file():
        directory /= "adapter"
        say_once(f"{name} is no adapter, {directory} is one and is taken")
    return check_directory(name, directory, ADAPTER_CONFIG)


def check_directory(name, directory: Path, wanted: str | None) -> Path:
    """The directory. InputError, with what may have been meant, when it is none or lacks the wanted file."""
    if directory.is_file():
        raise InputError(f"{name} is a file, a directory was expected")
    if not directory.is_dir():
        near = difflib.get_close_matches(directory.name, [path.name for path in directory.parent.glob("*")])
        raise InputError(f"{name}: no such directory, and no hub id (owner/name)"
                         + meant([str(directory.with_name(each)) for each in near]))
    if wanted == ADAPTER_CONFIG and not (directory / wanted).is_file():
        raise InputError(f"{name} is no adapter: there is no {wanted}" + meant(below(directory)))
    if wanted == "config.json" and "model_type" not in read_json(directory / wanted, missing={}):
        raise InputError(f"{name} is no model: there is no {wanted} with a model_type"
                         + meant(below(directory)))
    return directory


def below(directory: Path) -> list[str]:
    """Flags that name the adapters and models of a directory, down to those of a run."""
    found = []
    for level in ("", "*/", "*/*/"):
        found += [f"--adapter {path.parent}" for path in sorted(directory.glob(level + ADAPTER_CONFIG))]
        found += [f"--model {path.parent}" for path in sorted(directory.glob(level + "config.json"))
                  if "model_type" in read_json(path)]
    return found


def meant(names: list[str]) -> str:
    """The end of an error's line."""
    return f"; did you mean {' or '.join(names)}?" if names else ""


def data_file(name) -> Path:
    """The file of a data set in DATASETS, downloaded if need be; any other path as `find` has it.
    InputError."""
    path = find(name)
    if path.exists() or str(name) not in DATASETS:
        return path
    repository, file = DATASETS[str(name)]
    return fetch(repository, (file,), kind="dataset") / file


def fetch(repository: str, names: tuple[str, ...], revision: str | None = None, kind: str = "model") -> Path:
    """Those of the files that the repository has, at one commit;
    the directory of that commit in huggingface_hub's cache."""
    from huggingface_hub import errors, snapshot_download
    # Broken connections are OSErrors, or errors of the HTTP client,
    # whose name changed with huggingface_hub's versions.
    broken = (OSError, *errors.HfHubHTTPError.__bases__)
    try:
        return Path(snapshot_download(repository, repo_type=kind, revision=revision,
                                      allow_patterns=list(names)))
    except (errors.RepositoryNotFoundError, errors.HFValidationError):         # gated ones, too
        raise InputError(f"{repository}: neither a directory here nor a {kind} that the hub gives to you: "
                         f"check the spelling; for a gated one accept its licence at "
                         f"https://huggingface.co/{repository}, then log in with `hf auth login` "
                         f"(or set HF_TOKEN)") from None
    except errors.LocalEntryNotFoundError as error:
        raise InputError(f"{repository} is not (wholly) in the cache and the hub cannot be reached "
                       f"({type(error.__cause__ or error).__name__}): connect, or give a directory") from None
    except broken as error:
        raise InputError(f"the download of {repository} broke off ({first_line(error)}): "
                       f"run the same command again, finished files are kept") from None
