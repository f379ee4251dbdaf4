"""docs/replication.md, drawn from the lines in lab/results/ and nothing else.

A difference is one method's figure less another's, each a mean over seeds, on the same test questions. Its
95 % interval is a paired bootstrap over questions and seeds: every draw takes questions and, apart from them,
seeds, with replacement, the same ones for both methods (Koehn 2004, W04-3250; Efron and Tibshirani 1993,
ch. 16).
"""

import itertools
import math
import statistics
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np

from engine.files import InputError, write_text
from evals.figures import CERTAINTY, FEW, RESAMPLES, chrf, percentage, ratio, with_questions
from evals.report import table
from formats import hub
from lab import plots
from lab.measure import long_counts
from lab.plan import BASE
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
    of_columns: Callable = share                # (questions, K)
    digits: int = 1

    def counts(self, line: dict, language: str) -> np.ndarray:
        """(questions, K)"""
        columns = line["questions"][language]
        return np.array(self.of_columns(columns, self.name), dtype=float)


FIGURES = (
    Figure("language", "in language", "language of replies", 1),
    Figure("correct", "correct", "exact answers", 1),
    Figure("chrf", "chrF", "chrF", 1, chrf, ngram_counts),
    Figure("bits", "bits/byte", "bits per byte", -1, ratio, byte_counts, 3),
    Figure("confused", "confused", "language confusion", -1),
    Figure("kept", "like base", "likeness to the base's replies", 1, chrf, ngram_counts),
    Figure("ends", "ends", "replies that end", 1),
    Figure("loops", "loops", "replies caught in a loop", -1))
CONTENT = ("correct", "chrf", "bits")           # what is asked of replies in the right language


def known_figures(lines, language: str) -> list[Figure]:
    """The figures that all of these lines have."""
    columns = [line["questions"][language] for line in lines]
    return [figure for figure in FIGURES if all(figure.name in own for own in columns)]


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


def bootstrap(figure: Figure, counts: np.ndarray) -> Difference:
    """counts (seeds, 2, questions, K): of one method and of the other."""
    asked = counts.shape[2]
    by_seed = np.subtract(*figure.of_sums(counts.sum(2)).T)                             # (seeds,)
    if figure.of_columns is share:      # two questions more: a share that never differs is not a sure one
        half = math.sqrt(0.5)           # as in evals/figures.py (Agresti and Min 2005)
        one = with_questions(counts[:, 0], (half, 1), (0, 1))
        other = with_questions(counts[:, 1], (0, 1), (half, 1))
        counts = np.stack((one, other), 1)
    drawn, weights = resamples(counts.shape[2], len(counts))
    gaps = [np.subtract(*figure.of_sums(drawn @ pair)) for pair in counts]              # seeds * (RESAMPLES,)
    draws = (weights.T * gaps).sum(0)
    outside = (1 - CERTAINTY) / 2
    low, high = np.quantile(draws, (outside, 1 - outside)).tolist()
    return Difference(figure, asked, float(by_seed.mean()), low, high, by_seed.tolist())


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


Lines = dict[int, dict]                                 # {seed: line} of a method at a place


def read_all(directory: Path) -> list[dict]:
    """The lines of all plans; of two lines of one run with other settings the later one."""
    latest = {}
    for path in sorted(directory.glob("*.jsonl")):
        for line in read_results(path):
            point = line["run"] if line["split"] != "test" else None        # of a grid
            key = [line[name] for name in ("plan", "language", "method", "size", "seed")]
            latest[(*key, point)] = line
    if not latest:
        raise InputError(f"{directory} holds no lines: python -m lab PLAN makes them")
    return list(latest.values())


