"""The report of one run: figures of the answers, held-out log-probs, and a sentence on what has changed.

Every figure is computed from answers.jsonl (figures.py), so that the report, its closing sentence and all
comparisons agree. This knows nothing of models: clo.py prints and writes the text.
"""

import json

from evals.figures import (FIGURES, SHORT_ANSWER, SHORT_REPLY, Difference, Sample, is_loop, languages_told,
                           measure, paired_difference)

Answers = dict[str, list[dict]]     # {method: lines of its answers.jsonl}
Answered = list[tuple[str, str, list[dict]]]        # of every table: (language, method, its answers)


def table(header: list[str], lines: list[list[str]]) -> str:
    """A table that reads well in a terminal and is Markdown; the first column is left-aligned."""
    columns = zip(header, *lines)
    first, *others = [max(map(len, column)) for column in columns]
    rule = ["-" * first]
    rule += ["-" * (width - 1) + ":" for width in others]
    text = []
    for cells in (header, rule, *lines):
        row = [cells[0].ljust(first)]
        row += [cell.rjust(width) for cell, width in zip(cells[1:], others)]
        text.append("| " + " | ".join(row) + " |")
    return "\n".join(text)


def shown(figure: dict | None) -> str:
    """A figure's {"value", "stderr", "digits"} in a cell, as far as they are known."""
    if figure is None:
        return "-"
    digits, error = figure.get("digits", 2), figure.get("stderr")
    text = f"{figure['value']:.{digits}f}"
    return text if error is None else f"{text} ± {error:.{digits}f}"


# ----------------------------------------------------------------------------------------- report of one run

EXAMPLES = 2                        # questions shown in each language, with every method's reply
EXAMPLE_WIDTH = 300                 # characters shown of one
EXPLAINED = {
    "correct": "% equal to the expected answer but for case, spaces and final punctuation; told where every "
               f"expected answer is at most {SHORT_ANSWER} letters wide",
    "right_language": "% of replies in the language of the question",
    "chrf": "character n-grams in common with the expected answers, 0 to 100, all replies taken together",
    "bits_per_byte": "what the expected answers cost the model; lower is better",
    "length": "characters of the replies in % of those of the expected answers",
    "ends": "% of replies that end by themselves"}
HELD_OUT = {"nll": "nll", "accuracy": "rewards/accuracies", "margin": "rewards/margins"}
# columns of what figures.languages_told counts
LANGUAGES_TOLD = ("in another of these", "unsure", "in two", "in none of these",
                  f"under {SHORT_REPLY} letters", "of them right")


def side(language: str, source: str, lang: str) -> str:
    """What a run's held-out metrics call a language:
    en the source, tgt its one target, tgt_sw one of several."""
    if language == source:
        return "en"
    return "tgt" if language == lang else f"tgt_{language}"


def report_text(report: dict, answers: Answers, source: str) -> str:
    """report.md: what changed, figures of the answers, held-out log-probs, and the first few answers of every
    method side by side. The report's "lang" is the target language, or several joined by commas."""
    lang, methods = report["lang"], report["methods"]
    languages = [source, *lang.split(",")]
    any_method = next(iter(methods.values()))
    rows = []
    for language in languages:
        rows += [(language, name, in_language(lines, language)) for name, lines in answers.items()]
    training = [f"{name} {scores['train_seconds']:.0f} s"
                for name, scores in methods.items() if name != "base"]
    sections = [
        f"# {lang}: {report['samples']} samples, seed {report['seed']}",
        *closing_lines(answers),
        *answer_section(rows, any_method.get("questions")),
        *cut_section(rows),
        *language_section(rows),
        *heldout_section(methods, languages, lang),
        f"Training took {', '.join(training) or 'no time'}, reference passes and validations included (not "
        f"those of a command that was stopped). Decoding: {json.dumps(any_method.get('decoding'))}; hashes "
        f"of model and data: config.json.",
        *example_sections(rows)]
    return "\n\n".join(sections) + "\n"


def in_language(lines: list[dict], language: str) -> list[dict]:
    return [line for line in lines if line["language"] == language]


def answer_section(rows: Answered, questions: int | None) -> list[str]:
    """A row for each language and method, a column for each figure that one of them has. questions: how many
    there were to answer, if that is known."""
    samples = [measure(lines) for _, _, lines in rows]
    known = set().union(*samples)
    figures = [figure for figure in FIGURES if figure.name in known]
    cells = []
    for (language, name, lines), found in zip(rows, samples):
        results = {key: sample.summary() for key, sample in found.items()}
        values = [shown(results.get(figure.name)) for figure in figures]
        cells.append([language, name, *values])
    asked = len(rows[0][2])
    which = f"the first {asked} of {questions}" if questions and asked < questions else str(asked)
    legend = [f"Answers to {which} questions in each language, ± standard error over questions:"]
    legend += [f"- {figure.title}: {EXPLAINED[figure.name]}" for figure in figures]
    titles = [figure.title for figure in figures]
    return ["\n".join(legend), table(["language", "method", *titles], cells)]


