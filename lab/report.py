"""docs/replication.md, drawn from the lines in lab/results/ and nothing else.

A difference is one method's figure less another's, each a mean over seeds, on the same test questions. Its 95 %
interval is a paired bootstrap over questions and seeds: every draw takes questions and, apart from them, seeds,
with replacement, the same ones for both methods (Koehn 2004, W04-3250; Efron and Tibshirani 1993, ch. 16).
"""

import itertools
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np

from engine.files import InputError, write_text
from evals.figures import CERTAINTY, FEW, RESAMPLES, chrf, percentage, ratio, with_questions
from evals.report import table
from formats import hub
from lab import plots
from lab.measure import long_counts
from lab.plan import BASE, target_bits
from lab.runner import read_results

DOCS = hub.ROOT / "docs"
PAGE = "replication.md"


# ---------------------------------------------------------------------------------------------------- figures

def share(columns: dict, name: str) -> list:
    return [(value or 0, value is not None) for value in columns[name]]


def byte_counts(columns: dict, name: str) -> list:
    return list(zip(columns["bits"], columns["bytes"]))


def ngram_counts(columns: dict, name: str) -> list:
    return list(map(long_counts, columns[name]))


@dataclass(frozen=True)
class Figure:
    name: str                                   # of its column
    title: str
    words: str                                  # in a sentence
    better: int                                 # 1: more is better; -1: less
    of_sums: Callable = percentage              # (..., K) sums over questions -> (...)
    counts: Callable = share                    # (questions, K) from columns
    digits: int = 1

    def table(self, line: dict, language: str) -> np.ndarray:
        """(questions, K)"""
        return np.array(self.counts(line["questions"][language], self.name), dtype=float)


FIGURES = (
    Figure("language", "in language", "language of replies", 1),
    Figure("correct", "correct", "exact answers", 1),
    Figure("chrf", "chrF", "chrF", 1, chrf, ngram_counts),
    Figure("bits", "bits/byte", "bits per byte", -1, ratio, byte_counts, 3),
    Figure("confused", "confused", "language confusion", -1),
    Figure("kept", "like base", "likeness to the base's replies", 1, chrf, ngram_counts),
    Figure("ends", "ends", "replies that end", 1))
CONTENT = ("correct", "chrf", "bits")           # what is asked where both replies are in the right language


def known_figures(lines, language: str) -> list[Figure]:
    """The figures that all of these lines have."""
    return [figure for figure in FIGURES if all(figure.name in line["questions"][language] for line in lines)]


# ------------------------------------------------------------------------------------------------ differences

@dataclass(frozen=True)
class Difference:
    figure: Figure
    value: float
    low: float
    high: float
    seeds: list[float]              # the difference in each seed
    questions: int

    @property
    def verdict(self) -> str:
        """Of the interval as it is shown."""
        digits = self.figure.digits
        if round(self.low, digits) <= 0 <= round(self.high, digits):
            return "a tie"
        return "better" if self.value * self.figure.better > 0 else "worse"

    @property
    def cell(self) -> str:
        digits = self.figure.digits
        text = f"{self.value:+.{digits}f} [{self.low:+.{digits}f}, {self.high:+.{digits}f}]"
        return text if self.verdict == "a tie" else f"**{text}**"


def bootstrap(figure: Figure, counts: np.ndarray) -> Difference:
    """counts (seeds, 2, questions, K): of one method and of the other."""
    asked = counts.shape[2]
    by_seed = np.subtract(*figure.of_sums(counts.sum(2)).T)                             # (seeds,)
    if figure.counts is share:          # two questions more: a share that never differs is not a sure one
        half = math.sqrt(0.5)           # as evals/figures.py has it (Agresti and Min 2005)
        counts = np.stack([with_questions(counts[:, 0], (half, 1), (0, 1)),
                           with_questions(counts[:, 1], (0, 1), (half, 1))], 1)
    seeds, _, questions, _ = counts.shape
    random = np.random.default_rng(0)
    drawn = random.multinomial(questions, np.full(questions, 1 / questions), RESAMPLES)
    weights = random.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES) / seeds
    gaps = [np.subtract(*figure.of_sums(drawn @ pair)) for pair in counts]              # seeds * (RESAMPLES,)
    draws = (weights.T * gaps).sum(0)
    outside = (1 - CERTAINTY) / 2
    low, high = np.quantile(draws, (outside, 1 - outside))
    return Difference(figure, float(by_seed.mean()), float(low), float(high), by_seed.tolist(), asked)


