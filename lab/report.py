"""docs/replication.md, docs/replication-tables.md and README's table, drawn from the lines in lab/results/ and
nothing else. The first page answers the questions, the second has every figure of every comparison."""

import itertools
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from engine.files import InputError, write_text
from evals.report import table
from formats import hub
from lab import plots
from lab.figures import FIGURES, TIE, Difference, Figure, differences, known_figures
from lab.plan import BASE
from lab.runner import read_results

DOCS = hub.ROOT / "docs"
PAGE, TABLES = "replication.md", "replication-tables.md"


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
    return {place: found[place] for place in sorted(found, key=reading_order)}


def reading_order(place: Place) -> tuple:
    """Real models first, of them the one that README shows."""
    return is_toy(place.plan), place.plan != SHOWN_PLACE.plan, place


def is_toy(plan: str) -> bool:
    return plan.startswith("demo")


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

CLO, SFT, EQUAL = "clo", "sft", "sft, clo's compute"
HALF = "clo, lambda 0.5"                        # and beta 0.5; clo's defaults are 0.8, 0.1 and an anchor
BARE = "clo, anchor 0"                          # the paper's loss
BARE_HALF = f"{BARE}, lambda 0.5"
SLOW_DPO = "sft+dpo, dpo at 0.0001"             # a thirtieth of SFT's rate
ONE_RATE_DPO = "sft+dpo, one rate"              # that of its first stage, which is too high for the second
FAST, FAST_SFT = "clo, rate 0.006", "sft, rate 0.006"      # twice the rate that was chosen
TUNED = "clo, beta and lambda"                  # the best of a grid
NOT_RUN = "Not run."
HALF_THE_RATE = {"demo-rate": "demo"}           # plans that differ in it alone
CURVES = (BASE, SFT, BARE, HALF, CLO)           # methods whose figures are drawn by rows, the base's a level
QUESTIONS = {                       # name of its plots: (question, pairs of methods)
    "target": ("1. Does CLO beat SFT in the target language, and does it keep English better? (paper: yes, "
               "both)", [(CLO, SFT), (BARE, SFT), (HALF, SFT), (BARE_HALF, SFT), (TUNED, SFT), (CLO, "sft-tgt"),
                         (CLO, "sft+dpo"), (CLO, SLOW_DPO), (SLOW_DPO, SFT), (CLO, ONE_RATE_DPO),
                         (ONE_RATE_DPO, SFT), (BARE_HALF, "sft-tgt"), (BARE_HALF, ONE_RATE_DPO),
                         (FAST, SFT), (FAST, FAST_SFT), (FAST, CLO)]),
    "base": ("1b. What does each of them change of the untrained model?",
             [(CLO, BASE), (BARE, BASE), (SFT, BASE), (EQUAL, BASE)]),
    "sizes": ("2. Data efficiency: does CLO with n rows reach SFT with 2n? What do twice the rows bring to "
              "each?", []),
    "nll": ("3. NLL on the target alone, or on target and English? (paper: English brings the bias back)",
            [(f"{CLO}, nll en,tgt", CLO), (f"{BARE_HALF}, nll en,tgt", BARE_HALF)]),
    "train": ("4. Attention, LoRA, or full training? (paper: full helps in Swahili)",
              [(f"{CLO}, attention", CLO), (f"{CLO}, full", CLO),
               (f"{BARE_HALF}, attention", BARE_HALF), (f"{BARE_HALF}, full", BARE_HALF)]),
    "compute": ("5. What is left against SFT with CLO's compute, that is with as many tokens?",
                [(CLO, EQUAL), (BARE, EQUAL), (BARE_HALF, EQUAL)]),
    "anchor": ("6. Beyond the paper: does the anchor cost the target anything, does it protect English?",
               [(CLO, BARE), (HALF, BARE_HALF)]),
    "two": ("6b. Two languages in one adapter, against one", [(CLO, CLO), (BARE_HALF, BARE_HALF)]),
    "rate": ("6c. LoRA at the learning rate that is the default, against half of it",
             [(HALF, HALF), (BARE_HALF, BARE_HALF), (SFT, SFT)]),
    "settings": ("6d. Another beta and lambda, or beta and rate, against 0.5 and 0.5",
                 [(CLO, HALF), (TUNED, HALF), (f"{HALF}, beta and rate", HALF)]),
    "content": ("7. Where CLO is better: language choice, or content? Here content, on questions to which "
                "every reply of both is in the right language",
                [(CLO, SFT), (BARE, SFT), (BARE_HALF, SFT)])}
