"""A translator of a directory or hub id: its model, its tokenizer, the languages it writes."""

import sys
from dataclasses import dataclass

import torch

from engine import ranks
from engine.files import InputError, directory_fingerprint
from formats import hub
from formats.languages import normal, suggestion
from formats.weights import DTYPES
from m2m100.network import M2M100, load_model
from m2m100.tokenizer import Tokenizer, load_tokenizer


@dataclass
class Translator:
    """A model, its tokenizer, the languages it can write by their normal codes, a hash of its files."""
    model: M2M100
    tokenizer: Tokenizer
    languages: list[str]
    fingerprint: str

    def check(self, source: str, targets: list[str]) -> None:
        """InputError unless it reads the source and writes every target."""
        for code in (source, *targets):
            known = self.tokenizer.languages if code == source else self.languages
            if code not in known:
                near = suggestion(code, known)
                raise InputError(f"the translator does not know the language {code!r}{near}; "
                                 f"it knows {', '.join(sorted(known))}")
        if source in targets:
            raise InputError(f"{source!r} is to be translated into itself: give another language")


def load(path, device="cpu", dtype: torch.dtype | None = None) -> Translator:
    """The translator of an M2M100 or NLLB directory or hub id; dtype: bf16 on CUDA and fp32 elsewhere if
    none is given. InputError says what is wrong with it."""
    path = hub.model_directory(path, hub.TRANSLATOR_SETTINGS, hub.TRANSLATOR_WEIGHTS)
    dtype = dtype or DTYPES[ranks.pick_dtype("auto", device)]
    if ranks.rank() == 0:
        print(f"{path}: loading the translator on {device} as {dtype}", file=sys.stderr)
    model, tokenizer = load_model(path, device, dtype), load_tokenizer(path)
    known = tokenizer.languages
    if max(known.values()) >= model.config.vocab_size:
        raise InputError(f"{path}: the tokenizer has more ids than the vocab_size of config.json, "
                         f"{model.config.vocab_size}: files of different models?")
    written = known if model.config.clo_languages is None else map(normal, model.config.clo_languages)
    languages = sorted(written)
    for code in languages:
        if code not in known:
            raise InputError(f"{path}/config.json: clo_languages has {code!r}, the tokenizer has not")
    return Translator(model, tokenizer, languages, directory_fingerprint(path, *hub.TRANSLATOR_FILES))
