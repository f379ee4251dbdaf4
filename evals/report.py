"""Tables and plots: the report of one run, and the comparison of many.

    python eval.py compare runs/sw-0 runs/sw-1 runs/sw-2 --baseline sft --plot plots

`compare` puts runs over methods, seeds, sample sizes and languages into one table: mean and standard
error over seeds, and for what was answered question by question a paired bootstrap against a named
baseline. Directories that `eval.py mc`, `perplexity` and `judge` wrote for a run's adapter add their
figures to the row of that run.

Why a file of its own: it reads what is on disk and knows nothing of models; eval.py and clo.py print with it.

References: paired bootstrap (Efron and Tibshirani 1993, ch. 16; Koehn 2004, W04-3250),
Wilson's centre (Wilson 1927).
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from engine.files import InputError, as_kind, need, parse_json, read_records, read_text


def binomial_error(value: float, n: int) -> float:
    """Standard error, in points, of a percentage over n independent trials;
    by Wilson's centre, so that it is not 0 at 0 and 100 % (Wilson 1927)."""
    p = (value / 100 * n + 0.5) / (n + 1)
    return 100 * math.sqrt(p * (1 - p) / n) if n else 0.0


def table(header: list[str], lines: list[list[str]]) -> str:
    """A table that reads well in a terminal and is Markdown; the first column is left-aligned."""
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    rule = ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]]
    rows = [[cell.ljust(width) if i == 0 else cell.rjust(width)
             for i, (cell, width) in enumerate(zip(line, widths))] for line in [header, rule, *lines]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def side(language: str, source: str, lang: str) -> str:
    """What a run's held-out metrics call a language:
    en the source, tgt its one target, tgt_sw one of several."""
    return "en" if language == source else "tgt" if language == lang else f"tgt_{language}"


def report_text(report: dict, answers: dict[str, list[dict]], source: str, examples: int = 2) -> str:
    """report.md: answers, held-out log-probs, and the first few answers of every method side by side.
    The report's "lang" is the target language, or several joined by commas."""
    lang, methods = report["lang"], report["methods"]
    languages, lines, heldout = [source, *lang.split(",")], [], []
    for name, scores in methods.items():
        cells = [name]
        for result in [scores[language] for language in languages]:
            for key, n in (("correct", result["n"]), ("right_language", result["n_language"])):
                cells.append(f"{result[key]:.1f} ± {binomial_error(result[key], n):.1f}")
        lines.append(cells + [f"{scores['train_seconds']:.0f}"])
        keys = [f"{figure}_{side(language, source, lang)}"
                for figure in ("nll", "rewards/accuracies", "rewards/margins") for language in languages]
        heldout.append([name] + [f"{scores['heldout'][key]:.3f}" if key in scores["heldout"] else "-"
                                 for key in keys])
    asked = {language: next(iter(methods.values()))[language] for language in languages}
    text = [f"# {lang}: {report['samples']} samples, seed {report['seed']}", "",
            f"Answers to {asked[source]['n']} questions in each language, in % ± standard error. "
            f"Correct: equal to the expected answer; in {languages[1]}: written in that language.", "",
            table(["", *(column for language in languages
                         for column in (f"{language} correct", f"in {language}")), "train s"], lines), ""]
    same = [f"{n['n'] - n['n_language']} of {language}"
            for language, n in asked.items() if n["n_language"] < n["n"]]
    if same:
        text += [f"Answers that are the same in another language are left out of the language columns: "
                 f"{', '.join(same)}.", ""]
    unclear = [f"{name} {language} {result['unsure']} and {result['mixed']}"
               for name, scores in methods.items() for language in languages
               if (result := scores[language])["unsure"] + result["mixed"]]
    if unclear:
        text += [f"Replies of unsure language, and in two languages (neither counts as right): "
                 f"{', '.join(unclear)}.", ""]
    text += ["Held-out pairs: NLL per token of the right response (lower is better), "
             "and how often (accuracy) and by how much (margin) training moved the right response up "
             "against the wrong one.", "",
             table(["", *(f"{figure} {language}" for figure in ("nll", "accuracy", "margin")
                          for language in languages)], heldout), "",
             f"Decoding: {json.dumps(next(iter(methods.values())).get('decoding'))}; "
             f"hashes of model and data: config.json.", ""]
    return "\n".join(text + example_lines(answers, languages, examples))


def example_lines(answers: dict[str, list[dict]], languages: list[str], examples: int) -> list[str]:
    """The first few questions in each language, with every method's reply below."""
    text = []
    for language in languages:
        replies = {name: [line for line in lines if line["language"] == language]
                   for name, lines in answers.items()}
        for i, question in enumerate(replies["base"][:examples]):
            text += [question["prompt"]]
            for name, lines in replies.items():
                wanted = "" if lines[i]["correct"] else f"  (expected: {lines[i]['expected']})"
                text += [f"- {name}: {lines[i]['reply']}{wanted}"]
            text += [""]
    return text


# ------------------------------------------------------------------------------------------------- comparison

IGNORED_FLAGS = {"out", "seed", "lang", "samples", "method", "baseline", "fresh", "device", "save_every",
                 "dry_run"}
PREFERENCE_FLAGS = {"beta", "preference", "anchor", "lam"}      # plain fine-tuning reads none of them
RESAMPLES = 10_000
COLUMNS = 6                             # figures side by side in a table
SOURCE, TARGET = "source", "target"     # figures carry these in place of language codes, to fit one column


@dataclass
class Result:
    """What is known of one trained model: figures by name, and scores by figure and question."""
    language: str
    samples: str
    method: str
    seed: str
    figures: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float | None] = field(default_factory=dict)        # standard error over questions
    scores: dict[str, dict[str, float]] = field(default_factory=dict)    # {figure: {question: score}}, in %
    curves: dict[str, dict[int, float]] = field(default_factory=dict)    # held-out NLL by place and step

    @property
    def row(self) -> tuple[str, str, str]:
        """What is averaged over seeds."""
        return self.language, self.samples, self.method