# What the questions are decided by: (0 target or 1 source language, figure). All else explains or explores.
PRIMARY = ((0, "language"), (0, "usable"), (0, "chrf each"), (0, "bits"),
           (1, "usable"), (1, "chrf each"), (1, "bits"))
# Plans with one seed, or with rates that are neither chosen nor the default: answers show them where there are
# no others.
ASIDE = ("portuguese-first", "demo", "demo-languages", "demo-settings")
# What is shown in short: the default and the paper's loss, against SFT.
SHORT_METHODS, SHORT_OTHERS = (CLO, BARE), (SFT, EQUAL)
# And what the answers' tables show: confusion, too.
SHOWN_IN_ANSWERS = (*PRIMARY[:4], (0, "confused"), *PRIMARY[4:], (1, "confused"))
SIDES = ("target", "source")


@dataclass(frozen=True)
class Comparison:
    """One method against another at a place."""
    plan: str
    label: str
    method: str
    other: str                                                          # the method it is compared with
    seeds: int
    languages: tuple[str, str]                                          # target, source
    told: tuple[dict[str, Difference], dict[str, Difference]]

    def cell(self, key: tuple[int, str]) -> str:
        """key: side, name of a figure."""
        side, name = key
        return self.told[side][name].cell if name in self.told[side] else "-"

    @property
    def sentence(self) -> str:
        """What the intervals support, and no more."""
        parts = [f"in {language} {verdicts(told)}" for language, told in zip(self.languages, self.told)]
        return f"- {self.label} ({self.seeds} seed{'s' * (self.seeds > 1)}): {'. And '.join(parts)}."


def verdicts(told: dict[str, Difference]) -> str:
    if not told:
        return "too few questions to tell"
    kinds = {"better": [], "worse": [], "higher": [], "lower": [], TIE: []}
    for found in told.values():
        kinds[found.verdict].append(found.figure.words)
        questions = found.questions
    ties = kinds.pop(TIE)
    parts = [f"**{kind}** in {', '.join(words)}" for kind, words in kinds.items() if words]
    if ties:
        rest = f"the other {len(ties)}" if parts else f"all {len(ties)}"
        parts.append(f"{TIE} in {rest if len(ties) > 1 else ties[0]}")
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
            where = f"{place.language}, {place.rows:,} rows"
            label = f"{where}: {one} against {other}{elsewhere(target, place, there)}"
            found.append(Comparison(place.plan, label, one, other, len(pairs), languages, told))
    return found


def elsewhere(target: str, place: Place, there: Place) -> str:
    """What of the other method, or of the figures, is not that of the place."""
    if there.rows != place.rows:
        return f" with {there.rows:,}"
    if there.plan != place.plan:
        return f" of {there.plan}"
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
            kinds = CLO, BARE, HALF, BARE_HALF
            wanted += [(targets[0], place, method, twice, SFT) for method in kinds]
            wanted += [(targets[0], twice, method, place, method) for method in (SFT, *kinds)]
        there = place
        if name == "rate":
            there = place._replace(plan=HALF_THE_RATE.get(place.plan, ""))
        for (one, other), target in itertools.product(QUESTIONS[name][1], targets):
            if name == "two":
                there = place._replace(language=target)
            if name != "two" or there != place:
                wanted.append((target, place, one, there, other))
    return wanted


def source_of(line: dict) -> str:
    return line["flags"].get("source", "en")


def section(name: str, compared: list[Comparison]) -> str:
    """A question, and for each plan that answers it its answer: in sentences, in a table of the figures that
    decide and of confusion, and in a plot."""
    text = [f"## {QUESTIONS[name][0]}"]
    if not compared:
        text.append(NOT_RUN)
    shown = by_plan(answering(compared))
    for plan, own in shown.items():
        text.append(f"### {plan}")
        text.append("\n".join(one.sentence for one in own))
        text.append(comparison_table(own, SHOWN_IN_ANSWERS))
        if plots.has_panels(drawn_of(own)):
            text.append(f"![Differences and their intervals, {plan}]({plot_name(name, plan)})")
    if aside := [plan for plan in by_plan(compared) if plan not in shown]:
        text.append(f"Figures of {', '.join(aside)}: [{TABLES}]({TABLES}).")
    return "\n\n".join(text)