def by_place(lines: list[dict]) -> dict[Place, dict[str, Lines]]:
    """{place: {method: its test lines}}, the base at each place of its plan and language."""
    tested = [line for line in lines if line["split"] == "test"]
    tested.sort(key=lambda line: line["seed"])
    bases = {(line["plan"], line["language"]): {0: line} for line in tested if line["method"] == BASE}
    found = {}
    for line in tested:
        if line["method"] != BASE:
            place = Place(line["plan"], line["language"], line["rows"])
            methods = found.setdefault(place, {BASE: bases.get(place[:2], {})})
            methods.setdefault(line["method"], {})[line["seed"]] = line
    return dict(sorted(found.items()))


def line_pairs(one: Lines, other: Lines) -> list[tuple]:
    """The lines of two methods for every seed that they share; the base has one line for all."""
    if any(line["method"] == BASE for line in other.values()):
        other = dict.fromkeys(one, other[0])
    pairs = [(one[seed], other[seed]) for seed in sorted(one.keys() & other.keys())]
    for first, second in pairs:
        if not same_questions(first, second):
            raise InputError(f"{first['run']} and {second['run']} answered different questions: delete the "
                             f"older line, and run the plan again")
    return pairs


def same_questions(one: dict, other: dict) -> bool:
    """Of lines with other languages, by the sizes of the answers that are expected in those they share."""
    if one["language"] == other["language"]:
        return one["asked"] == other["asked"]
    both = one["questions"].keys() & other["questions"].keys()
    return all(one["questions"][language]["bytes"] == other["questions"][language]["bytes"]
               for language in both)


# -------------------------------------------------------------------------------------------------- questions

CLO, SFT, EQUAL, ANCHOR = "clo", "sft", "sft, clo's compute", "clo, anchor 1"
NOT_RUN = "Not run."
QUESTIONS = {                       # name of its plots: (question, pairs of methods)
    "target": ("1. Does CLO beat SFT in the target language, and does it keep English better? (paper: yes, "
               "both)", [(CLO, BASE), (CLO, SFT), (CLO, "sft-tgt"), (CLO, "sft+dpo")]),
    "sizes": ("2. Data efficiency: does CLO with n rows reach SFT with 2n? What do twice the rows bring to "
              "each?", []),
    "nll": ("3. NLL on the target alone, or on target and English? (paper: English brings the bias back)",
            [("clo, nll en,tgt", CLO)]),
    "train": ("4. Attention, LoRA, or full training? (paper: full helps in Swahili)",
              [("clo, attention", CLO), ("clo, full", CLO)]),
    "compute": ("5. What is left against SFT with CLO's compute?", [(CLO, EQUAL)]),
    "anchor": ("6. Beyond the paper: does the anchor cost the target anything, does it protect English?",
               [(ANCHOR, CLO), (ANCHOR, SFT)]),
    "two": ("6b. Two languages in one adapter, against one", [(CLO, CLO)]),
    "content": ("7. Where CLO is better: language choice, or content? Here content, on questions to which "
                "every reply of both is in the right language", [(CLO, SFT)])}


@dataclass(frozen=True)
class Comparison:
    """One method against another at a place."""
    plan: str
    label: str
    seeds: int
    languages: tuple[str, str]                                          # target, source
    told: tuple[dict[str, Difference], dict[str, Difference]]

    @property
    def sentence(self) -> str:
        """What the intervals support, and no more."""
        parts = [f"in {language} {verdicts(told)}" for language, told in zip(self.languages, self.told)]
        return f"- {self.label} ({self.seeds} seed{'s' * (self.seeds > 1)}): {'. And '.join(parts)}."


def verdicts(told: dict[str, Difference]) -> str:
    if not told:
        return "too few questions to tell"
    kinds = {"better": [], "worse": [], TIE: []}
    for found in told.values():
        kinds[found.verdict].append(found.figure.words)
        questions = found.questions
    parts = [f"{kind if kind == TIE else f'**{kind}**'} in {', '.join(words)}"
             for kind, words in kinds.items() if words]
    return f"({questions} questions) {'; '.join(parts)}"


