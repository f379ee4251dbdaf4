"""The figures of a run, and the difference of two methods with its 95 % interval, from the columns of lines.

A difference is one method's figure less another's, each a mean over seeds, on the same questions. Its interval
covers two: a paired bootstrap over questions and seeds, of which every draw takes questions and, apart from
them, seeds, with replacement, the same ones for both methods (Koehn 2004, W04-3250; Efron and Tibshirani 1993,
ch. 16); and Student's t of the seeds' differences. The bootstrap knows of questions, but three seeds drawn
again are too much alike; t knows how little three seeds tell (Student 1908), but nothing of questions.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from evals.figures import CERTAINTY, FEW, RESAMPLES, chrf, percentage, ratio, with_questions
from lab.measure import long_counts

# 97.5 % quantiles of Student's t, by number of seeds; with more of them the last one is a little too wide.
T_QUANTILES = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


# ---------------------------------------------------------------------------------------------------- figures

def share(columns: dict, name: str) -> list:
    return [(value or 0, value is not None) for value in columns[name]]


def usable_share(columns: dict, name: str) -> list:
    """In the right language, ended by itself, and no echo of the question: what a user could use."""
    rows = zip(columns["language"], columns["ends"], columns["echo"])
    return [((language or 0) * ends * (1 - echo), language is not None) for language, ends, echo in rows]


def byte_counts(columns: dict, name: str) -> list:
    return list(zip(columns["bits"], columns["bytes"]))


def ngram_counts(columns: dict, name: str) -> np.ndarray:
    return long_counts(columns[name])


def each_chrf(columns: dict, name: str) -> list:
    return [(value, 1) for value in chrf(ngram_counts(columns, "chrf"))]


@dataclass(frozen=True)
class Figure:
    name: str                                   # of its column
    title: str
    words: str                                  # in a sentence
    better: int                                 # 1: more is better; -1: less; 0: neither, it tells a change
    of_sums: Callable = percentage              # (..., K) sums over questions -> (...)
    of_columns: Callable = share                # (questions, K)
    digits: int = 1
    needs: tuple[str, ...] = ()                 # columns, where its own is not one
    most: float = 100.0                         # that a difference can be

    def is_share(self) -> bool:
        return self.of_columns in (share, usable_share)

    def known(self, columns: dict) -> bool:
        return all(name in columns for name in self.needs or (self.name,))

    def counts(self, line: dict, language: str) -> np.ndarray:
        """(questions, K)"""
        columns = line["questions"][language]
        return np.array(self.of_columns(columns, self.name), dtype=float)


FIGURES = (
    Figure("language", "in language", "language of replies", 1),
    Figure("usable", "usable", "usable replies", 1, of_columns=usable_share, needs=("language", "ends", "echo")),
    Figure("correct", "correct", "exact answers", 1),
    Figure("chrf", "chrF", "chrF", 1, chrf, ngram_counts),
    Figure("chrf each", "chrF/question", "chrF per question", 1, ratio, each_chrf, needs=("chrf",)),
    Figure("bits", "bits/byte", "bits per byte", -1, ratio, byte_counts, 3, most=math.inf),
    Figure("confused", "confused", "language confusion", -1),
    Figure("kept", "like base", "likeness to the base's replies", 0, chrf, ngram_counts),
    Figure("ends", "ends", "replies that end", 1),
    Figure("loops", "loops", "replies caught in a loop", -1),
    Figure("echo", "echo", "replies that repeat the question", -1))
CONTENT = ("correct", "chrf", "chrf each", "bits")          # what is asked of replies in the right language


def known_figures(lines, language: str) -> list[Figure]:
    """The figures that all of these lines have."""
    columns = [line["questions"][language] for line in lines]
    return [figure for figure in FIGURES if all(map(figure.known, columns))]


# ------------------------------------------------------------------------------------------------ differences

TIE = "a tie"


@dataclass(frozen=True)
class Difference:
    figure: Figure
    questions: int
    value: float
    low: float
    high: float
    seeds: list[float]              # the difference in each seed

    @property
    def verdict(self) -> str:
        """Of the interval as it is shown."""
        digits = self.figure.digits
        if round(self.low, digits) <= 0 <= round(self.high, digits):
            return TIE
        if not self.figure.better:
            return "higher" if self.value > 0 else "lower"
        return "better" if self.value * self.figure.better > 0 else "worse"

    @property
    def cell(self) -> str:
        value, low, high = (f"{x:+.{self.figure.digits}f}" for x in (self.value, self.low, self.high))
        text = f"{value} [{low}, {high}]"
        return text if self.verdict == TIE else f"**{text}**"


@lru_cache
def resamples(questions: int, seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each question is in each draw, (RESAMPLES, questions); the weight of each seed in it."""
    random = np.random.default_rng(0)
    drawn = random.multinomial(questions, np.full(questions, 1 / questions), RESAMPLES)
    weights = random.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES)
    return drawn.astype(float), weights / seeds


def bootstrap(figure: Figure, counts: np.ndarray) -> tuple[float, float]:
    """The interval of counts (seeds, 2, questions, K), of one method and of the other."""
    if figure.is_share():               # two questions more: a share that never differs is not a sure one
        half = math.sqrt(0.5)           # as in evals/figures.py (Agresti and Min 2005)
        one = with_questions(counts[:, 0], (half, 1), (0, 1))
        other = with_questions(counts[:, 1], (0, 1), (half, 1))
        counts = np.stack((one, other), 1)
    drawn, weights = resamples(counts.shape[2], len(counts))
    values = figure.of_sums(np.tensordot(drawn, counts, (1, 2)))                        # (RESAMPLES, seeds, 2)
    draws = (weights * (values[..., 0] - values[..., 1])).sum(1)
    outside = (1 - CERTAINTY) / 2
    low, high = np.quantile(draws, (outside, 1 - outside)).tolist()
    return low, high


def difference(figure: Figure, counts: np.ndarray) -> Difference:
    """counts as in `bootstrap`. The interval covers the bootstrap's and that of the seeds, and ends where the
    figure does: t of two seeds knows nothing of that."""
    by_seed = np.subtract(*figure.of_sums(counts.sum(2)).T).tolist()                    # (seeds,)
    low, high = bootstrap(figure, counts)
    middle, half = seed_interval(by_seed)
    low = max(-figure.most, min(low, middle - half))
    high = min(figure.most, max(high, middle + half))
    return Difference(figure, counts.shape[2], middle, low, high, by_seed)


def seed_interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of Student's 95 % interval around it; 0 for a single seed, which says nothing."""
    middle, n = statistics.fmean(values), len(values)
    if n == 1:
        return middle, 0.0
    quantile = T_QUANTILES[min(n, max(T_QUANTILES))]
    return middle, quantile * statistics.stdev(values) / math.sqrt(n)


def differences(pairs: list[tuple], language: str, content: bool) -> dict[str, Difference]:
    """{figure: difference} of the lines of two methods, a pair for each seed. content: on the questions that
    both replied to in the right language in every seed."""
    lines = [line for pair in pairs for line in pair]
    figures, kept = known_figures(lines, language), slice(None)
    if content:
        right = [line["questions"][language]["language"] for line in lines]
        kept = np.all(np.array(right, dtype=float) == 1, axis=0)
        figures = [figure for figure in figures if figure.name in CONTENT and kept.sum() >= FEW]
    found = {}
    for figure in figures:
        counts = [[figure.counts(line, language)[kept] for line in pair] for pair in pairs]
        found[figure.name] = difference(figure, np.array(counts))
    return found