def load_object(path: Path) -> dict:
    """The object in a JSON file, or a InputError that says which file is missing or damaged."""
    return as_kind(parse_json(read_text(path), path, "was the run interrupted?"), dict, path)


def load_lines(path: Path, keys: tuple[str, ...]) -> list[dict]:
    """The objects of a JSONL file, or a InputError that names the line without one of the keys."""
    found = read_records(path)
    for where, line in found:
        for key in keys:
            need(line, key, where)
    return [line for _, line in found]


def differing_flags(configs: dict[Path, dict]) -> dict[str, set[str]]:
    """{method: flags, beyond those the table shows, in which its runs on one language differ}:
    they tell rows apart."""
    values = {}
    for run, flags in configs.items():
        for method in load_object(run / "report.json")["methods"]:
            for key, value in flags.items():
                silent = IGNORED_FLAGS | (
                    PREFERENCE_FLAGS if method.startswith("sft") and method != "sft+dpo" else set())
                if method != "base" and key not in silent:
                    values.setdefault((method, key, flags.get("lang")), set()).add(json.dumps(value))
    differing = {}
    for (method, key, _), found in values.items():
        if len(found) > 1:
            differing.setdefault(method, set()).add(key)
    return differing


def origins(settings: dict, configs: dict[Path, dict]) -> list[tuple[Path, str]]:
    """[(run directory, method)] whose model was evaluated: that of runs/NAME/METHOD/adapter or model;
    "base" of every run that began with the model."""
    trained = Path(settings.get("adapter") or settings.get("model") or "").resolve().parent
    found = [(run, trained.name) for run in configs if run.resolve() == trained.parent]
    named = None if settings.get("adapter") else settings.get("model")
    return found or [(run, "base") for run, flags in configs.items()
                     if named and named in (flags.get("base"), flags.get("model"))]


def label(method: str, flags: dict, differing: dict[str, set[str]]) -> str:
    return " ".join([method, *(f"{key.replace('_', '-')}={flags.get(key)}"
                               for key in sorted(differing.get(method, ())))])


