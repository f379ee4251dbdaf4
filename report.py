"""Tables and plots: the report of one run, and the comparison of many.

    python eval.py compare runs/sw-0 runs/sw-1 runs/sw-2 --baseline sft --plot plots

`compare` puts runs over methods, seeds, sample sizes and languages into one table: mean and standard error over seeds, and
for what was answered question by question a paired bootstrap against a named baseline. Directories that `eval.py mc`,
`perplexity` and `judge` wrote for a run's adapter add their figures to the row of that run.

Why a file of its own: it reads what is on disk and knows nothing of models; eval.py and clo.py print with it.

References: paired bootstrap (Efron and Tibshirani 1993, ch. 16; Koehn 2004, W04-3250), Wilson's centre (Wilson 1927).
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import data
from data import DataError


def binomial_error(value: float, n: int) -> float:
    """Standard error, in points, of a percentage over n independent trials; by Wilson's centre, so that it is not 0 at
    0 and 100 % (Wilson 1927)."""
    p = (value / 100 * n + 0.5) / (n + 1)
    return 100 * math.sqrt(p * (1 - p) / n) if n else 0.0


def table(header: list[str], lines: list[list[str]]) -> str:
    """A table that reads well in a terminal and is Markdown; the first column is left-aligned."""
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    rule = ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]]
    rows = [[cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths))]
            for line in [header, rule, *lines]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def report_text(report: dict, answers: dict[str, list[dict]], source: str, examples: int = 2) -> str:
    """report.md: answers, held-out log-probs, and the first few answers of every method side by side."""
    lang, methods = report["lang"], report["methods"]
    lines, heldout = [], []
    for name, scores in methods.items():
        cells = [name]
        for language in (source, lang):
            result = scores[language]
            for key, n in (("correct", result["n"]), ("right_language", result["n_language"])):
                cells.append(f"{result[key]:.1f} ± {binomial_error(result[key], n):.1f}")
        lines.append(cells + [f"{scores['train_seconds']:.0f}"])
        held = scores["heldout"]
        heldout.append([name] + [f"{held[key]:.3f}" if key in held else "-" for key in
                                 ("nll_en", "nll_tgt", "rewards/accuracies_en", "rewards/accuracies_tgt",
                                  "rewards/margins_en", "rewards/margins_tgt")])
    n = next(iter(methods.values()))[lang]
    text = [f"# {lang}: {report['samples']} samples, seed {report['seed']}", "",
            f"Answers to {n['n']} questions in each language, in % ± standard error. Correct: equal to the expected answer; "
            f"in {lang}: written in that language.", "",
            table(["", f"{source} correct", f"in {source}", f"{lang} correct", f"in {lang}", "train s"], lines), ""]
    if n["n_language"] < n["n"]:
        text += [f"{n['n'] - n['n_language']} answers are the same in both languages and left out of the language columns.", ""]
    text += ["Held-out pairs: NLL per token of the right response (lower is better), and how often (accuracy) and by how much "
             "(margin) training moved the right response up against the wrong one.", "",
             table(["", f"nll {source}", f"nll {lang}", f"accuracy {source}", f"accuracy {lang}", f"margin {source}",
                    f"margin {lang}"], heldout), ""]
    for language in (source, lang):
        shown = [line["row_id"] for line in answers["base"] if line["language"] == language][:examples]
        for row_id in shown:
            replies = {name: line for name, lines in answers.items() for line in lines
                       if line["row_id"] == row_id and line["language"] == language}
            text += [f"{replies['base']['prompt']}"]
            text += [f"- {name}: {line['reply']}{'' if line['correct'] else '  (expected: ' + line['expected'] + ')'}"
                     for name, line in replies.items()] + [""]
    return "\n".join(text)


# -------------------------------------------------------------------------------------------------------- comparison

IGNORED_FLAGS = {"out", "seed", "lang", "samples", "method", "baseline", "fresh", "device", "save_every", "dry_run"}
PREFERENCE_FLAGS = {"beta", "preference", "anchor", "lam"}                # plain fine-tuning reads none of them
RESAMPLES = 10_000
SOURCE, TARGET = "source", "target"           # figures carry these in place of language codes, to fit one column


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
    curves: list[dict] = field(default_factory=list)                     # validation lines of metrics.jsonl

    @property
    def row(self) -> tuple[str, str, str]:
        """What is averaged over seeds."""
        return self.language, self.samples, self.method


def load_object(path: Path) -> dict:
    """The object in a JSON file, or a DataError that says which file is missing or damaged."""
    try:
        return data.as_kind(json.loads(data.read_text(path)), dict, path)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not valid JSON ({error.msg}): was the run interrupted?") from None


def differing_flags(configs: dict[Path, dict]) -> dict[str, set[str]]:
    """{method: flags, beyond those the table shows, in which its runs on one language differ}: they tell rows apart."""
    values = {}
    for run, flags in configs.items():
        for method in load_object(run / "report.json")["methods"]:
            for key, value in flags.items():
                silent = IGNORED_FLAGS | (PREFERENCE_FLAGS if method.startswith("sft") and method != "sft+dpo" else set())
                if method != "base" and key not in silent:
                    values.setdefault((method, key, flags.get("lang")), set()).add(json.dumps(value))
    differing = {}
    for (method, key, _), found in values.items():
        if len(found) > 1:
            differing.setdefault(method, set()).add(key)
    return differing


def run_of(directory: Path) -> tuple[Path, str] | None:
    """(run directory, method) of a trained model's directory runs/NAME/METHOD/adapter, or None."""
    run = directory.parent.parent
    return (run, directory.parent.name) if (run / "config.json").is_file() and (run / "report.json").is_file() else None