def answering(compared: list[Comparison]) -> list[Comparison]:
    """Those of the plans that answer a question."""
    return [one for one in compared if one.plan not in ASIDE] or compared


def drawn_of(compared: list[Comparison]) -> list[Comparison]:
    """Those that a plot shows. DPO at SFT's own rate is so far off that no other difference could be seen."""
    return [one for one in compared if ONE_RATE_DPO not in (one.method, one.other)]


def comparison_table(compared: list[Comparison], keys: tuple, several_plans: bool = False) -> str:
    """A line for each comparison. keys: (side, name of a figure); columns that would be empty are left out.
    several_plans: each line names its own."""
    known = [(side, name) for side, name in keys if any(name in one.told[side] for one in compared)]
    rows = []
    for one in compared:
        label = f"{one.plan}, {one.label}" if several_plans else one.label
        rows.append([label, str(one.seeds), *map(one.cell, known)])
    return table(["", "seeds", *titles(known)], rows)


def titles(keys) -> list[str]:
    """Of columns. keys: (side, name of a figure)."""
    named = {figure.name: figure.title for figure in FIGURES}
    return [f"{SIDES[side]}: {named[name]}" for side, name in keys]


def every_figure(name: str, compared: list[Comparison]) -> str:
    """The same comparisons in all figures, a table for each side."""
    text = [f"## {QUESTIONS[name][0]}"]
    for side, title in enumerate(SIDES):
        keys = tuple((side, figure.name) for figure in FIGURES)
        text += [f"### {title} language", comparison_table(compared, keys, several_plans=True)]
    return "\n\n".join(text)


def primary_section(compared: list[Comparison]) -> str:
    """CLO against SFT in the figures that decide."""
    shown = [one for one in compared if one.method in SHORT_METHODS and one.other in SHORT_OTHERS
             and one.plan not in ASIDE]
    if not shown:
        return f"## In short\n\n{NOT_RUN}"
    return "\n\n".join(["## In short", IN_SHORT, verdict_table(shown),
                        comparison_table(shown, PRIMARY, several_plans=True)])


def verdict_table(compared: list[Comparison]) -> str:
    """On real models, at how many places each pair of methods is better, worse, or ties, figure by figure."""
    real, rows = {}, []
    for one in compared:
        if not is_toy(one.plan):
            real.setdefault((one.method, one.other), []).append(one)
    for (method, other), own in real.items():
        cells = []
        for side, name in SHOWN_IN_ANSWERS:
            found = [one.told[side][name].verdict for one in own if name in one.told[side]]
            cells.append(" / ".join(str(found.count(verdict)) for verdict in ("better", "worse", TIE)))
        rows.append([f"{method} against {other}", *cells])
    return table(["", *titles(SHOWN_IN_ANSWERS)], rows)


def plot_name(question: str, plan: str) -> str:
    return f"replication-{question}-{plan}.png"


Curves = dict[tuple[int, str], dict[str, dict[int, list[float]]]]     # {panel: {method: {rows: seeds' values}}}


def curves(lines: list[dict]) -> dict[str, Curves]:
    """{"plan-language": figures by rows} where methods were run with several numbers of rows."""
    found = {}
    for place, methods in by_place(lines).items():
        if "," in place.language or place.plan in ASIDE:
            continue
        key = f"{place.plan}-{place.language}"
        for side, name in SHOWN_IN_ANSWERS[:-1]:
            figure = next(figure for figure in FIGURES if figure.name == name)
            for method in CURVES:
                own = list(methods.get(method, {}).values())
                if not own:
                    continue
                language = (place.language, source_of(own[0]))[side]
                if figure in known_figures(own, language):
                    values = [float(figure.of_sums(figure.counts(line, language).sum(0))) for line in own]
                    told = found.setdefault(key, {}).setdefault((side, figure.title), {})
                    told.setdefault(method, {})[place.rows] = values
    return {key: told for key, told in found.items() if most_sizes(told) >= 3}


def most_sizes(told: Curves) -> int:
    """Of a trained method; the base has every place's."""
    sizes = [len(by_rows) for methods in told.values() for method, by_rows in methods.items() if method != BASE]
    return max(sizes, default=0)