def row_language(target: str, lang: str) -> str:
    """How a table names a run's language: "sw", or "sw (sw,yo)" where the run had several targets."""
    return target if target == lang else f"{target} ({lang})"


def read_run(run: Path, flags: dict, differing: dict[str, set[str]]) -> list[Result]:
    """The methods of a run directory of clo.py, one Result for each target language."""
    report, results = load_object(run / "report.json"), []
    source = flags.get("source", "en")
    for method, scores in need(report, "methods", run / "report.json").items():
        answers = load_lines(run / method / "answers.jsonl",
                             ("row_id", "language", "correct", "reply_language", "judged"))
        metrics = run / method / "metrics.jsonl"
        steps = [line for _, line in read_records(metrics)] if metrics.is_file() else []
        for target in report["lang"].split(","):
            result = Result(row_language(target, report["lang"]), str(report["samples"]),
                            label(method, flags, differing), str(report["seed"]))
            for place, language in ((SOURCE, source), (TARGET, target)):
                result.figures[f"{place} correct"] = scores[language]["correct"]
                result.figures[f"in {place}"] = scores[language]["right_language"]
                lines = [line for line in answers if line["language"] == language]
                result.scores[f"{place} correct"] = {line["row_id"]: 100.0 * line["correct"]
                                                     for line in lines}
                result.scores[f"in {place}"] = {line["row_id"]: 100.0 * (line["reply_language"] == language)
                                                for line in lines if line["judged"]}
                key = f"nll_{side(language, source, report['lang'])}"
                if key in scores.get("heldout", {}):
                    result.figures[f"nll {place}"] = scores["heldout"][key]
                result.curves[place] = {line["step"]: line[key] for line in steps if key in line}
            results.append(result)
    return results


def read_evaluation(directory: Path, configs: dict[Path, dict],
                    differing: dict[str, set[str]]) -> list[Result]:
    """What `eval.py mc`, `perplexity` or `judge` wrote:
    the figures of one model, in the rows of the run it came from."""
    found = load_object(directory / "result.json")
    settings = need(found, "settings", directory / "result.json")
    model, language, results = (settings.get("adapter") or settings.get("model"),
                                settings.get("language") or "-", [])
    for run, method in origins(settings, configs):
        report = load_object(run / "report.json")
        targets = report["lang"].split(",")
        # a benchmark's figures name its own
        if language in targets or language != "-" and "benchmark" not in settings:
            targets = [language]
        results += [Result(row_language(target, report["lang"]), str(report["samples"]),
                           label(method, configs[run], differing), str(report["seed"])) for target in targets]
    results = results or [Result(language, "-", str(model or directory.name), "-")]
    lines = [line for _, line in read_records(directory / "answers.jsonl")]
    for name, figure in need(found, "figures", directory / "result.json").items():
        scores = {line["question"]: line["scores"][name] for line in lines
                  if "question" in line and name in line.get("scores", {})}
        for result in results:
            result.figures[name], result.errors[name] = figure["value"], figure.get("stderr")
            result.scores |= {name: scores} if scores else {}
    return results


def read_results(paths: list) -> list[Result]:
    """Results of run and evaluation directories, those of one trained model merged."""
    directories = [Path(path) for path in paths]
    for directory in directories:
        if not (directory / "report.json").is_file() and not (directory / "result.json").is_file():
            raise InputError(f"{directory}: neither report.json (a finished run) "
                            f"nor result.json (an evaluation) is there")
    configs = {directory: load_object(directory / "config.json")["flags"] for directory in directories
               if (directory / "report.json").is_file()}
    differing = differing_flags(configs)
    merged = {}
    for directory in directories:
        found = read_run(directory, configs[directory], differing) if directory in configs else \
            read_evaluation(directory, configs, differing)
        for result in found:
            known = merged.setdefault((*result.row, result.seed), result)
            if known is not result:
                merge_(known, result, directory)
    return list(merged.values())