def compare(name: str, lines: list[dict]) -> list[Comparison]:
    """What there is to a question."""
    places = by_place(lines)
    found = []
    for target, place, one, there, other in wanted_pairs(name, places):
        pairs = line_pairs(places.get(place, {}).get(one, {}), places.get(there, {}).get(other, {}))
        if pairs:
            languages = target, source_of(pairs[0][0])
            told = tuple(differences(pairs, language, name == "content") for language in languages)
            label = f"{place}: {one} against {other}{elsewhere(target, place, there)}"
            found.append(Comparison(place.plan, label, len(pairs), languages, told))
    return found


def elsewhere(target: str, place: Place, there: Place) -> str:
    """What of the other method, or of the figures, is not that of the place."""
    if there.rows != place.rows:
        return f" with {there.rows:,}"
    if there != place:
        return f" for {target} alone"
    return f", in {target}" if target != place.language else ""


def by_plan(compared: list[Comparison]) -> dict[str, list[Comparison]]:
    """A plot for each: a toy's differences are large beside those of a real model."""
    found = {}
    for one in compared:
        found.setdefault(one.plan, []).append(one)
    return found


def wanted_pairs(name: str, places) -> list[tuple]:
    """(target language, place, method, another place, its method) of all that a question compares."""
    wanted = []
    for place in places:
        targets = place.language.split(",")
        if name == "sizes":
            twice = place._replace(rows=2 * place.rows)
            wanted += [(targets[0], place, CLO, twice, SFT), (targets[0], twice, CLO, place, CLO),
                       (targets[0], twice, SFT, place, SFT)]
        for (one, other), target in itertools.product(QUESTIONS[name][1], targets):
            alone = place._replace(language=target)
            if name != "two":
                wanted.append((target, place, one, place, other))
            elif alone != place:
                wanted.append((target, place, one, alone, other))
    return wanted


def source_of(line: dict) -> str:
    return line["flags"].get("source", "en")


def section(name: str, compared: list[Comparison]) -> str:
    """A question, and its answer in sentences, in tables and in a plot."""
    text = [f"## {QUESTIONS[name][0]}"]
    if not compared:
        return "\n\n".join([*text, NOT_RUN])
    text.append("\n".join(one.sentence for one in compared))
    for side, title in enumerate(("target language", "source language")):
        names = [figure.name for figure in FIGURES if any(figure.name in one.told[side] for one in compared)]
        titles = [figure.title for figure in FIGURES if figure.name in names]
        rows = []
        for one in compared:
            cells = [one.told[side][figure].cell if figure in one.told[side] else "-" for figure in names]
            rows.append([one.label, *cells])
        text.append(table([title, *titles], rows))
    for plan in by_plan(compared):
        text.append(f"![Differences and their intervals, {plan}]({plot_name(name, plan)})")
    return "\n\n".join(text)


def plot_name(question: str, plan: str) -> str:
    return f"replication-{question}-{plan}.png"


# ------------------------------------------------------------------------------------------------------- page

INTRODUCTION = """# What CLO does, measured

Drawn by `python -m lab report` from the lines in `lab/results/`, which `python -m lab PLAN` leaves;
`lab/README.md` tells how to make the data and run the plans. Nothing here is written by hand: a difference is
called better or worse where its 95 % interval leaves out 0 (bold), and a tie otherwise. Intervals are paired
bootstraps over questions and seeds; three seeds tell little of what a fourth would give, and with one the
interval knows of questions alone. Of a hundred comparisons without any effect some five would still be called
one.

Figures, on the test questions. *in language*: % of replies in the language of the question; *correct*: %
equal to the expected answer, where all expected answers are short; *chrF* of replies against the expected
answers; *bits/byte*: what the expected answers cost the model (less is better); *confused*: % of questions
whose answer in the other language is likelier per byte than the right one (less is better); *like base*:
chrF of replies against those of the base model; *ends*: % of replies that end by themselves; *loops*: % that
were cut while they repeated one text again and again, which a larger limit would hardly end (the rest to 100
was cut at the limit in the middle of something); *tokens* that went through the model in training, a reference
pass counted like one more epoch; *seconds* of all training steps, which other work on the machine lengthens.
Of several seeds the mean stands before their values."""