def curves_name(key: str) -> str:
    return f"replication-curves-{key}.png"


# ------------------------------------------------------------------------------------------------------- page

INTRODUCTION = """# What CLO does, measured

Drawn by `python -m lab report` from the lines in `lab/results/`, which `python -m lab PLAN` leaves;
`lab/README.md` tells how to make the data and run the plans. Nothing here is written by hand. A difference is
called better or worse where its 95 % interval leaves out 0 (bold), and a tie otherwise. The interval covers a
paired bootstrap over questions and seeds and, of several seeds, Student's t of their differences: three seeds
tell little of what a fourth would give, and with one the interval knows of questions alone. Of a hundred
comparisons without any effect some five may still be called one, and there are hundreds here: the figures
under "In short" are those that decide, the rest explains and explores. Tables here show those and confusion;
every figure of every comparison, and each seed's value, is in [replication-tables.md](replication-tables.md).

Figures, on the test questions. *in language*: % of replies in the language of the question, as a classifier
of the run's languages has it (a reply in a close relative, Spanish for Portuguese, mostly passes); *usable*: %
that are in it, end by themselves and do not begin by repeating the question (made-up words pass here; chrF and
bits notice them); *correct*: % equal to the expected answer, where all expected answers are short; *chrF* of all
replies together against the expected answers, to which a reply caught in a loop counts by its length;
*chrF/question*: the mean of each reply's own;
*bits/byte*: what the expected answers cost the model (less is better); *confused*: % of questions whose
answer in the other language is likelier per byte than the right one (less is better; nearest to what CLO
trains on, and no reply is looked at); *like base*: chrF of replies against those of the base model, of which
the base has 100; SFT trains on English answers too and moves to their style, so this is change, and not
harm; *ends*: % of replies that end by themselves; *loops*: % that were cut while they repeated one text
again and again, which a larger limit would hardly end (the rest to 100 was cut at the limit in the middle of
something); *echo*: % that begin with the question's own words."""
EVERY_FIGURE = """# Every figure

What [replication.md](replication.md) draws its answers from: differences of methods in all figures, question by
question (bold where the 95 % interval leaves out 0), then the figures of each method at each place. Of several
seeds the mean stands before their values. *tokens* went through the model in training, a reference pass counted
like one more epoch though it has no backward; *seconds* of all training steps, which other work on the machine
lengthens. All other figures are explained there."""
IN_SHORT = """Each difference is CLO less SFT at one place. "clo" is this program's default, with an anchor of 1, beta 0.1 and
lambda 0.8; "clo, anchor 0" is the paper's loss, with the same beta and lambda, which the paper leaves open; in "clo,
lambda 0.5", further down, beta is 0.5 too. "sft, clo's compute" is SFT with as many tokens through the model as CLO.
Here are the plans whose learning rates were chosen on a validation split (portuguese, where clo's was chosen by hand
and is 0.001 bits from its best; chinese takes these rates) or are the default (demo-rate); the others stand in the
tables, and here where these leave a question open. The expected answers are machine translations, so chrF and bits
reward their style in every method alike. First, at how many places on a real model it is better / worse / a tie; then
the differences."""


def compare_all(lines: list[dict]) -> dict[str, list[Comparison]]:
    return {name: compare(name, lines) for name in QUESTIONS}


def pages(lines: list[dict], compared: dict[str, list[Comparison]]) -> dict[str, str]:
    """{name of a file in docs/: its text}"""
    answers = []
    for name in QUESTIONS:
        answers.append(section(name, compared[name]))
        if name == "sizes":
            answers += [f"![Figures by rows, {key}]({curves_name(key)})" for key in curves(lines)]
    short = primary_section(compared["target"] + compared["compute"])
    tables = [every_figure(name, own) for name, own in compared.items() if own]
    figures = [figure_section(place, methods) for place, methods in by_place(lines).items()]
    parts = {PAGE: [INTRODUCTION, short, *answers, settings_section(lines), grid_section(lines)],
             TABLES: [EVERY_FIGURE, *tables, *figures]}
    return {name: "\n\n".join(text) + "\n" for name, text in parts.items()}


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
    """What was tried on the validation split, and what the base is worth there."""
    rows = []
    header = ["plan", "language", "method", "rows", "settings"]
    for side in SIDES:
        header += [f"{title}, {side}" for title in ("bits/byte", "confused", "usable", "chrF/question")]
    header.append("like base, source")
    for (plan, language, method), tried in by_method(lines).items():
        varied = varied_flags(tried)
        for line in sorted(tried, key=lambda line: [str(line["flags"].get(flag)) for flag in varied]):
            settings = ", ".join(f"{flag} {line['flags'].get(flag, '-')}" for flag in varied) or "-"
            cells = []
            for languages in (language.split(","), [source_of(line)]):
                cells += [figure_of(line, name, languages) for name in ("bits", "confused", "usable", "chrf each")]
            cells.append(figure_of(line, "kept", [source_of(line)]))
            rows.append([plan, language, method, str(line["rows"]), settings, *cells])
    title = "## Settings tried on the validation split\n\n"
    return title + (table(header, rows) if rows else NOT_RUN)