def differences(pairs: list[tuple[dict, dict]], language: str, only_right: bool) -> dict[str, Difference]:
    """{figure: difference} of two methods' lines, a pair for each seed; only_right: of content, on questions
    that both replied to in the right language in every seed."""
    lines = [line for pair in pairs for line in pair]
    kept = slice(None)
    if only_right:
        right = np.array([line["questions"][language]["language"] for line in lines], dtype=float)
        kept = (right == 1).all(0)
        if kept.sum() < FEW:
            return {}
    found = {}
    for figure in known_figures(lines, language):
        if figure.name in CONTENT or not only_right:
            counts = [[figure.table(line, language)[kept] for line in pair] for pair in pairs]
            found[figure.name] = bootstrap(figure, np.array(counts))
    return found


# ------------------------------------------------------------------------------------------------------ lines

class Place(NamedTuple):
    """Where methods are compared."""
    plan: str
    language: str
    rows: int

    def __str__(self) -> str:
        return f"{self.plan}, {self.language}, {self.rows:,} rows"


def read_all(directory: Path) -> list[dict]:
    """The lines of all plans; of two lines of one run with other settings the later one."""
    latest = {}
    for path in sorted(directory.glob("*.jsonl")):
        for line in read_results(path):
            point = line["run"] if line["split"] != "test" else None        # of a grid
            latest[tuple(line[key] for key in ("plan", "language", "method", "size", "seed")) + (point,)] = line
    if not latest:
        raise InputError(f"{directory} holds no lines: python -m lab PLAN makes them")
    return list(latest.values())


def places_of(lines: list[dict]) -> list[Place]:
    return sorted({Place(line["plan"], line["language"], line["rows"]) for line in lines
                   if line["split"] == "test" and line["method"] != BASE})


def methods_at(lines: list[dict], place: Place) -> dict[str, dict[int, dict]]:
    """{method: {seed: its test line}}, the base first."""
    found = {BASE: {}}
    for line in lines:
        plan, language, rows = place
        here = (line["plan"], line["language"], line["split"]) == (plan, language, "test")
        if here and (line["method"] == BASE or line["rows"] == rows):
            found.setdefault(line["method"], {})[line["seed"]] = line
    return found


def line_pairs(one: dict[int, dict], other: dict[int, dict]) -> list[tuple[dict, dict]]:
    """The lines of two methods, for every seed that they share; the base has but one line for all."""
    if any(line["method"] == BASE for line in other.values()):
        other = dict.fromkeys(one, *other.values())
    pairs = [(one[seed], other[seed]) for seed in sorted(one.keys() & other.keys())]
    for first, second in pairs:
        if first["asked"] != second["asked"]:
            raise InputError(f"{first['run']} and {second['run']} answered different questions: "
                             f"delete the older line, and run the plan again")
    return pairs


# -------------------------------------------------------------------------------------------------- questions

