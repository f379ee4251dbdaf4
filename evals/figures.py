"""What a set of replies amounts to: each figure with its standard error, and the difference of two models.

A *figure* is a function of sums over questions: a share is right / asked, bits per byte are bits / bytes,
chrF is a formula over n-gram counts. So one line of answers.jsonl gives a few *counts*, shape (K,), and
everything else follows from their sums: the figure, its error (one question left out at a time) and the
difference of two models on the same questions (paired bootstrap over questions).

References: chrF (Popović 2015, W15-3049; Post 2018, W18-6319, whose numbers these are), Wilson's centre
(Wilson 1927), jackknife and bootstrap (Efron and Tibshirani 1993, ch. 11 and 16), paired bootstrap (Koehn
2004, W04-3250), two made-up pairs for paired shares (Agresti and Min 2005).
"""

import math
import unicodedata
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Callable

import numpy as np

from evals.language import MIXED, OTHER, letters

CHRF_ORDER = 6          # longest character n-gram
CHRF_BETA = 2           # recall weighs as much as this many precisions
RESAMPLES = 2000        # bootstrap draws of questions
CERTAINTY = 0.95        # of an interval
FEW = 10                # with fewer questions no difference is called one: their intervals are too narrow
SHORT_REPLY = 20        # letters below which the language of a reply says little
SHORT_ANSWER = 60       # widest expected answer that a reply can be asked to equal
# A reply loops if it ends in three times the same text (is_loop) and these three are long enough:
LOOP_SHARE = 0.1        # of the reply at least, so that "..." at the end of one is no loop,
LOOP_LETTERS = 15       # and at least so many letters, so that "1000000000" is none

ANSWER_KEYS = ("row_id", "language", "prompt", "reply", "expected", "correct", "reply_language", "judged")

Key = tuple             # what identifies a question
Counts = tuple[float, ...]


# ------------------------------------------------------------------------------------------------------- chrF

def character_ngrams(text: str, n: int) -> Counter:
    starts = range(len(text) - n + 1)
    return Counter(text[start:start + n] for start in starts)


@lru_cache(maxsize=1 << 14)         # the report, its closing sentence and result.json ask for the same ones
def chrf_counts(reply: str, expected: str) -> Counts:
    """For each n-gram length: n-grams of the reply, of the expected answer, and common to both. White space
    does not count; lengths that the expected answer lacks count for nothing."""
    reply = "".join(reply.split())
    expected = "".join(expected.split())
    counts = []
    for n in range(1, CHRF_ORDER + 1):
        own = character_ngrams(reply, n)
        wanted = character_ngrams(expected, n)
        common = own & wanted
        counts += [own.total() if wanted else 0, wanted.total(), common.total()]
    return tuple(counts)


def chrf(sums: np.ndarray) -> np.ndarray:
    """chrF2 in 0..100 from summed chrf_counts, (..., 3 * CHRF_ORDER) -> (...): the F score of precision and
    recall, each averaged over the n-gram lengths that both sides have."""
    own, wanted, common = sums[..., 0::3], sums[..., 1::3], sums[..., 2::3]
    known = (own > 0) & (wanted > 0)
    lengths = np.maximum(known.sum(-1), 1)
    precision = divide(common, own, known).sum(-1) / lengths
    recall = divide(common, wanted, known).sum(-1) / lengths
    weight = CHRF_BETA ** 2
    denominator = weight * precision + recall
    return 100 * divide((1 + weight) * precision * recall, denominator, denominator > 0)


def divide(one: np.ndarray, other: np.ndarray, where: np.ndarray, otherwise=0.0) -> np.ndarray:
    """one / other, and `otherwise` where that cannot be."""
    filled = np.full(np.shape(one), otherwise)
    return np.divide(one, other, out=filled, where=where)


# ---------------------------------------------------------------------------------------------------- figures

def ratio(sums: np.ndarray) -> np.ndarray:
    """Sum of the first count over that of the second, (..., 2) -> (...); nan over nothing."""
    part, total = sums[..., 0], sums[..., 1]
    return divide(part, total, total > 0, math.nan)


def percentage(sums: np.ndarray) -> np.ndarray:
    return 100 * ratio(sums)


