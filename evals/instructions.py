"""Instructions in alpaca_eval's format, and a model's answers to them."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from engine.files import InputError, Journal, as_kind, check_unicode, fingerprint, need, read_records
from evals.answers import Decoding
from evals.systems import keep
from formats.conversations import NO_INPUT
from formats.languages import normal
from formats.records import refuse_duplicates, without_nan

TRANSLATED_AT_ONCE = 16     # instructions between two writes


def read_instructions(path, language: str) -> list[dict]:
    """[{"dataset", "instruction"}] of a file in alpaca_eval's format,
    or of parallel rows that hold the language."""
    found, empty = [], 0
    for where, record in read_records(path):
        own, record = None, without_nan(as_kind(record, dict, where))
        for key, side in record.items():
            if normal(key) == language and isinstance(side, dict):
                own = side.get("prompt")
        text = need(record, "instruction", where) if own is None else own
        about = as_kind(record.get("input") or "", str, f"{where}: input") if own is None else ""
        if about and about.lower() not in NO_INPUT:     # Alpaca's
            text = f"{as_kind(text, str, where)}\n\n{about}"
        if as_kind(text, str, f"{where}: instruction").strip():
            item = {"dataset": record.get("dataset"), "instruction": text}
            found.append((where, check_unicode(item, where)))
        else:
            empty += 1
    if empty:
        print(f"{empty} empty instructions are left out")
    refuse_duplicates([(where, item["instruction"]) for where, item in found])
    if not found:
        raise InputError(f"{path}: the file holds no instruction")
    return [item for _, item in found]


def translate_instructions(items: list[dict], translate: Callable, translator, source: str, language: str,
                           beams: int) -> list[dict]:
    """The items in a language, but for those whose translation failed a check, is empty or equals an earlier
    one, which are counted. The translation is kept under a hash of what made it, so that every system gets
    the same strings, byte for byte: alpaca_eval joins answers on them. translate: the page's function."""
    translator.check(source, [language])
    settings = {
        "translator": translator.fingerprint,
        "source": source,
        "lang": language,
        "beams": beams}
    texts = [item["instruction"] for item in items]
    path = Path("runs/eval") / f"instructions-{language}-{fingerprint(texts, settings)}.jsonl"
    with Journal(path, settings, ("source", "instruction", "faults")) as journal:
        left = texts[len(journal.done):]
        lines = translated_lines(left, partial(translate, source=source, target=language,
                                               translator=translator, beams=beams))
        keep(journal, lines, len(items), f"translate to {language}", "instruction")
    print(f"translated instructions, the same for every system: {path}")
    kept, left_out = {}, Counter()
    for item, line in zip(items, journal.done):
        text = line["instruction"]
        if line["faults"]:
            left_out.update(line["faults"].keys())
        elif not text.strip():
            left_out["empty"] += 1
        elif text in kept:
            left_out["equal to an earlier one"] += 1
        else:
            kept[text] = item | {"instruction": text}
    if left_out:
        reasons = ", ".join(f"{number} {reason}" for reason, number in left_out.most_common())
        print(f"{len(items) - len(kept)} of {len(items)} translated instructions are left out: {reasons}")
    if not kept:
        raise InputError("no translated instruction is left: see the reasons above, or give instructions "
                         "that are in the language already, without --translator")
    return list(kept.values())


def translated_lines(texts: list[str], translate: Callable):
    for first in range(0, len(texts), TRANSLATED_AT_ONCE):
        asked = texts[first:first + TRANSLATED_AT_ONCE]
        for text, found in zip(asked, translate(asked)):
            yield {
                "source": text,
                "instruction": found,
                "faults": found.faults}


def answer_lines(model, tokenizer, items: list[dict], how: Decoding, batch_size: int, done: int):
    """Yields answers behind those that are done. Sampling starts anew with each batch, so that a resumed run
    equals an undisturbed one."""
    for first in range(done // batch_size * batch_size, len(items), batch_size):
        questions = [item["instruction"] for item in items[first:first + batch_size]]
        replies = how.replies(model, tokenizer, questions, first, batch_size)
        known = max(done - first, 0)
        for question, (text, tokens) in zip(questions[known:], replies[known:]):
            yield {
                "instruction": question,
                "output": text,
                "tokens": tokens}


def model_outputs(items: list[dict], lines: list[dict], generator: str) -> list[dict]:
    """The records of alpaca_eval's model_outputs.json."""
    records = []
    for item, line in zip(items, lines):
        records.append({
            **item,
            "output": line["output"],
            "generator": generator,
            "datasplit": "eval"})
    return records