def merge_(known: Result, other: Result, directory: Path) -> None:
    """Add the figures of `other` to those of the same model; InputError when both have one and they differ."""
    for name, value in other.figures.items():
        if known.figures.setdefault(name, value) != value:
            raise InputError(f"{directory}: a second, different {name!r} for {' '.join(known.row)}, "
                            f"seed {known.seed}: compare one of the two at a time")
    known.errors |= other.errors
    known.scores |= other.scores


def mean_and_error(values: list[float]) -> tuple[float, float | None]:
    """Mean, and its standard error over the values (None for a single one)."""
    n, mean = len(values), sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n) if n > 1 else None


def paired_bootstrap(one: list[dict[str, float]], other: list[dict[str, float]]) -> dict | None:
    """Difference one - other of two mean scores over the questions both answered,
    from RESAMPLES draws of questions.

    Each argument holds {question: score} for every seed; a question's score is its mean over seeds, so that
    the interval tells how far it depends on the choice of questions.
    {"difference", "low", "high" (95 %), "p" (two-sided), "n"}.
    """
    shared = sorted(set.intersection(*(set(scores) for scores in one + other)))
    if not shared:
        return None
    means = [np.mean([[scores[question] for question in shared] for scores in group], axis=0)
             for group in (one, other)]
    gap = means[0] - means[1]
    draws = np.random.default_rng(0).multinomial(
        len(gap), np.full(len(gap), 1 / len(gap)), RESAMPLES) @ gap / len(gap)
    low, high = np.quantile(draws, (0.025, 0.975))
    tail = min((draws <= 0).mean(), (draws >= 0).mean())
    return {"difference": float(gap.mean()), "low": float(low), "high": float(high),
            "p": float(min(1, 2 * tail)), "n": len(gap)}


def by_row(results: list[Result]) -> dict[tuple, list[Result]]:
    """Results that differ only in the seed,
    in the order of languages, sample sizes and the order they were given."""
    rows = {}
    for result in results:
        rows.setdefault(result.row, []).append(result)
    return dict(sorted(rows.items(),
                       key=lambda item: (item[0][0], int(item[0][1]) if item[0][1].isdigit() else -1)))


def shown(name: str, results: list[Result]) -> str:
    """A cell: mean ± standard error over seeds; over questions, in brackets, where there is only one seed."""
    values = [result.figures[name] for result in results if name in result.figures]
    if not values:
        return "-"
    mean, error = mean_and_error(values)
    if error is None:
        own = results[0].errors.get(name)
        return f"{mean:.2f}" + (f" (± {own:.2f})" if own is not None else "")
    return f"{mean:.2f} ± {error:.2f}"


def figure_tables(rows: dict[tuple, list[Result]]) -> list[str]:
    """All figures, COLUMNS of them a table; a row stands only where it has one."""
    names, text = list(dict.fromkeys(
        name for group in rows.values() for result in group for name in result.figures)), []
    for first in range(0, len(names), COLUMNS):
        part = names[first:first + COLUMNS]
        lines = [[*row, str(len(group)), *(shown(name, group) for name in part)]
                 for row, group in rows.items()
                 if any(name in result.figures for result in group for name in part)]
        text += [table(["language", "samples", "method", "seeds", *part], lines), ""]
    return text


def differences(rows: dict[tuple, list[Result]], baseline: str) -> tuple[list[list[str]], int]:
    """(a line for each figure that can be paired with the baseline's,
    how many more have no difference anywhere)."""
    lines, equal = [], 0
    for (language, samples, method), group in rows.items():
        base = rows.get((language, samples, baseline), []) if method != baseline else []
        for name in dict.fromkeys(name for result in base for name in result.scores):
            sides = [[result.scores[name] for result in side if name in result.scores]
                     for side in (group, base)]
            found = paired_bootstrap(*sides) if all(sides) else None
            if found and found["low"] == found["high"] == 0:
                equal += 1
            elif found:
                chance = f"{found['p']:.4f}" if found["p"] else f"<{2 / RESAMPLES:.4f}"
                lines.append([language, samples, method, name, f"{found['difference']:+.2f}",
                              f"{found['low']:+.2f} to {found['high']:+.2f}", chance, str(found["n"])])
    return lines, equal