@dataclass(frozen=True)
class Figure:
    name: str                                       # its key in result.json
    title: str                                      # of its column
    of_sums: Callable[[np.ndarray], np.ndarray]     # (..., K) sums -> (...)
    of_line: Callable[..., Counts | None]           # (K,) counts of one answer; None: it says nothing of this
    is_share: bool = False                          # counts are (0 or 1, 1)
    digits: int = 1


def count_language(line: dict) -> Counts | None:
    right = line["reply_language"] == line["language"]
    return (right, 1) if line["judged"] else None


def count_bits(line: dict) -> Counts | None:
    """Bits that the model spends on the expected answer and its end, and the answer's UTF-8 bytes."""
    nats = line.get("reference_nll")
    if nats is None:
        return None
    return nats / math.log(2), len(line["expected"].encode())


def count_ends(line: dict) -> Counts | None:
    return (line["ends"], 1) if "ends" in line else None


FIGURES = (
    Figure("correct", "correct", percentage, lambda line: (line["correct"], 1), is_share=True),
    Figure("right_language", "in language", percentage, count_language, is_share=True),
    Figure("chrf", "chrF", chrf, lambda line: chrf_counts(line["reply"], line["expected"])),
    Figure("bits_per_byte", "bits/byte", ratio, count_bits, digits=3),
    Figure("length", "length", percentage, lambda line: (len(line["reply"]), len(line["expected"]))),
    Figure("ends", "ends", percentage, count_ends, is_share=True))

# what other evaluations score question by question, in %
SHARE = Figure("share", "share", percentage, lambda score: (score / 100, 1), is_share=True, digits=2)
SCORE = replace(SHARE, is_share=False)          # not all of them 0 or 100
MEAN = Figure("mean", "mean", ratio, lambda score: (score, 1), digits=2)


@dataclass(frozen=True)
class Sample:
    """What one model's answers say of one figure, question by question."""
    figure: Figure
    counts: dict[Key, Counts]

    @property
    def matrix(self) -> np.ndarray:
        """(questions, K)"""
        return np.array(list(self.counts.values()), dtype=float)

    @property
    def value(self) -> float:
        return float(self.figure.of_sums(self.matrix.sum(0)))

    @property
    def error(self) -> float | None:
        """Standard error over questions: binomial for a share, else the jackknife's; None for one."""
        n, matrix = len(self.counts), self.matrix
        if self.figure.is_share:
            return binomial_error(self.value, n)
        without = self.figure.of_sums(matrix.sum(0) - matrix)        # (questions,): the figure without each
        error = math.sqrt(n - 1) * float(without.std())
        return error if n > 1 and math.isfinite(error) else None

    def summary(self) -> dict:
        """As result.json has a figure, and all tables show it."""
        return {
            "value": self.value,
            "stderr": self.error,
            "n": len(self.counts),
            "digits": self.figure.digits}


def binomial_error(value: float, n: int) -> float:
    """Standard error, in points, of a percentage over n independent trials;
    by Wilson's centre, so that it is not 0 at 0 and 100 % (Wilson 1927)."""
    p = (value / 100 * n + 0.5) / (n + 1)
    return 100 * math.sqrt(p * (1 - p) / n)


def is_short(expected: str) -> bool:
    """Whether a reply can be asked to equal this. A Chinese character is two letters wide."""
    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in expected)
    return len(expected) + wide <= SHORT_ANSWER


def question_keys(lines: list[dict]) -> list[Key]:
    """What identifies each answer's question in other runs, too: its row and texts, and where a file holds
    the very same question again, its number among them."""
    seen, keys = Counter(), []
    for line in lines:
        question = line["row_id"], line["prompt"], line["expected"]
        keys.append((*question, seen[question]))
        seen[question] += 1
    return keys


def measure(lines: list[dict]) -> dict[str, Sample]:
    """{name: Sample} of a model's answers in one language, of the figures that they tell; `correct` only
    where every expected answer is short."""
    keys, samples = question_keys(lines), {}
    for figure in FIGURES:
        counted = zip(keys, map(figure.of_line, lines))
        sample = Sample(figure, {key: counts for key, counts in counted if counts is not None})
        if sample.counts and not math.isnan(sample.value):
            samples[figure.name] = sample
    if not all(is_short(line["expected"]) for line in lines):
        samples.pop("correct", None)
    return samples