def cut_section(rows: Answered) -> list[str]:
    """How many replies were cut, and how many of these would not end at any length."""
    counts = []
    for language, name, lines in rows:
        cut = [line["reply"] for line in lines if not line.get("ends", True)]
        if cut:
            counts.append(f"{language} {name} {len(cut)} ({sum(map(is_loop, cut))})")
    if not counts:
        return []
    return ["Replies cut at --max-new-tokens, in brackets those that repeat one text again and again, which "
            f"a larger limit would hardly end: {', '.join(counts)}."]


def language_section(rows: Answered) -> list[str]:
    """In which languages the replies are that are not in the right one, counted; and the very short ones
    apart, whose language is hard to tell."""
    cells, left_out, parts = [], {}, []
    for language, name, lines in rows:
        judged, *counts = languages_told(lines).values()
        left_out[language] = len(lines) - judged
        if any(counts):
            cells.append([language, name, *map(str, (judged, *counts))])
    same = [f"{count} of {language}" for language, count in left_out.items() if count]
    if same:
        parts += [f"Answers that are the same in another language are left out of the language figures: "
                  f"{', '.join(same)}."]
    if cells:
        parts += ["Replies not in the language of the question (none of these counts as right), and those so "
                  "short that their language is hard to tell:",
                  table(["language", "method", "replies", *LANGUAGES_TOLD], cells)]
    return parts


def heldout_section(methods: dict, languages: list[str], lang: str) -> list[str]:
    lines = []
    for language in languages:
        place = side(language, languages[0], lang)
        for name, scores in methods.items():
            values = [scores["heldout"].get(f"{figure}_{place}") for figure in HELD_OUT.values()]
            cells = ["-" if value is None else f"{value:.3f}" for value in values]
            lines.append([language, name, *cells])
    return ["Held-out pairs: NLL per token of the right response (lower is better), "
            "and how often (accuracy) and by how much (margin) training moved the right response up "
            "against the wrong one.",
            table(["language", "method", *HELD_OUT], lines)]


def example_sections(rows: Answered) -> list[str]:
    """The first few questions in each language, with the expected answer and every method's reply below."""
    sections = {}
    for language, name, lines in rows:
        for number, line in enumerate(lines[:EXAMPLES]):
            start = on_one_line(line["prompt"]) + "\n- expected: " + on_one_line(line["expected"])
            text = sections.get((language, number), start)
            sections[language, number] = text + f"\n- {name}: " + on_one_line(line["reply"])
    return list(sections.values())


def on_one_line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= EXAMPLE_WIDTH else text[:EXAMPLE_WIDTH] + "…"


# ------------------------------------------------------------------------------------------- what has changed

CHANGES = {"right_language": "replies in {}", "correct": "correct", "chrf": "chrF",
           "bits_per_byte": "bits per byte"}


def closing_lines(answers: Answers) -> list[str]:
    """A sentence for each language: what the last method changed against each of those before it (the base,
    the baseline)."""
    *others, method = answers
    if not others:
        return []
    sentences = []
    for language in dict.fromkeys(line["language"] for line in answers[method]):
        samples = {}
        for name, lines in answers.items():
            samples[name] = measure(in_language(lines, language))
        parts = [f"against {other}: {changes(samples[method], samples[other], language)}"
                 for other in others]
        sentences.append(f"{language}: {method} {'; '.join(parts)}.")
    note = "(± standard error of the difference, paired by question; a tie: its 95 % interval holds 0)"
    return [*sentences, note]


def changes(one: dict[str, Sample], other: dict[str, Sample], language: str) -> str:
    differences = []
    for name, title in CHANGES.items():
        if name not in one or name not in other:
            continue
        found = paired_difference([one[name]], [other[name]])
        if found:
            figure = one[name].figure
            unit = " points" if figure.is_share else ""
            verdict = f" ({found.verdict})" if found.verdict else ""
            change = shown_difference(found, figure.digits)
            differences.append(f"{title.format(language)} {change}{unit}{verdict}")
    return ", ".join(differences) or "nothing to compare"


def shown_difference(found: Difference, digits: int) -> str:
    return f"{found.value:+.{digits}f} ± {found.error:.{digits}f}"