def page(lines: list[dict]) -> str:
    """The text of docs/replication.md."""
    questions = [section(name, compare(name, lines)) for name in QUESTIONS]
    figures = [figure_section(place, methods) for place, methods in by_place(lines).items()]
    parts = [INTRODUCTION, settings_section(lines), *questions, grid_section(lines), *figures]
    return "\n\n".join(parts) + "\n"


def settings_section(lines: list[dict]) -> str:
    """What the runs of every plan share."""
    header = ["plan", "model", "lines", "questions", "max-new-tokens"]
    machine = ["dtype", "threads", "cpu", "gpu", "torch", "commit"]
    rows = []
    for plan in dict.fromkeys(line["plan"] for line in lines):
        own = [line | line["flags"] for line in lines if line["plan"] == plan]
        first, *_ = own[0]["questions"].values()
        shared = [", ".join(sorted({str(line[key] or "-") for line in own})) for key in machine]
        rows.append([plan, own[0]["model"], str(len(own)), str(len(first["bits"])),
                     str(own[0]["max-new-tokens"]), *shared])
    return "## Settings\n\n" + table([*header, *machine], rows)


def figure_section(place: Place, methods: dict[str, Lines]) -> str:
    """Every figure at a place, for each language a table."""
    text = [f"## Figures: {place}"]
    trained = [line for method, own in methods.items() for line in own.values() if method != BASE]
    for language in (*place.language.split(","), source_of(trained[0])):
        figures, rows = known_figures(trained, language), []
        for method, own in methods.items():
            cells = [seeds_cell(figure, list(own.values()), language) for figure in figures]
            for cost in ("tokens", "seconds"):
                mean = statistics.fmean(line[cost] for line in own.values()) if own else 0
                cells.append(f"{mean:,.0f}")
            rows.append([method, *cells])
        titles = [figure.title for figure in figures]
        text.append(table([language, *titles, "tokens", "seconds"], rows))
    return "\n\n".join(text)


def seeds_cell(figure: Figure, lines: list[dict], language: str) -> str:
    """The mean over seeds, and each seed's value."""
    if not lines or figure not in known_figures(lines, language):
        return "-"
    values = [float(figure.of_sums(figure.counts(line, language).sum(0))) for line in lines]
    mean, *each = (f"{value:.{figure.digits}f}" for value in (statistics.fmean(values), *values))
    return mean if len(values) == 1 else f"{mean} ({', '.join(each)})"


def grid_section(lines: list[dict]) -> str:
    """What was tried on the validation split."""
    rows = []
    header = ["plan", "language", "method", "rows", "settings", "bits/byte, target", "confused, target",
              "bits/byte, source", "confused, source"]
    for (plan, language, method), tried in by_method(lines).items():
        varied = varied_flags(tried)
        for line in tried:
            settings = ", ".join(f"{flag} {line['flags'].get(flag, '-')}" for flag in varied) or "-"
            cells = []
            for languages in (language.split(","), [source_of(line)]):
                cells += [figure_of(line, name, languages) for name in ("bits", "confused")]
            rows.append([plan, language, method, str(line["rows"]), settings, *cells])
    title = "## Settings tried on the validation split\n\n"
    return title + (table(header, rows) if rows else NOT_RUN)


def figure_of(line: dict, name: str, languages: list[str]) -> str:
    """A figure of the questions in these languages together; of the targets the bits that settings are chosen
    by (plan.target_bits)."""
    figure = next(figure for figure in FIGURES if figure.name == name)
    sums = sum(figure.counts(line, language).sum(0) for language in languages)
    return f"{float(figure.of_sums(sums)):.{figure.digits}f}"