def label(method: str, flags: dict, differing: dict[str, set[str]]) -> str:
    return " ".join([method, *(f"{key.replace('_', '-')}={flags.get(key)}" for key in sorted(differing.get(method, ())))])


def read_run(run: Path, flags: dict, differing: dict[str, set[str]]) -> list[Result]:
    """The methods of a run directory of clo.py, one Result for each target language."""
    report, results = load_object(run / "report.json"), []
    source = flags.get("source", "en")
    for method, scores in data.need(report, "methods", run / "report.json").items():
        answers = [line for _, line in data.read_records(run / method / "answers.jsonl")]
        targets = [key for key, value in scores.items() if isinstance(value, dict) and "correct" in value and key != source]
        for target in targets:
            result = Result(target, str(report["samples"]), label(method, flags, differing), str(report["seed"]))
            for place, language in ((SOURCE, source), (TARGET, target)):
                result.figures |= {f"{place} correct": scores[language]["correct"], f"in {place}": scores[language]["right_language"]}
                lines = [line for line in answers if line["language"] == language]
                result.scores[f"{place} correct"] = {line["row_id"]: 100.0 * line["correct"] for line in lines}
                result.scores[f"in {place}"] = {line["row_id"]: 100.0 * (line["reply_language"] == language)
                                                for line in lines if line["judged"]}
            held = scores.get("heldout", {})
            result.figures |= {f"nll {place}": held[key] for place, key in ((SOURCE, "nll_en"), (TARGET, "nll_tgt")) if key in held}
            metrics = run / method / "metrics.jsonl"
            if metrics.is_file():
                result.curves = [line for _, line in data.read_records(metrics) if "nll_tgt" in line]
            results.append(result)
    return results


def read_evaluation(directory: Path, configs: dict[Path, dict], differing: dict[str, set[str]]) -> Result:
    """What `eval.py mc`, `perplexity` or `judge` wrote: the figures of one model, in the row of the run it came from."""
    found = load_object(directory / "result.json")
    settings = data.need(found, "settings", directory / "result.json")
    model = settings.get("adapter") or settings.get("model") or directory.name
    result = Result(settings.get("language") or "-", "-", str(model), "-")
    origin = run_of(Path(model))
    if origin and origin[0] in configs:
        flags = configs[origin[0]]
        report = load_object(origin[0] / "report.json")
        result = Result(report["lang"], str(report["samples"]), label(origin[1], flags, differing), str(report["seed"]))
    for name, figure in data.need(found, "figures", directory / "result.json").items():
        result.figures[name], result.errors[name] = figure["value"], figure.get("stderr")
    for _, line in data.read_records(directory / "answers.jsonl"):
        for name, value in line.get("scores", {}).items():
            result.scores.setdefault(name, {})[line["question"]] = value
    return result


def read_results(paths: list) -> list[Result]:
    """Results of run and evaluation directories, those of one trained model merged."""
    directories = [Path(path) for path in paths]
    for directory in directories:
        if not (directory / "report.json").is_file() and not (directory / "result.json").is_file():
            raise DataError(f"{directory}: neither report.json (a finished run) nor result.json (an evaluation) is there")
    configs = {directory: load_object(directory / "config.json")["flags"] for directory in directories
               if (directory / "report.json").is_file()}
    differing = differing_flags(configs)
    merged = {}
    for directory in directories:
        found = read_run(directory, configs[directory], differing) if directory in configs else \
            [read_evaluation(directory, configs, differing)]
        for result in found:
            known = merged.setdefault((*result.row, result.seed), result)
            if known is not result:
                merge_(known, result, directory)
    return list(merged.values())


