"""Instructions in alpaca_eval's format, and a model's answers to them."""

from tqdm import tqdm

from engine.files import InputError, Journal, as_kind, check_unicode, need, read_records
from evals.answers import Decoding
from formats.records import refuse_duplicates


def read_instructions(path, language: str) -> list[dict]:
    """[{"instruction", "dataset"}] of a file in alpaca_eval's format,
    or of parallel rows that hold the language."""
    found = []
    for where, record in read_records(path):
        own = as_kind(record, dict, where).get(language)
        text = own["prompt"] if isinstance(own, dict) and "prompt" in own else \
            need(record, "instruction", where)
        item = {"instruction": as_kind(text, str, where), "dataset": record.get("dataset")}
        found.append((where, check_unicode(item, where)))
    refuse_duplicates([(where, item["instruction"]) for where, item in found])
    if not found:
        raise InputError(f"{path}: the file holds no instruction")
    return [item for _, item in found]


def answer_instructions(model, tokenizer, items: list[dict], how: Decoding, batch_size: int,
                        journal: Journal) -> None:
    """Add answers to the journal, a batch at a time. Sampling starts anew with each batch,
    so that a resumed run equals an undisturbed one."""
    done = len(journal.done)
    with tqdm(total=len(items), initial=done, desc="answers", unit="answer") as bar:
        for first in range(done // batch_size * batch_size, len(items), batch_size):
            questions = [item["instruction"] for item in items[first:first + batch_size]]
            replies = how.replies(model, tokenizer, questions, first)
            for question, (text, tokens) in list(zip(questions, replies))[len(journal.done) - first:]:
                journal.add({"instruction": question, "output": text, "tokens": tokens})
                bar.update()


def model_outputs(items: list[dict], lines: list[dict], generator: str) -> list[dict]:
    """The records of alpaca_eval's model_outputs.json."""
    return [{"dataset": item["dataset"], "instruction": item["instruction"], "output": line["output"],
             "generator": generator, "datasplit": "eval"} for item, line in zip(items, lines)]
