"""Hub ids in the place of paths: `Qwen/Qwen2.5-0.5B` for a model directory, `oasst1` for a data file.

    local("Qwen/Qwen2.5-0.5B")         # the directory it lies in, downloaded at first use
    local("demo/llama")                # what is a path stays a path

huggingface_hub, which comes with tokenizers, does the work: it keeps finished files in its cache
(HF_HOME), goes on after a broken connection, and answers from the cache when the hub is out of reach. It
is imported only when an id is met.
"""

import json
import re
from pathlib import Path
from engine.files import InputError

INDEX = "model.safetensors.index.json"
SETTINGS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
            "special_tokens_map.json", "chat_template.jinja", INDEX)
WEIGHTS = ("model.safetensors",)
TRANSLATOR_SETTINGS = (*SETTINGS, "vocab.json", "sentencepiece.bpe.model")
TRANSLATOR_WEIGHTS = (*WEIGHTS, "pytorch_model.bin")
DATASETS = {"oasst1": ("OpenAssistant/oasst1", "2023-04-12_oasst_ready.trees.jsonl.gz")}


def is_id(path) -> bool:
    """owner/name, unless it is there as a path or a directory `owner` is, which makes it a misspelt path."""
    named = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(path), re.ASCII)
    return named is not None and not Path(path).exists() and not Path(path).parent.exists()


def local(path, settings=SETTINGS, weights=WEIGHTS) -> Path:
    """The directory of a model given as path or hub id. Downloads what is not there yet: the small files
    of `settings`, then the weight files that the index names or, without an index, the first of `weights`
    the hub has. InputError."""
    if not is_id(path):
        return Path(path)
    directory = fetch(path, settings)
    if weights and (directory / INDEX).is_file():
        fetch(path, shard_names(directory / INDEX), directory.name)
    else:
        for name in weights:
            if (fetch(path, (name,), directory.name) / name).is_file():
                break
    return directory


def shard_names(index: Path) -> tuple[str, ...]:
    try:
        return tuple(sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{index} is damaged: it names no weight files; "
                       f"report it to the model's owner") from None


def data_file(path) -> Path:
    """The file of a data set in DATASETS, downloaded if need be; any other path as it is. InputError."""
    if str(path) not in DATASETS or Path(path).exists():
        return Path(path)
    repository, name = DATASETS[str(path)]
    return fetch(repository, (name,), kind="dataset") / name


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
    except errors.GatedRepoError:
        raise InputError(
            f"{repository} is gated on the hub: accept its licence at https://huggingface.co/{repository}, "
            f"then log in with `hf auth login` (or set HF_TOKEN)") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise InputError(f"{repository}: neither a directory here nor a public {kind} on the hub: "
                       f"check the spelling; for a private one log in with `hf auth login`") from None
    except errors.LocalEntryNotFoundError as error:
        raise InputError(f"{repository} is not (wholly) in the cache and the hub cannot be reached "
                       f"({type(error.__cause__ or error).__name__}): connect, or give a directory") from None
    except broken as error:
        raise InputError(f"the download of {repository} broke off ({str(error).splitlines()[0]}): "
                       f"run the same command again, finished files are kept") from None