CLO, SFT, EQUAL, ANCHOR = "clo", "sft", "sft, clo's compute", "clo, anchor 1"
NOT_RUN = "Not run."
QUESTIONS = {                       # name of the plot: (question, pairs of methods)
    "target": ("1. Does CLO beat SFT in the target language, and does it keep English better? (paper: yes, both)",
               [(CLO, BASE), (CLO, SFT), (CLO, "sft-tgt"), (CLO, "sft+dpo")]),
    "sizes": ("2. Data efficiency: does CLO with n rows reach SFT with 2n? What do twice the rows bring to each?",
              []),
    "nll": ("3. NLL on the target alone, or on target and English? (paper: English brings the bias back)",
            [("clo, nll en,tgt", CLO)]),
    "train": ("4. Attention, LoRA, or full training? (paper: full helps in Swahili)",
              [("clo, attention", CLO), ("clo, full", CLO)]),
    "compute": ("5. Against SFT with CLO's compute", [(CLO, EQUAL)]),
    "anchor": ("6. Beyond the paper: does the anchor cost the target anything, does it protect English?",
               [(ANCHOR, CLO), (ANCHOR, SFT)]),
    "content": ("7. Where CLO is better: language choice, or content? Content, where every reply of both is in "
                "the right language", [(CLO, SFT)])}


@dataclass(frozen=True)
class Comparison:
    """One method against another at a place."""
    label: str
    seeds: int
    languages: tuple[str, str]                  # target, source
    told: tuple[dict[str, Difference], dict[str, Difference]]

    @property
    def sentence(self) -> str:
        """What the intervals support, and no more."""
        parts = [f"in {language} {verdicts(told)}" for language, told in zip(self.languages, self.told)]
        return f"- {self.label} ({self.seeds} seed{'s' * (self.seeds > 1)}): {'. And '.join(parts)}."


def verdicts(told: dict[str, Difference]) -> str:
    if not told:
        return "too few questions to tell"
    kinds = {}
    for found in told.values():
        kinds.setdefault(found.verdict, []).append(found.figure.words)
    shown = {"better": "**better** in", "worse": "**worse** in", "a tie": "a tie in"}
    parts = [f"{words} {', '.join(kinds[kind])}" for kind, words in shown.items() if kind in kinds]
    return f"({found.questions} questions) " + "; ".join(parts)


def compare(name: str, lines: list[dict]) -> list[Comparison]:
    """What there is to a question."""
    places, wanted = places_of(lines), []
    for place, (one, other) in itertools.product(places, QUESTIONS[name][1]):
        wanted.append((place, one, place, other))
    for place in places if name == "sizes" else []:
        twice = place._replace(rows=2 * place.rows)
        wanted += [(place, CLO, twice, SFT), (twice, CLO, place, CLO), (twice, SFT, place, SFT)]
    found = []
    for place, one, there, other in wanted:
        pairs = line_pairs(methods_at(lines, place).get(one, {}), methods_at(lines, there).get(other, {}))
        if pairs:
            languages = place.language.split(",")[0], pairs[0][0]["flags"].get("source", "en")
            told = tuple(differences(pairs, language, name == "content") for language in languages)
            elsewhere = f" with {there.rows:,}" if there != place else ""
            label = f"{place}: {one} against {other}{elsewhere}"
            found.append(Comparison(label, len(pairs), languages, told))
    return found


def section(name: str, compared: list[Comparison]) -> str:
    """A question, its answer in sentences, in tables and in a plot."""
    text = [f"## {QUESTIONS[name][0]}"]
    if not compared:
        return "\n\n".join([*text, NOT_RUN])
    text.append("\n".join(one.sentence for one in compared))
    for side, title in enumerate(("target language", "source language")):
        figures = [figure for figure in FIGURES if any(figure.name in one.told[side] for one in compared)]
        rows = [[one.label, *(one.told[side][figure.name].cell if figure.name in one.told[side] else "-"
                              for figure in figures)] for one in compared]
        text.append(table([title, *(figure.title for figure in figures)], rows))
    return "\n\n".join([*text, f"![Differences and their intervals](replication-{name}.png)"])


# ------------------------------------------------------------------------------------------------------- page