def comparison(results: list[Result], baseline: str) -> str:
    """Markdown: tables of all figures, and one of paired differences from the baseline."""
    rows = by_row(results)
    text = ["Mean over seeds ± its standard error; "
            "with one seed (± standard error over questions) where it is known.", "",
            *figure_tables(rows)]
    if not any(row[2] == baseline for row in rows):
        methods = ", ".join(dict.fromkeys(row[2] for row in rows))
        text += [f"No method here is called {baseline}, so there are no paired differences; "
                 f"--baseline takes {methods}."]
    lines, equal = differences(rows, baseline)
    if lines:
        text += [f"Difference from {baseline} in points, paired by question "
                 f"({RESAMPLES:,} bootstrap draws of questions; scores averaged over seeds).", "",
                 table(["language", "samples", "method", "figure", "difference", "95 %", "p", "questions"],
                       lines), ""]
    if equal:
        text += [f"{equal} more figures equal those of {baseline} on every question.", ""]
    return "\n".join(text)


def settings_of(directory: Path) -> dict:
    """What a directory's numbers depend on: decoding, template, shots, file hashes."""
    if not (directory / "report.json").is_file():
        return load_object(directory / "result.json")["settings"]
    config, report = load_object(directory / "config.json"), load_object(directory / "report.json")
    return {"hashes": config.get("inputs", {}),
            "decoding": next(iter(report["methods"].values())).get("decoding", {}),
            "eval_split": config["flags"].get("eval_split")}


def settings_text(paths: list) -> str:
    """Settings of all directories: for those of one kind what they share once, then what differs."""
    lines, kinds = ["Settings:"], {}
    for directory in map(Path, paths):
        told = settings_of(directory)
        kinds.setdefault(tuple(told), {})[directory] = told
    for group in kinds.values():
        first = next(iter(group.values()))
        shared = {key: value for key, value in first.items()
                  if all(told[key] == value for told in group.values())}
        lines.append(f"- {', '.join(map(str, group))}: {json.dumps(shared, ensure_ascii=False)}")
        own = {directory: {key: value for key, value in told.items() if key not in shared}
               for directory, told in group.items()}
        lines += [f"  - {directory}: {json.dumps(told, ensure_ascii=False)}"
                  for directory, told in own.items() if told]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------ plots

# told apart without colour
MARKERS, LINES, GREYS = "os^DvPX*", ("-", "--", ":", "-."), ("0.0", "0.5", "0.25", "0.65")
# points (of 100) kept free around what the trade-off shows; beyond 0 and 100
NARROWEST, EDGE = 4, 2


def import_pyplot():
    try:
        import matplotlib
    except ImportError:
        raise InputError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot
    return matplotlib.pyplot


def mean_curve(group: list[Result], place: str) -> tuple[list[int], list[float]]:
    """Steps that all seeds validated, and the mean held-out NLL there."""
    curves = [result.curves.get(place, {}) for result in group]
    steps = sorted(set.intersection(*map(set, curves)))
    return steps, [sum(curve[step] for curve in curves) / len(curves) for step in steps]


def panels(rows: dict[tuple, list[Result]]) -> tuple[list[str], list[str], list[str]]:
    """The languages, sample sizes and methods of the rows:
    one row of panels, one line style, one marker each."""
    return tuple(list(dict.fromkeys(row[i] for row in rows)) for i in range(3))


def style(i: int) -> dict:
    """Marker and grey of the i-th method; later ones are smaller, so that all show where points coincide."""
    grey = GREYS[i % len(GREYS)]
    return {"marker": MARKERS[i % len(MARKERS)], "color": grey, "markerfacecolor": "white" if i % 2 else grey,
            "markersize": max(8 - 1.5 * i, 4)}