def figure_of(line: dict, name: str, languages: list[str]) -> str:
    """A figure of the questions in these languages together; of the targets the bits that settings are chosen
    by (plan.target_bits)."""
    figure = next(figure for figure in FIGURES if figure.name == name)
    if not all(figure.known(line["questions"][language]) for language in languages):
        return "-"
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
SHOWN_PLACE = Place("portuguese", "pt", 200)
SHOWN = {"clo - sft": (CLO, SFT),                                       # name of the column: what is compared
         "clo - base": (CLO, BASE),
         "lambda 0.5: clo - sft": (HALF, SFT)}
SHOWN_FIGURES = {"pt": ("language", "usable", "chrf each", "bits", "confused"),
                 "en": ("usable", "chrf each", "bits", "kept")}


def shown_comparisons(lines: list[dict]) -> list[Comparison]:
    """CLO less SFT, less the base, and CLO with another weight, as far as they were run."""
    methods, found = by_place(lines)[SHOWN_PLACE], []
    for label, (method, other) in SHOWN.items():
        pairs = line_pairs(methods.get(method, {}), methods.get(other, {}))
        if pairs:
            told = tuple(differences(pairs, language, content=False) for language in SHOWN_FIGURES)
            found.append(Comparison(SHOWN_PLACE.plan, label, method, other, len(pairs), tuple(SHOWN_FIGURES), told))
    return found


def summary(lines: list[dict], compared: list[Comparison]) -> str:
    """README's table: a row for every figure, the values of base, SFT and CLO, and the differences."""
    methods, rows = by_place(lines)[SHOWN_PLACE], []
    valued = {"base": BASE, "sft": SFT, "clo": CLO}
    for side, (language, names) in enumerate(SHOWN_FIGURES.items()):
        for figure in [figure for figure in FIGURES if figure.name in names]:
            values = [mean_cell(figure, list(methods[method].values()), language) for method in valued.values()]
            cells = [one.cell((side, figure.name)) for one in compared]
            rows.append([f"{language}: {figure.title}", *values, *cells])
    seeds = [str(len(methods[method])) for method in (SFT, CLO)]
    rows.append(["seeds", "-", *seeds, *(str(one.seeds) for one in compared)])
    return table(["", *valued, *(one.label for one in compared)], rows)


def mean_cell(figure: Figure, lines: list[dict], language: str) -> str:
    """Of the base's likeness to itself: 100."""
    if figure.name == "kept" and lines[0]["method"] == BASE:
        return "100"
    return seeds_cell(figure, lines, language).split(" ")[0]


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
    """The pages and the plots; without matplotlib the pages alone."""
    compared = compare_all(lines)
    for name, text in pages(lines, compared).items():
        write_text(directory / name, text)
        print(directory / name)
    if not plots.can_plot():
        print("no plots: they need matplotlib (pip install matplotlib)")
        return
    drawn = {SHOWN_PLOT}
    for name, own in compared.items():
        for plan, of_plan in by_plan(answering(own)).items():
            if plots.has_panels(drawn_of(of_plan)):
                drawn.add(plot_name(name, plan))
                plots.plot_differences(drawn_of(of_plan), directory / plot_name(name, plan))
    for key, told in curves(lines).items():
        drawn.add(curves_name(key))
        plots.plot_curves(told, CURVES, directory / curves_name(key))
    print(f"{directory}: {len(drawn) - 1} plots")
    for path in directory.glob("replication-*.png"):
        if path.name not in drawn:
            path.unlink()
            print(f"{path} showed lines that are gone: deleted")
