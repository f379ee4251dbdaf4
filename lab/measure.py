"""What a model is worth on the questions of a split, question by question, in columns that fit a line.

Of every language, a list with an entry for each question:

    bits, bytes    that the expected answer costs the model; that it has in UTF-8
    confused       1 where an expected answer in another language is likelier per byte than the right one,
                   None where they are equal
    correct        1 where the reply equals the expected answer; only where every expected answer is short
    language       1 where the reply is in the question's language, None where its response says nothing of that
    ends           1 where the reply ended by itself
    chrf           [letters of the reply, of the expected answer, n-grams of 1 to 6 letters common to both]
    kept           the same against the base model's reply: of the source language
"""

import math
from itertools import islice
from pathlib import Path

import torch

import data
import model as llama
from engine.files import read_records
from evals.answers import answer_and_score
from evals.figures import CHRF_ORDER, chrf_counts, is_short
from evals.language import fit_languages, texts_by_language

FORKS = 8                   # scored together: memory, not the result, depends on it
CLASSIFIER_ROWS = 400       # rows that the classifier of reply language learns from, the same for all sizes
NO_LIMIT = 1 << 30          # tokens of a row: no response is cut


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


def answer_columns(model: llama.Llama, tokenizer, rows: list[dict], languages: list[str],
                   system: str | None = None) -> dict[str, dict]:
    """{language: its columns bits, bytes, confused}. The first of the languages is the source."""
    source, *targets = languages
    groups, _ = data.make_forks(rows, tokenizer, source, targets, NO_LIMIT, system)
    columns = {}
    for own, forks in zip(languages, zip(*groups)):
        others = [language for language in languages if language != own]
        columns[own] = {"bits": [], "bytes": [], "confused": []}
        for row, fork, logps in zip(rows, forks, log_probs(model, list(forks)), strict=True):
            sizes = [len(row[language]["response"].encode()) for language in (own, *others)]
            right, *wrong = (logp / size for logp, size in zip(logps, sizes))
            columns[own]["bits"].append(round(-logps[0] / math.log(2), 3))
            columns[own]["bytes"].append(sizes[0])
            columns[own]["confused"].append(None if fork.equal else int(max(wrong) > right))
    return columns


def reply_columns(model: llama.Llama, tokenizer, rows: list[dict], languages: list[str], classifier,
                  max_tokens: int, path: Path, base: Path, system: str | None = None) -> dict[str, dict]:
    """{language: its other columns}. Replies are written to `path`; base: the base model's, perhaps the same
    file."""
    answer_and_score(model, tokenizer, rows, tuple(languages), classifier, max_tokens, system, path)
    lines, before = read_lines(path), read_lines(base)
    columns = {}
    for language in languages:
        own = [line for line in lines if line["language"] == language]
        columns[language] = {
            "language": [int(line["reply_language"] == language) if line["judged"] else None for line in own],
            "ends": [int(line["ends"]) for line in own],
            "chrf": [short_counts(line["reply"], line["expected"]) for line in own]}
        if all(is_short(line["expected"]) for line in own):
            columns[language]["correct"] = [int(line["correct"]) for line in own]
        if language == languages[0] and path != base:
            columns[language]["kept"] = [short_counts(line["reply"], old["reply"]) for line, old
                                         in zip(lines, before) if line["language"] == language]
    return columns


def read_lines(path: Path) -> list[dict]:
    return [line for _, line in read_records(path)]


def short_counts(reply: str, expected: str) -> list[int]:
    """chrF's counts without those that follow from the others: a text of n letters has n - 1 pairs, ..."""
    counts = chrf_counts(reply, expected)
    letters = len("".join(reply.split()))
    return [letters, counts[1], *counts[2::3]]


def long_counts(counts: list[int]) -> list[int]:
    """evals.figures.chrf_counts from short_counts."""
    own, wanted, *common = counts
    found = []
    for n in range(CHRF_ORDER):
        expected = max(wanted - n, 0)
        found += [max(own - n, 0) if expected else 0, expected, common[n]]
    return found


def fit_classifier(rows: list[dict], languages: list[str]):
    return fit_languages(texts_by_language(rows[:CLASSIFIER_ROWS], tuple(languages)))