def plot_curves(results: list[Result], path: Path) -> bool:
    """Held-out NLL over steps, a row of panels for each language; False without validation lines."""
    rows = {row: group for row, group in by_row(results).items()
            if any(result.curves.get(TARGET) for result in group)}
    if not rows:
        return False
    plt, (languages, samples, methods) = import_pyplot(), panels(rows)
    figure, axes = plt.subplots(len(languages), 2, figsize=(10, 0.8 + 3.4 * len(languages)),
                                layout="constrained", squeeze=False)
    for (language, size, method), group in rows.items():
        for axis, place in zip(axes[languages.index(language)], (TARGET, SOURCE)):
            axis.plot(*mean_curve(group, place), linestyle=LINES[samples.index(size) % len(LINES)],
                      **style(methods.index(method)), label=f"{method}, {size} samples")
            axis.set(xlabel="optimiser step", ylabel="NLL (nats per token)",
                     title=f"{language}: held out, {place} language")
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.grid(alpha=0.3)
    shown = {name: handle for axis in axes[:, 0] for handle, name in zip(*axis.get_legend_handles_labels())}
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=3, fontsize=8,
                  handlelength=4, title="mean over seeds", title_fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def plot_tradeoff(results: list[Result], path: Path) -> bool:
    """Right answers in the source language against those in the target language: a panel for each language,
    a line for each method over its sample sizes, standard errors over seeds;
    False when there are no answers."""
    wanted = (f"{SOURCE} correct", f"{TARGET} correct")
    rows = {row: group for row, group in by_row(results).items()
            if all(name in result.figures for result in group for name in wanted)}
    if not rows:
        return False
    plt, (languages, _, methods) = import_pyplot(), panels(rows)
    figure, axes = plt.subplots(1, len(languages), figsize=(1 + 5 * len(languages), 5), layout="constrained",
                                squeeze=False)
    for axis, language in zip(axes[0], languages):
        for i, method in enumerate(methods):
            points = {row[1]: [mean_and_error([result.figures[name] for result in group]) for name in wanted]
                      for row, group in rows.items() if (row[0], row[2]) == (language, method)}
            if points:
                draw_points(axis, i, method, points)
        axis.set(xlabel="right answers in the source language (%)",
                 ylabel="right answers in the target language (%)", title=f"{language} (numbers: samples)")
        axis.grid(alpha=0.3)
        for low, high, limit in ((*axis.get_xlim(), axis.set_xlim), (*axis.get_ylim(), axis.set_ylim)):
            room = max(0.1 * (high - low), NARROWEST)       # a tenth of a point is no difference to look at
            limit(max(low - room, -EDGE), min(high + room, 100 + EDGE))
    shown = {name: handle for axis in axes[0] for handle, name in zip(*axis.get_legend_handles_labels())}
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=4, fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def draw_points(axis, i: int, method: str, points: dict[str, list[tuple]]) -> None:
    """The i-th method's line. points: {samples: [(mean, error) of the source, of the target language]}.
    Every method writes its sample sizes into another corner of its points,
    so that those of two methods do not cover each other."""
    means = [[value for value, _ in place] for place in zip(*points.values())]
    errors = [[error or 0 for _, error in place] for place in zip(*points.values())]
    axis.errorbar(*means, xerr=errors[0], yerr=errors[1], linewidth=1, capsize=2, label=method, **style(i),
                  linestyle=LINES[i % len(LINES)] if method != "base" else "none")
    sizes = {}
    for size, *place in zip(points, *means):
        sizes.setdefault(tuple(place), []).append(size)
    x, y = ((1, 1), (-1, -1), (1, -1), (-1, 1))[i % 4]
    for place, found in sizes.items() if method != "base" else ():
        axis.annotate(", ".join(found), place, textcoords="offset points", xytext=(7 * x, 7 * y), fontsize=8,
                      ha="left" if x > 0 else "right", va="bottom" if y > 0 else "top")


def plot(results: list[Result], directory) -> list[Path]:
    """learning.png and tradeoff.png in `directory`, as far as the results have something to draw."""
    import_pyplot()
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    return [path for path, draw in ((directory / "learning.png", plot_curves),
                                    (directory / "tradeoff.png", plot_tradeoff)) if draw(results, path)]