def merge_(known: Result, other: Result, directory: Path) -> None:
    """Add the figures of `other` to those of the same model; DataError when both have one and they differ."""
    for name, value in other.figures.items():
        if known.figures.setdefault(name, value) != value:
            raise DataError(f"{directory}: a second, different {name!r} for {' '.join(known.row)}, seed {known.seed}: "
                            f"compare one of the two at a time")
    known.errors |= other.errors
    known.scores |= other.scores


def mean_and_error(values: list[float]) -> tuple[float, float | None]:
    """Mean, and its standard error over the values (None for a single one)."""
    n, mean = len(values), sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n) if n > 1 else None


def paired_bootstrap(one: list[dict[str, float]], other: list[dict[str, float]]) -> dict | None:
    """Difference one - other of two mean scores over the questions both answered, from RESAMPLES draws of questions.

    Each argument holds {question: score} for every seed; a question's score is its mean over seeds, so that the interval
    tells how far it depends on the choice of questions. {"difference", "low", "high" (95 %), "p" (two-sided), "n"}.
    """
    shared = sorted(set.intersection(*(set(scores) for scores in one + other)))
    if not shared:
        return None
    means = [np.mean([[scores[question] for question in shared] for scores in group], axis=0) for group in (one, other)]
    gap = means[0] - means[1]
    draws = np.random.default_rng(0).multinomial(len(gap), np.full(len(gap), 1 / len(gap)), RESAMPLES) @ gap / len(gap)
    low, high = np.quantile(draws, (0.025, 0.975))
    tail = min((draws <= 0).mean(), (draws >= 0).mean())
    return {"difference": float(gap.mean()), "low": float(low), "high": float(high), "p": float(min(1, 2 * tail)), "n": len(gap)}


def by_row(results: list[Result]) -> dict[tuple, list[Result]]:
    """Results that differ only in the seed, in the order of languages, sample sizes and the order they were given."""
    rows = {}
    for result in results:
        rows.setdefault(result.row, []).append(result)
    return dict(sorted(rows.items(), key=lambda item: (item[0][0], int(item[0][1]) if item[0][1].isdigit() else -1)))


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


def comparison(results: list[Result], baseline: str) -> str:
    """Markdown: one table of all figures, and one of paired differences from the baseline."""
    rows, names = by_row(results), list(dict.fromkeys(name for result in results for name in result.figures))
    lines = [[*row, str(len(group)), *(shown(name, group) for name in names)] for row, group in rows.items()]
    text = ["Mean over seeds ± its standard error; with one seed (± standard error over questions) where it is known.", "",
            table(["language", "samples", "method", "seeds", *names], lines), ""]
    differences = []
    for (language, samples, method), group in rows.items():
        base = rows.get((language, samples, baseline))
        for name in names if base and method != baseline else []:
            sides = [[result.scores[name] for result in side if name in result.scores] for side in (group, base)]
            found = paired_bootstrap(*sides) if all(sides) else None
            if found:
                differences.append([language, samples, method, name, f"{found['difference']:+.2f}",
                                    f"{found['low']:+.2f} to {found['high']:+.2f}", f"{found['p']:.4f}" if found["p"] else f"<{2 / RESAMPLES:.4f}", str(found["n"])])
    if not any(row[2] == baseline for row in rows):
        text += [f"No method here is called {baseline}: no paired differences (--baseline {' | '.join(dict.fromkeys(row[2] for row in rows))})."]
    if differences:
        text += [f"Difference from {baseline} in points, paired by question ({RESAMPLES:,} bootstrap draws of questions; scores "
                 f"averaged over seeds).", "",
                 table(["language", "samples", "method", "figure", "difference", "95 %", "p", "questions"], differences), ""]
    return "\n".join(text)