INTRODUCTION = """# What CLO does, measured

Drawn by `python -m lab report` from the lines in `lab/results/`, which `python -m lab PLAN` leaves; `lab/README.md`
tells how to make the data and run the plans. Nothing here is written by hand: a difference is called better or worse
where its 95 % interval leaves out 0 (bold), and a tie otherwise. Intervals are paired bootstraps over questions and
seeds; of a hundred comparisons without any effect some five would still be called one.

Figures, on the test questions. *in language*: % of replies in the language of the question; *correct*: % equal to the
expected answer, where all expected answers are short; *chrF* of replies against the expected answers; *bits/byte*:
what the expected answers cost the model (less is better); *confused*: % of questions of which the answer in the other
language is likelier per byte than the right one (less is better); *like base*: chrF of replies against those of the
base model; *ends*: % of replies that end by themselves; *tokens* that went through the model in training, a reference
pass counted like one more epoch; *seconds* of all training steps, which other work on the machine lengthens."""


def page(lines: list[dict]) -> str:
    """The text of docs/replication.md."""
    questions = [section(name, compare(name, lines)) for name in QUESTIONS]
    figures = [figure_section(lines, place) for place in places_of(lines)]
    return "\n\n".join([INTRODUCTION, settings_section(lines), *questions, *figures, grid_section(lines)]) + "\n"


def settings_section(lines: list[dict]) -> str:
    """What the runs of every plan share."""
    rows = []
    for plan in dict.fromkeys(line["plan"] for line in lines):
        own = [line for line in lines if line["plan"] == plan]
        flags, (first, *_) = own[0]["flags"], own[0]["questions"].values()
        shared = [", ".join(sorted({str(line[key]) for line in own})) for key in ("threads", "cpu", "torch", "commit")]
        rows.append([plan, flags["model"], str(len(own)), str(len(first["bits"])), flags["dtype"],
                     str(flags["max-new-tokens"]), *shared])
    header = ["plan", "model", "lines", "questions", "dtype", "max-new-tokens", "threads", "CPU", "torch", "commit"]
    return "\n\n".join(["## Settings", table(header, rows)])


def figure_section(lines: list[dict], place: Place) -> str:
    """Every figure at a place: the mean over seeds, and each seed's value."""
    text, methods = [f"## Figures: {place}"], methods_at(lines, place)
    trained = [line for method, own in methods.items() if method != BASE for line in own.values()]
    for language in (place.language.split(",")[0], trained[0]["flags"].get("source", "en")):
        figures, rows = known_figures(trained, language), []
        for method, own in methods.items():
            cells = [seeds_cell(figure, list(own.values()), language) for figure in figures]
            cost = [statistics.fmean(line[key] for line in own.values()) for key in ("tokens", "seconds")]
            rows.append([method, *cells, *(f"{value:,.0f}" for value in cost)])
        text.append(table([language, *(figure.title for figure in figures), "tokens", "seconds"], rows))
    return "\n\n".join(text)


def seeds_cell(figure: Figure, lines: list[dict], language: str) -> str:
    if figure not in known_figures(lines, language):
        return "-"
    values = [float(figure.of_sums(figure.table(line, language).sum(0))) for line in lines]
    mean, *each = (f"{value:.{figure.digits}f}" for value in (statistics.fmean(values), *values))
    return mean if len(values) == 1 else f"{mean} ({', '.join(each)})"


def grid_section(lines: list[dict]) -> str:
    """What was tried on the validation split."""
    header = ["plan", "language", "method", "lr", "epochs", "rows", "bits/byte, target"]
    rows = [[line["plan"], line["language"], line["method"], str(line["flags"].get("lr", "-")),
             f"{line['epochs']:g}", str(line["rows"]), f"{target_bits(line):.3f}"]
            for line in lines if line["split"] != "test"]
    return "## Settings tried on the validation split\n\n" + (table(header, rows) if rows else NOT_RUN)


def write(lines: list[dict], directory: Path) -> None:
    """The page and its plots; without matplotlib the page alone."""
    write_text(directory / PAGE, page(lines))
    print(directory / PAGE)
    if not plots.can_plot():
        print("no plots: they need matplotlib (pip install matplotlib)")
        return
    for name in QUESTIONS:
        compared = compare(name, lines)
        if compared:
            path = directory / f"replication-{name}.png"
            plots.plot_differences(compared, path)
            print(path)