def is_loop(text: str) -> bool:
    """Whether a text ends in three times the same, which together are a tenth of it or more. The last letter
    may be cut in the middle of its bytes."""
    text = text.rstrip("\ufffd")
    least = math.ceil(max(LOOP_LETTERS, LOOP_SHARE * len(text)) / 3)
    for period in range(least, len(text) // 3 + 1):
        last = text[-period:]
        if last.strip() and text.endswith(3 * last):
            return True
    return False


def languages_told(lines: list[dict]) -> dict[str, int]:
    """Of the replies whose language was judged (n_language): how many are in another language of the run,
    of unsure language, in two, in none of the run's; and how many are so short that the verdict says little
    (a Chinese character is a letter), with how many of these count as right."""
    judged = [line for line in lines if line["judged"]]
    found = Counter(line["reply_language"] for line in judged)
    right = Counter(line["reply_language"] == line["language"] for line in judged)
    short = Counter(line["reply_language"] == line["language"] for line in judged
                    if letters(line["reply"]) < SHORT_REPLY)
    unsure, mixed, other = found[None], found[MIXED], found[OTHER]
    return {
        "n_language": len(judged),
        "elsewhere": right[False] - unsure - mixed - other,
        "unsure": unsure,
        "mixed": mixed,
        "other": other,
        "short": short.total(),
        "short_right": short[True]}


# ------------------------------------------------------------------------------------------------- difference

@dataclass(frozen=True)
class Difference:
    """One model's figure less another's, on the questions that both answered."""
    value: float
    error: float                # standard error over questions
    low: float                  # ends of the interval
    high: float
    p: float                    # two-sided: how often draws fall on the other side of 0
    questions: int
    nowhere: bool               # equal on every question

    @property
    def verdict(self) -> str:
        """In brackets behind the numbers; empty for a difference that is one."""
        if self.questions < FEW:
            return "too few questions to tell"
        return "a tie" if self.low <= 0 <= self.high else ""


@lru_cache(maxsize=3)
def drawn_questions(n: int) -> np.ndarray:
    """(RESAMPLES, n): how often each of n questions is in each draw of n."""
    chance = np.full(n, 1 / n)
    draws = np.random.default_rng(0).multinomial(n, chance, RESAMPLES)
    return draws.astype(np.float32)


def paired_difference(one: list[Sample], other: list[Sample]) -> Difference | None:
    """one - other, each a model's samples over seeds; a figure is averaged over seeds, so that the interval
    tells how far the difference depends on the choice of questions. None where they have nothing in common.

    Of shares, the draws are from two more questions, one for each side: without them a difference that is
    the same on a handful of questions would look certain.
    """
    figure = one[0].figure
    answered = [set(sample.counts) for sample in one + other]
    shared = sorted(set.intersection(*answered))
    if not shared:
        return None
    own, base = counts_of(one, shared), counts_of(other, shared)
    everything = np.ones(len(shared))
    value = of_seeds(figure, own, everything) - of_seeds(figure, base, everything)
    if math.isnan(value):
        return None
    nowhere = bool(np.array_equal(own.mean(0), base.mean(0)))
    if figure.is_share:
        half = math.sqrt(0.5)               # the variance of Agresti and Min's four half questions
        own = with_questions(own, (half, 1), (0, 1))
        base = with_questions(base, (0, 1), (half, 1))
    draws = drawn_questions(own.shape[1])
    gaps = of_seeds(figure, own, draws) - of_seeds(figure, base, draws)
    outside = (1 - CERTAINTY) / 2
    low, high = np.nanquantile(gaps, (outside, 1 - outside))
    tail = min((gaps <= 0).mean(), (gaps >= 0).mean())
    p = min(1, 2 * tail)
    numbers = map(float, (value, np.nanstd(gaps), low, high, p))
    return Difference(*numbers, len(shared), nowhere)


def counts_of(samples: list[Sample], keys: list[Key]) -> np.ndarray:
    """(seeds, questions, K)"""
    tables = [list(map(sample.counts.get, keys)) for sample in samples]
    return np.array(tables, dtype=float)


def of_seeds(figure: Figure, counts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The figure under weights of the questions, (..., n) -> (...), averaged over seeds.
    counts (seeds, n, K)."""
    values = [figure.of_sums(weights @ table) for table in counts]
    return np.mean(values, axis=0)


def with_questions(counts: np.ndarray, *more: Counts) -> np.ndarray:
    """Counts (seeds, questions, K) with more questions, the same in every seed."""
    rows = np.broadcast_to(more, (len(counts), *np.shape(more)))
    return np.concatenate((counts, rows), axis=1)
