"""The report of one run: figures of the answers, held-out log-probs, and a sentence on what has changed.

Every figure is computed from answers.jsonl (figures.py), so that the report, its closing sentence and all
comparisons agree. This knows nothing of models: clo.py prints and writes the text.
"""

import json

from evals.figures import (FIGURES, SHORT_ANSWER, SHORT_REPLY, Difference, Sample, languages_told, measure,
                           paired_difference)


def table(header: list[str], lines: list[list[str]]) -> str:
    """A table that reads well in a terminal and is Markdown; the first column is left-aligned."""
    widths = [max(map(len, column)) for column in zip(header, *lines)]
    rule = ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]]
    rows = [aligned(cells, widths) for cells in (header, rule, *lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def aligned(cells: list[str], widths: list[int]) -> list[str]:
    first, *others = zip(cells, widths)
    return [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]


def with_error(value: float, error: float | None, digits: int) -> str:
    shown = f"{value:.{digits}f}"
    return shown if error is None else f"{shown} ± {error:.{digits}f}"


# ----------------------------------------------------------------------------------------- report of one run

EXAMPLE_WIDTH = 300                 # characters shown of an example reply
EXPLAINED = {
    "correct": "% equal to the expected answer but for case, spaces and final punctuation; told where every "
               f"expected answer is at most {SHORT_ANSWER} letters wide",
    "right_language": "% of replies in the language of the question",
    "chrf": "character n-grams in common with the expected answers, 0 to 100, all replies taken together",
    "bits_per_byte": "what the expected answers cost the model; lower is better",
    "length": "characters of the replies in % of those of the expected answers",
    "ends": "% of replies that end by themselves"}
# columns of what figures.languages_told counts
LANGUAGES_TOLD = ("in another of these", "unsure", "in two", "in none of these",
                  f"under {SHORT_REPLY} letters", "of them right")


def side(language: str, source: str, lang: str) -> str:
    """What a run's held-out metrics call a language:
    en the source, tgt its one target, tgt_sw one of several."""
    if language == source:
        return "en"
    return "tgt" if language == lang else f"tgt_{language}"


def report_text(report: dict, answers: dict[str, list[dict]], source: str, examples: int = 2) -> str:
    """report.md: what changed, figures of the answers, held-out log-probs, and the first few answers of every
    method side by side. The report's "lang" is the target language, or several joined by commas."""
    methods, languages = report["methods"], [source, *report["lang"].split(",")]
    decoding = json.dumps(next(iter(methods.values())).get("decoding"))
    training = [f"{name} {scores['train_seconds']:.0f} s" for name, scores in methods.items()
                if name != "base"]
    return "\n\n".join([
        f"# {report['lang']}: {report['samples']} samples, seed {report['seed']}",
        *closing_lines(answers),
        *answer_section(methods, answers, languages),
        *language_section(methods, answers, languages),
        *heldout_section(methods, languages, report["lang"]),
        f"Training took {', '.join(training) or 'no time'}. Decoding: {decoding}; "
        f"hashes of model and data: config.json.",
        *example_sections(answers, languages, examples)]) + "\n"


def answer_section(methods: dict, answers: dict[str, list[dict]], languages: list[str]) -> list[str]:
    """A row for each language and method, a column for each figure that one of them has."""
    samples = {(language, name): measure(in_language(answers[name], language))
               for language in languages for name in methods}
    known = set().union(*samples.values())
    figures = [figure for figure in FIGURES if figure.name in known]
    lines = []
    for (language, name), found in samples.items():
        cells = [shown_sample(found.get(figure.name)) for figure in figures]
        lines.append([language, name, *cells])
    asked = len(in_language(next(iter(answers.values())), languages[0]))
    of_all = next(iter(methods.values())).get("questions", asked)
    first = f"the first {asked} of {of_all} questions" if asked < of_all else f"{asked} questions"
    legend = [f"- {figure.title}: {EXPLAINED[figure.name]}" for figure in figures]
    return ["\n".join([f"Answers to {first} in each language, ± standard error over questions:", *legend]),
            table(["language", "method", *(figure.title for figure in figures)], lines)]


def in_language(lines: list[dict], language: str) -> list[dict]:
    return [line for line in lines if line["language"] == language]


def shown_sample(sample: Sample | None) -> str:
    return "-" if sample is None else with_error(sample.value, sample.error, sample.figure.digits)


def language_section(methods: dict, answers: dict[str, list[dict]], languages: list[str]) -> list[str]:
    """In which languages the replies are that are not in the right one, counted; and the very short ones
    apart, whose language is hard to tell."""
    lines, equal = [], {}
    for language in languages:
        for name in methods:
            found = in_language(answers[name], language)
            counts = languages_told(found)
            judged = counts.pop("n_language")
            equal[language] = len(found) - judged
            if any(counts.values()):
                lines.append([language, name, str(judged), *map(str, counts.values())])
    same = [f"{count} of {language}" for language, count in equal.items() if count]
    parts = []
    if same:
        parts += [f"Answers that are the same in another language are left out of the language figures: "
                  f"{', '.join(same)}."]
    if lines:
        parts += ["Replies not in the language of the question (none of these counts as right), and those so "
                  "short that their language is hard to tell:",
                  table(["language", "method", "replies", *LANGUAGES_TOLD], lines)]
    return parts


def heldout_section(methods: dict, languages: list[str], lang: str) -> list[str]:
    lines = []
    for language in languages:
        place = side(language, languages[0], lang)
        for name, scores in methods.items():
            values = [scores["heldout"].get(f"{key}_{place}")
                      for key in ("nll", "rewards/accuracies", "rewards/margins")]
            cells = ["-" if value is None else f"{value:.3f}" for value in values]
            lines.append([language, name, *cells])
    return ["Held-out pairs: NLL per token of the right response (lower is better), "
            "and how often (accuracy) and by how much (margin) training moved the right response up "
            "against the wrong one.",
            table(["language", "method", "nll", "accuracy", "margin"], lines)]


def example_sections(answers: dict[str, list[dict]], languages: list[str], examples: int) -> list[str]:
    """The first few questions in each language, with the expected answer and every method's reply below."""
    sections = []
    for language in languages:
        replies = {name: in_language(lines, language)[:examples] for name, lines in answers.items()}
        for lines in zip(*replies.values()):
            text = [on_one_line(lines[0]["prompt"]), f"- expected: {on_one_line(lines[0]['expected'])}"]
            text += [f"- {name}: {on_one_line(line['reply'])}" for name, line in zip(replies, lines)]
            sections.append("\n".join(text))
    return sections


def on_one_line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= EXAMPLE_WIDTH else text[:EXAMPLE_WIDTH] + "…"


# -------------------------------------------------------------------------------------------- what has changed

CHANGES = {"right_language": "replies in {}", "correct": "correct", "chrf": "chrF",
           "bits_per_byte": "bits per byte"}


def closing_lines(answers: dict[str, list[dict]]) -> list[str]:
    """A sentence for each language: what the last method changed against each of those before it (the base,
    the baseline). answers: {method: lines of its answers.jsonl}."""
    *others, method = answers
    if not others:
        return []
    lines = []
    for language in dict.fromkeys(line["language"] for line in answers[method]):
        samples = {name: measure(in_language(found, language)) for name, found in answers.items()}
        parts = [f"against {other}: {changes(samples[method], samples[other], language)}" for other in others]
        lines.append(f"{language}: {method} {'; '.join(parts)}.")
    return [*lines, "(± standard error of the difference, paired by question; a tie: its 95 % interval holds 0)"]


def changes(one: dict[str, Sample], other: dict[str, Sample], language: str) -> str:
    told = []
    for name, title in CHANGES.items():
        found = name in one and name in other and paired_difference([one[name]], [other[name]])
        if found:
            unit = " points" if one[name].figure.is_share else ""
            verdict = f" ({found.verdict})" if found.verdict else ""
            told.append(f"{title.format(language)} {shown_difference(found, one[name].figure.digits)}"
                        f"{unit}{verdict}")
    return ", ".join(told) or "nothing to compare"


def shown_difference(found: Difference, digits: int) -> str:
    return f"{found.value:+.{digits}f} ± {found.error:.{digits}f}"
