"""What a model is worth on the questions of a split, question by question, in columns that fit a line.

Of every language, lists with an entry for each question:

    bits, bytes    what the expected answer costs the model, its size in UTF-8
    confused       1 where the answer in another language is likelier per byte than the right one, None where
                   the two are equal
    correct        1 where the reply equals the expected answer; only where all expected answers are short
    language       1 where the reply is in the question's language, None where its answer says nothing of that
    ends           1 where the reply ended by itself
    loops          1 where it was cut at the limit while it repeated one text again and again
    echo           1 where the reply begins by saying the question again
    chrf           [letters of the reply, of the expected answer, n-grams of 1 to 6 letters common to both]
    kept           the same against the base model's reply; of the source language
"""

import math
from itertools import compress, islice
from pathlib import Path

import numpy as np
import torch

import data
import model as llama
from evals.answers import answer_and_score, read_lines
from evals.figures import CHRF_ORDER, chrf_counts, is_loop, is_short
from evals.language import fit_languages, texts_by_language

FORKS = 8                   # scored together: memory, not the result, depends on it
CLASSIFIER_ROWS = 400       # rows that the classifier of reply language learns from, the same for all sizes
NO_LIMIT = 1 << 30          # tokens of a row: no answer is cut
ECHO_LETTERS = 40           # of a question that a reply begins with, or all of it, but not fewer than
FEWEST_ECHOED = 10          # these: a "Yes" is none


@torch.no_grad()
def log_probs(model: llama.Llama, forks: list[data.Fork]) -> list[list[float]]:
    """Summed log-prob of every continuation of every fork, in nats."""
    longest = max(fork.length for fork in forks)
    found = {}
    for first in range(0, len(forks), FORKS):
        batch = data.pack(forks[first:first + FORKS], longest).to(model.head.device)
        sums = iter(llama.continuation_logps(model, batch).tolist())
        for fork, i in zip(batch.forks, batch.order):
            found[first + i] = list(islice(sums, len(fork.continuations)))
    return [found[i] for i in range(len(forks))]


def answer_columns(model: llama.Llama, tokenizer, rows: list[dict], languages: list[str]) -> dict[str, dict]:
    """{language: bits, bytes, confused}. The first of the languages is the source."""
    source, *targets = languages
    groups, _ = data.make_forks(rows, tokenizer, source, targets, NO_LIMIT)
    columns = {}
    for own, forks in zip(languages, zip(*groups)):
        order = sorted(languages, key=lambda language: language != own)             # of continuations
        bits, sizes, confused = [], [], []
        for row, fork, logps in zip(rows, forks, log_probs(model, forks), strict=True):
            lengths = [len(row[language]["response"].encode()) for language in order]
            right, *others = [logp / length for logp, length in zip(logps, lengths)]
            wrong = [*compress(others, [ids != fork.continuations[0] for ids in fork.continuations[1:]])]
            bits.append(round(-logps[0] / math.log(2), 3))
            sizes.append(lengths[0])
            confused.append(int(max(wrong) > right) if wrong else None)
        columns[own] = {"bits": bits, "bytes": sizes, "confused": confused}
    return columns


def reply(model: llama.Llama, tokenizer, rows: list[dict], languages: list[str], known: list[dict],
          max_tokens: int, path: Path) -> list[dict]:
    """Answer the questions into `path`; its lines. known: training rows, to tell the languages by."""
    texts = texts_by_language(known[:CLASSIFIER_ROWS], tuple(languages))
    answer_and_score(model, tokenizer, rows, tuple(languages), fit_languages(texts), max_tokens, None, path)
    return read_lines(path)


def reply_columns(lines: list[dict], base: list[dict] | None) -> dict[str, dict]:
    """{language: its other columns} from the lines of answers of a model, and of the base."""
    columns = {}
    for line, before in zip(lines, base or lines, strict=True):
        own = columns.setdefault(line["language"], {})
        right = int(line["reply_language"] == line["language"])
        told = {
            "correct": int(line["correct"]),
            "language": right if line["judged"] else None,
            "ends": int(line["ends"]),
            "loops": int(not line["ends"] and is_loop(line["reply"])),
            "echo": int(is_echo(line["reply"], line["prompt"])),
            "chrf": short_counts(line["reply"], line["expected"])}
        if base and line["language"] == lines[0]["language"]:
            told["kept"] = short_counts(line["reply"], before["reply"])
        for name, value in told.items():
            own.setdefault(name, []).append(value)
    for line in lines:
        if not is_short(line["expected"]):
            columns[line["language"]].pop("correct", None)
    return columns


def is_echo(reply: str, question: str) -> bool:
    """Whether a reply begins with the question, whatever its case and spaces."""
    start, question = (" ".join(text.split()).casefold() for text in (reply, question))
    beginning = question[:ECHO_LETTERS]
    return len(beginning) >= FEWEST_ECHOED and start.startswith(beginning)


def short_counts(text: str, expected: str) -> list[int]:
    """chrF's counts without those that follow from the others: n letters make n - 1 pairs, ..."""
    counts = chrf_counts(text, expected)
    letters = len("".join(text.split()))
    return [letters, counts[1], *counts[2::3]]


def long_counts(counts: list[list[int]]) -> np.ndarray:
    """evals.figures.chrf_counts of each question, (questions, 3 CHRF_ORDER), from their short_counts."""
    short = np.array(counts, dtype=float)
    own, wanted, common = short[:, :1], short[:, 1:2], short[:, 2:]
    shorter = np.arange(CHRF_ORDER)                     # than the letters by so many are the n-grams
    wanted = np.maximum(wanted - shorter, 0)
    own = np.where(wanted > 0, np.maximum(own - shorter, 0), 0)
    return np.stack((own, wanted, common), axis=-1).reshape(len(short), -1)
