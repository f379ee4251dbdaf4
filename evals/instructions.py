"""Instructions in alpaca_eval's format, and a model's answers to them."""

from collections import Counter
from pathlib import Path

import translate
from engine.files import InputError, Journal, as_kind, check_unicode, fingerprint, need, read_records
from engine.progress import progress
from evals.answers import HASH_DIGITS, Decoding
from formats.languages import normal
from formats.records import refuse_duplicates

TRANSLATED_AT_ONCE = 16     # instructions between two writes


def read_instructions(path, language: str) -> list[dict]:
    """[{"instruction", "dataset"}] of a file in alpaca_eval's format,
    or of parallel rows that hold the language."""
    found = []
    for where, record in read_records(path):
        sides = {normal(key): side for key, side in as_kind(record, dict, where).items()}
        own = sides.get(language)
        if isinstance(own, dict) and "prompt" in own:
            text = own["prompt"]
        else:
            text = need(record, "instruction", where)
        item = {"instruction": as_kind(text, str, where), "dataset": record.get("dataset")}
        found.append((where, check_unicode(item, where)))
    refuse_duplicates([(where, item["instruction"]) for where, item in found])
    if not found:
        raise InputError(f"{path}: the file holds no instruction")
    return [item for _, item in found]


def translate_instructions(items: list[dict], model: str, device: str, source: str, language: str,
                           beams: int) -> list[dict]:
    """The items in a language. The translation is kept under a hash of what made it, so that every system
    gets the same strings, byte for byte: alpaca_eval joins answers on them."""
    translator = translate.load(model, device)
    translator.check(source, [language])
    settings = {"translator": translator.fingerprint, "source": source, "lang": language, "beams": beams}
    texts = [item["instruction"] for item in items]
    key = fingerprint(texts, settings)[:HASH_DIGITS]
    path = Path("runs/eval") / f"instructions-{language}-{key}.jsonl"
    title = f"translate to {language}"
    with Journal(path, settings, ("source", "instruction", "faults")) as journal, \
            progress(total=len(items), initial=len(journal.done), desc=title, unit="instruction") as bar:
        for first in range(len(journal.done), len(items), TRANSLATED_AT_ONCE):
            asked = texts[first:first + TRANSLATED_AT_ONCE]
            translations = translate.translate(asked, source, language, translator, beams)
            for text, found in zip(asked, translations):
                journal.add({"source": text, "instruction": found, "faults": found.faults})
            bar.update(len(asked))
    print(f"translated instructions, the same for every system: {path}")
    return keep_translated(items, journal.done)


def keep_translated(items: list[dict], lines: list[dict]) -> list[dict]:
    """The items with their translations; those that failed a check, are empty or equal an earlier one are
    left out and counted."""
    kept = {}
    left_out = Counter()
    for item, line in zip(items, lines):
        text = line["instruction"]
        if line["faults"]:
            left_out.update(line["faults"].keys())
        elif not text.strip():
            left_out["empty"] += 1
        elif text in kept:
            left_out["equal to an earlier one"] += 1
        else:
            kept[text] = item | {"instruction": text}
    if len(kept) < len(items):
        reasons = ", ".join(f"{number} {reason}" for reason, number in left_out.most_common())
        print(f"{len(items) - len(kept)} of {len(items)} translated instructions are left out: {reasons}")
    if not kept:
        raise InputError("no translated instruction is left: see the reasons above, or give instructions "
                         "that are in the language already, without --translator")
    return list(kept.values())


def answer_instructions(model, tokenizer, items: list[dict], how: Decoding, batch_size: int,
                        journal: Journal) -> None:
    """Add answers to the journal, a batch at a time. Sampling starts anew with each batch,
    so that a resumed run equals an undisturbed one."""
    done = len(journal.done)
    with progress(total=len(items), initial=done, desc="answers", unit="answer") as bar:
        for first in range(done // batch_size * batch_size, len(items), batch_size):
            questions = [item["instruction"] for item in items[first:first + batch_size]]
            replies = how.replies(model, tokenizer, questions, first)
            known = len(journal.done) - first
            for question, (text, tokens) in zip(questions[known:], replies[known:]):
                journal.add({"instruction": question, "output": text, "tokens": tokens})
                bar.update()


def model_outputs(items: list[dict], lines: list[dict], generator: str) -> list[dict]:
    """The records of alpaca_eval's model_outputs.json."""
    records = []
    for item, line in zip(items, lines):
        records.append({
            "dataset": item["dataset"],
            "instruction": item["instruction"],
            "output": line["output"],
            "generator": generator,
            "datasplit": "eval"})
    return records