def by_method(lines: list[dict]) -> dict[tuple, list[dict]]:
    """{(plan, language, method): its points of a grid}"""
    found = {}
    for line in lines:
        if line["split"] != "test":
            found.setdefault((line["plan"], line["language"], line["method"]), []).append(line)
    return found


def varied_flags(lines: list[dict]) -> list[str]:
    """The flags in which lines differ."""
    flags = dict.fromkeys(flag for line in lines for flag in line["flags"])
    return [flag for flag in flags if len({line["flags"].get(flag) for line in lines}) > 1]


# ----------------------------------------------------------------------------------------------------- README

README = hub.ROOT / "README.md"
BETWEEN = "<!-- drawn by python -m lab report -->\n", "<!-- to here -->"
SHOWN_PLOT = "replication-real.png"
SHOWN_PLACE = Place("portuguese-first", "pt", 50)
SHOWN_METHODS = (SFT, EQUAL, CLO, ANCHOR)
SHOWN_FIGURES = {"pt": ("language", "confused", "chrf", "bits", "loops"),
                 "en": ("language", "chrf", "bits", "kept", "loops")}


def shown_comparisons(lines: list[dict]) -> list[Comparison]:
    """Every method that README shows, against the untrained model."""
    methods, found = by_place(lines)[SHOWN_PLACE], []
    for method in SHOWN_METHODS:
        pairs = line_pairs(methods[method], methods[BASE])
        told = tuple(differences(pairs, language, content=False) for language in SHOWN_FIGURES)
        found.append(Comparison(SHOWN_PLACE.plan, method, len(pairs), tuple(SHOWN_FIGURES), told))
    return found


def summary(lines: list[dict], compared: list[Comparison]) -> str:
    """README's table: a row for every figure, a column for every method. Likeness to the base's replies is no
    difference: the base's own has no value."""
    methods, rows = by_place(lines)[SHOWN_PLACE], []

    def cell(figure, side, one):
        if figure.name == "kept":
            return seeds_cell(figure, list(methods[one.label].values()), one.languages[side])
        return one.told[side][figure.name].cell if figure.name in one.told[side] else "-"

    for side, (language, names) in enumerate(SHOWN_FIGURES.items()):
        base = list(methods[BASE].values())
        for figure in [figure for figure in FIGURES if figure.name in names]:
            cells = [cell(figure, side, one) for one in compared]
            rows.append([f"{language}: {figure.title}", seeds_cell(figure, base, language), *cells])
    rows.append(["seeds", "-", *(str(one.seeds) for one in compared)])
    return table(["", BASE, *SHOWN_METHODS], rows)


def with_summary(text: str, drawn: str) -> str:
    """README's text with this table in the place of the one that is there."""
    first, last = BETWEEN
    if text.count(first) != 1 or text.count(last) != 1 or text.index(last) < text.index(first):
        raise InputError(f"{README}: the lines {first.strip()} and {last} were expected once each, in this "
                         f"order, around the table")
    before, rest = text.split(first)
    _, after = rest.split(last)
    return f"{before}{first}{drawn}\n{last}{after}"


def write_readme(lines: list[dict]) -> None:
    """README's table, and its plot in docs/."""
    compared = shown_comparisons(lines)
    text = with_summary(README.read_text(encoding="utf-8"), summary(lines, compared))
    write_text(README, text)
    print(README)
    if plots.can_plot():
        plots.plot_differences(compared, DOCS / SHOWN_PLOT)
        print(DOCS / SHOWN_PLOT)


def write(lines: list[dict], directory: Path) -> None:
    """The page and its plots; without matplotlib the page alone."""
    write_text(directory / PAGE, page(lines))
    print(directory / PAGE)
    if not plots.can_plot():
        print("no plots: they need matplotlib (pip install matplotlib)")
        return
    for name in QUESTIONS:
        for plan, compared in by_plan(compare(name, lines)).items():
            path = directory / plot_name(name, plan)
            plots.plot_differences(compared, path)
            print(path)