def settings_text(paths: list) -> str:
    """What the numbers depend on, a line for each directory: decoding, template, shots, file hashes."""
    lines = ["Settings:"]
    for directory in map(Path, paths):
        if (directory / "report.json").is_file():
            config, report = load_object(directory / "config.json"), load_object(directory / "report.json")
            decoding = next(iter(report["methods"].values())).get("decoding", {})
            told = {"hashes": config.get("inputs", {}), "decoding": decoding, "eval_split": config["flags"].get("eval_split")}
        else:
            told = load_object(directory / "result.json")["settings"]
        lines.append(f"- {directory}: {json.dumps(told, ensure_ascii=False)}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------- plots

MARKERS, LINES, GREYS = "os^DvPX*", ("-", "--", ":", "-."), ("0.0", "0.5", "0.25", "0.65")     # told apart without colour
CURVES = (("nll_tgt", "target language"), ("nll_en", "source language"))


def import_pyplot():
    try:
        import matplotlib
    except ImportError:
        raise DataError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot
    return matplotlib.pyplot


def mean_curve(group: list[Result], key: str) -> tuple[list[int], list[float]]:
    """Steps that all seeds validated, and the mean of a metric there."""
    curves = [{line["step"]: line[key] for line in result.curves if key in line} for result in group]
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    return steps, [sum(curve[step] for curve in curves) / len(curves) for step in steps]


def panels(rows: dict[tuple, list[Result]]) -> tuple[list[str], list[str], list[str]]:
    """The languages, sample sizes and methods of the rows: one row of panels, one line style, one marker each."""
    return tuple(list(dict.fromkeys(row[i] for row in rows)) for i in range(3))


def style(i: int) -> dict:
    """Marker and grey of the i-th method."""
    grey = GREYS[i % len(GREYS)]
    return {"marker": MARKERS[i % len(MARKERS)], "color": grey, "markerfacecolor": "white" if i % 2 else grey, "markersize": 6}


def plot_curves(results: list[Result], path: Path) -> bool:
    """Held-out NLL over steps, a row of panels for each language; False without validation lines."""
    rows = {row: group for row, group in by_row(results).items() if any(result.curves for result in group)}
    if not rows:
        return False
    plt, (languages, samples, methods) = import_pyplot(), panels(rows)
    figure, axes = plt.subplots(len(languages), 2, figsize=(10, 0.8 + 3.4 * len(languages)), layout="constrained", squeeze=False)
    for (language, size, method), group in rows.items():
        for axis, (key, place) in zip(axes[languages.index(language)], CURVES):
            axis.plot(*mean_curve(group, key), linestyle=LINES[samples.index(size) % len(LINES)],
                      **style(methods.index(method)), label=f"{method}, {size} samples (mean of {len(group)})")
            axis.set(xlabel="optimiser step", ylabel="NLL (nats per token)", title=f"{language}: held out, {place}")
            axis.grid(alpha=0.3)
    shown = {name: handle for axis in axes[:, 0] for handle, name in zip(*axis.get_legend_handles_labels())}
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def plot_tradeoff(results: list[Result], path: Path) -> bool:
    """Right answers in the source language against those in the target language: a panel for each language, a line for each
    method over its sample sizes, standard errors over seeds; False when there are no answers."""
    wanted = (f"{SOURCE} correct", f"{TARGET} correct")
    rows = {row: group for row, group in by_row(results).items() if all(name in result.figures for result in group for name in wanted)}
    if not rows:
        return False
    plt, (languages, _, methods) = import_pyplot(), panels(rows)
    figure, axes = plt.subplots(1, len(languages), figsize=(1 + 5 * len(languages), 5), layout="constrained", squeeze=False)
    for axis, language in zip(axes[0], languages):
        for i, method in enumerate(methods):
            points = [(row[1], *(mean_and_error([result.figures[name] for result in group]) for name in wanted))
                      for row, group in rows.items() if (row[0], row[2]) == (language, method)]
            for size, (x, _), (y, _) in points if method != "base" else []:
                axis.annotate(size, (x, y), textcoords="offset points", xytext=(7, 6), fontsize=8)
            if points:
                (x, x_error), (y, y_error) = ([*zip(*part)] for part in [*zip(*points)][1:])
                axis.errorbar(x, y, xerr=[error or 0 for error in x_error], yerr=[error or 0 for error in y_error], linewidth=1,
                              linestyle=LINES[i % len(LINES)] if method != "base" else "none", capsize=2, label=method, **style(i))
        axis.set(xlabel="right answers in the source language (%)", ylabel="right answers in the target language (%)",
                 title=f"{language} (numbers: samples)")
        axis.grid(alpha=0.3)
        axis.margins(0.12)
    shown = {name: handle for axis in axes[0] for handle, name in zip(*axis.get_legend_handles_labels())}
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=4, fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def plot(results: list[Result], directory) -> list[Path]:
    """learning.png and tradeoff.png in `directory`, as far as the results have something to draw."""
    import_pyplot()
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    return [path for path, draw in ((directory / "learning.png", plot_curves), (directory / "tradeoff.png", plot_tradeoff))
            if draw(results, path)]
