"""The comparison of many runs and evaluations: one table, and paired differences from a baseline.

    python eval.py compare runs/sw-0 runs/sw-1 runs/sw-2 --baseline sft --plot plots

It puts runs over methods, seeds, sample sizes and languages into one table: mean and standard error over
seeds, and for what was answered question by question a paired bootstrap against a named baseline.
Directories that `eval.py mc`, `perplexity` and `judge` wrote for a run's adapter add their figures to the row
of that run.
"""

import json
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from engine.files import InputError, need, read_json, read_records
from evals.figures import ANSWER_KEYS, MEAN, RESAMPLES, SHARE, Difference, Sample, measure, paired_difference
from evals.report import in_language, shown_difference, side, table, with_error

# ------------------------------------------------------------------------------------------ results on disk

IGNORED_FLAGS = {"out", "seed", "lang", "samples", "method", "baseline", "fresh", "device", "save_every",
                 "dry_run", "eval_every", "merge", "shard"}
PREFERENCE_FLAGS = {"beta", "preference", "anchor", "lam"}      # plain fine-tuning reads none of them
SOURCE, TARGET = "source", "target"     # figures carry these in place of language codes, to fit one column


@dataclass(frozen=True)
class Value:
    """A figure of one model as tables show it; its standard error over questions where it is known."""
    value: float
    error: float | None = None
    digits: int = 2


@dataclass
class Result:
    """What is known of one trained model: figures by name, and what they are computed from."""
    language: str
    size: str                                                       # training samples
    method: str
    seed: str
    figures: dict[str, Value] = field(default_factory=dict)
    samples: dict[str, Sample] = field(default_factory=dict)        # question by question
    curves: dict[str, dict[int, float]] = field(default_factory=dict)    # held-out NLL by place and step

    @property
    def row(self) -> tuple[str, str, str]:
        """What is averaged over seeds."""
        return self.language, self.size, self.method

    def add(self, name: str, sample: Sample) -> None:
        self.samples[name] = sample
        self.figures[name] = Value(sample.value, sample.error, sample.figure.digits)


def load_lines(path: Path, keys: tuple[str, ...]) -> list[dict]:
    """The objects of a JSONL file, or an InputError that names the line without one of the keys."""
    found = read_records(path)
    for where, line in found:
        for key in keys:
            need(line, key, where)
    return [line for _, line in found]


def is_run(directory: Path) -> bool:
    """Of clo.py, and finished."""
    return (directory / "report.json").is_file()


def is_begun(directory: Path) -> bool:
    """Of clo.py; models have a config.json, too, without "flags"."""
    path = directory / "config.json"
    return path.is_file() and "flags" in read_json(path)


def is_evaluation(directory: Path) -> bool:
    """Of eval.py, and finished; a method's directory inside a run has a result.json without "figures"."""
    path = directory / "result.json"
    return path.is_file() and "figures" in read_json(path)


def find_results(paths: list) -> tuple[list[Path], list[Path]]:
    """(directories of finished runs and evaluations that the paths stand for, what holds none of them).
    A file, or a method's directory, stands for what it belongs to, a directory for all that is below it."""
    paths = [Path(path) for path in paths]
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        raise InputError(f"{', '.join(missing)}: no such file or directory; run directories of clo.py and "
                         f"directories of mc, perplexity, judge are compared")
    found, left_out = {}, []
    for path in paths:
        directories = results_of(path)
        for directory in directories:
            found.setdefault(directory.resolve(), directory)
        if not directories:
            left_out.append(path)
        elif path.is_dir():
            left_out += unfinished(path)
    if not found:
        raise InputError(f"{', '.join(map(str, paths))}: neither report.json (a finished run) "
                         f"nor result.json (an evaluation) is there")
    return list(found.values()), list(dict.fromkeys(left_out))


def has_result(directory: Path) -> bool:
    return is_run(directory) or is_evaluation(directory)


def results_of(path: Path) -> list[Path]:
    if path.is_dir():
        files = [*path.rglob("report.json"), *path.rglob("result.json")]
        directories = {file.parent for file in files}
        below = sorted(filter(has_result, directories))
        if below:
            return below
    nearest = path if path.is_dir() else path.parent
    owners = filter(has_result, (nearest, nearest.parent))
    return list(owners)[:1]


def unfinished(directory: Path) -> list[Path]:
    """Runs and evaluations below a directory that were begun and have no result."""
    runs = [file.parent for file in directory.rglob("config.json")]
    begun = list(filter(is_begun, runs))
    answered = [file.parent for file in directory.rglob("answers.jsonl")]
    begun += [place for place in answered if not is_begun(place.parent)]
    return sorted(place for place in begun if not has_result(place))


@dataclass
class Run:
    """A finished run directory of clo.py."""
    directory: Path
    report: dict
    flags: dict
    labels: dict[str, str]              # what tables call its methods

    @property
    def targets(self) -> list[str]:
        return self.report["lang"].split(",")

    def result(self, method: str, target: str) -> Result:
        """What is known of a method before anything is read. A target language is called "sw", or
        "sw (sw,yo)" where the run had several."""
        lang = self.report["lang"]
        language = target if target == lang else f"{target} ({lang})"
        size, seed = str(self.report["samples"]), str(self.report["seed"])
        return Result(language, size, self.labels.get(method, method), seed)


def open_run(directory: Path) -> Run:
    config, report = directory / "config.json", directory / "report.json"
    flags = need(read_json(config), "flags", config)
    found = read_json(report)
    for key in ("methods", "lang", "samples", "seed"):
        need(found, key, report)
    return Run(directory, found, flags, {})


def label_methods_(runs: list[Run]) -> None:
    """Name methods by the flags, beyond those the table shows, in which their runs on one language differ."""
    values = {}
    for run in runs:
        for method in run.report["methods"]:
            for name in run.flags.keys() - unread_flags(method, run.flags):
                found = values.setdefault((method, run.report["lang"], name), set())
                found.add(json.dumps(run.flags[name]))
    differing = {}
    for (method, _, name), found in values.items():
        if len(found) > 1:
            differing.setdefault(method, set()).add(name)
    for run in runs:
        for method in run.report["methods"]:
            names = sorted(differing.get(method, ()))
            told = [f"{name.replace('_', '-')}={run.flags.get(name)}" for name in names]
            run.labels[method] = " ".join([method, *told])


def unread_flags(method: str, flags: dict) -> set[str]:
    """Flags in which runs of a method may differ and be the same."""
    if method == "base":
        return set(flags)
    plain = method.startswith("sft") and method != "sft+dpo"
    return IGNORED_FLAGS | PREFERENCE_FLAGS if plain else IGNORED_FLAGS


def read_run(run: Run) -> list[Result]:
    """The methods of a run, one Result for each target language."""
    source, results = run.flags.get("source", "en"), []
    for method, scores in run.report["methods"].items():
        directory = run.directory / method
        answers = load_lines(directory / "answers.jsonl", ANSWER_KEYS)
        metrics = directory / "metrics.jsonl"
        steps = load_lines(metrics, ()) if metrics.is_file() else []
        for target in run.targets:
            result = run.result(method, target)
            for place, language in ((SOURCE, source), (TARGET, target)):
                for sample in measure(in_language(answers, language)).values():
                    result.add(f"{place} {sample.figure.title}", sample)
                key = f"nll_{side(language, source, run.report['lang'])}"
                add_nll_(result, place, key, scores.get("heldout", {}), steps)
            results.append(result)
    return results


def add_nll_(result: Result, place: str, key: str, heldout: dict, steps: list[dict]) -> None:
    """Held-out NLL after training, and its curve over the steps."""
    if key in heldout:
        result.figures[f"{place} nll"] = Value(heldout[key], digits=3)
    result.curves[place] = {line["step"]: line[key] for line in steps if key in line}


def origins(settings: dict, runs: list[Run]) -> list[tuple[Run, str]]:
    """[(run, method)] whose model was evaluated: that of runs/NAME/METHOD/adapter or model;
    "base" of every run that began with the model."""
    named = settings.get("adapter") or settings.get("model") or ""
    trained = Path(named).resolve().parent
    for run in runs:
        if run.directory.resolve() == trained.parent:
            return [(run, trained.name)]
    if settings.get("adapter") or not named:
        return []
    return [(run, "base") for run in runs
            if named in (run.flags.get("base"), run.flags.get("model"))]


def read_evaluation(directory: Path, runs: list[Run]) -> list[Result]:
    """What `eval.py mc`, `perplexity` or `judge` wrote:
    the figures of one model, in the rows of the run it came from."""
    path = directory / "result.json"
    found = read_json(path)
    settings, figures = need(found, "settings", path), need(found, "figures", path)
    language, results = settings.get("language") or "-", []
    for run, method in origins(settings, runs):
        # a benchmark's figures name its own language
        of_one = language in run.targets or (language != "-" and "benchmark" not in settings)
        for target in [language] if of_one else run.targets:
            results.append(run.result(method, target))
    if not results:
        model = settings.get("adapter") or settings.get("model") or directory.name
        results = [Result(language, "-", str(model), "-")]
    lines = [line for line in load_lines(directory / "answers.jsonl", ()) if "scores" in line]
    for name, figure in figures.items():
        scores = {line["question"]: line["scores"][name]
                  for line in lines if name in line["scores"]}
        value = Value(figure["value"], figure.get("stderr"), figure.get("digits", 2))
        for result in results:
            result.figures[name] = value
            if scores:
                result.samples[name] = scored_sample(scores)
    return results


def scored_sample(scores: dict[str, float]) -> Sample:
    """Of {question: score in %}."""
    figure = SHARE if set(scores.values()) <= {0, 100} else MEAN
    counts = {question: figure.of_line(score) for question, score in scores.items()}
    return Sample(figure, counts)


def read_results(directories: list[Path]) -> list[Result]:
    """Results of run and evaluation directories, those of one trained model merged."""
    runs = [open_run(directory) for directory in directories if is_run(directory)]
    label_methods_(runs)
    found = [(run.directory, result) for run in runs for result in read_run(run)]
    for directory in directories:
        if not is_run(directory):
            found += [(directory, result) for result in read_evaluation(directory, runs)]
    merged = {}
    for directory, result in found:
        known = merged.setdefault((*result.row, result.seed), result)
        if known is not result:
            merge_(known, result, directory)
    return list(merged.values())


def merge_(known: Result, other: Result, directory: Path) -> None:
    """Add the figures of `other` to those of the same model; InputError when both have one that differs."""
    for name, figure in other.figures.items():
        if known.figures.setdefault(name, figure).value != figure.value:
            raise InputError(f"{directory}: a second, different {name!r} for {' '.join(known.row)}, "
                             f"seed {known.seed}: compare one of the two at a time")
    known.samples |= other.samples


# ------------------------------------------------------------------------------------------------- comparison

COLUMNS = 7                             # figures side by side in a table
Rows = dict[tuple[str, str, str], list[Result]]     # {(language, samples, method): its results over seeds}


def mean_and_error(values: list[float]) -> tuple[float, float | None]:
    """Mean, and its standard error over the values (None for a single one)."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return mean, None
    return mean, statistics.stdev(values) / math.sqrt(len(values))


def by_row(results: list[Result]) -> Rows:
    """Results that differ only in the seed,
    in the order of languages, sample sizes and the order they were given."""
    rows = {}
    for result in results:
        rows.setdefault(result.row, []).append(result)
    return {row: rows[row] for row in sorted(rows, key=language_and_size)}


def language_and_size(row: tuple[str, str, str]) -> tuple[str, int]:
    language, size, _ = row
    return language, int(size) if size.isdigit() else -1


def shown(name: str, results: list[Result]) -> str:
    """A cell: mean ± standard error over seeds; with one seed over questions, where that is known."""
    found = [result.figures[name] for result in results if name in result.figures]
    if not found:
        return "-"
    mean, error = mean_and_error([figure.value for figure in found])
    if error is None:
        error = found[0].error
    return with_error(mean, error, found[0].digits)


def column_groups(names: list[str]) -> list[list[str]]:
    """Figures that stand side by side: those of the source, of the target language, of evaluations."""
    groups = {SOURCE: [], TARGET: [], "": []}
    for name in names:
        place = name.split(" ")[0]
        groups[place if place in groups else ""].append(name)
    parts = []
    for group in groups.values():
        parts += [group[first:first + COLUMNS] for first in range(0, len(group), COLUMNS)]
    return parts


def figure_tables(rows: Rows) -> list[str]:
    """All figures; a row stands only in tables where it has one."""
    names = {}
    for group in rows.values():
        for result in group:
            names |= dict.fromkeys(result.figures)
    tables = []
    for part in column_groups(list(names)):
        lines = []
        for row, group in rows.items():
            cells = [shown(name, group) for name in part]
            if any(cell != "-" for cell in cells):
                lines.append([*row, str(len(group)), *cells])
        tables.append(table(["language", "samples", "method", "seeds", *part], lines))
    return tables


def samples_of(group: list[Result]) -> dict[str, list[Sample]]:
    """{figure: its samples over seeds}"""
    samples = {}
    for result in group:
        for name, sample in result.samples.items():
            samples.setdefault(name, []).append(sample)
    return samples


def differences(rows: Rows, baseline: str) -> tuple[list[list[str]], int]:
    """(a line for each figure that can be paired with the baseline's,
    how many more have no difference anywhere)."""
    lines, equal = [], 0
    for row, group in rows.items():
        language, size, method = row
        base = samples_of(rows.get((language, size, baseline), []))
        own = samples_of(group) if method != baseline else {}
        for name in own:
            found = paired_difference(own[name], base[name]) if name in base else None
            if found and found.nowhere:
                equal += 1
            elif found:
                cells = difference_cells(found, own[name][0].figure.digits)
                lines.append([*row, name, *cells])
    return lines, equal


def difference_cells(found: Difference, digits: int) -> list[str]:
    difference = shown_difference(found, digits)
    interval = f"{found.low:+.{digits}f} to {found.high:+.{digits}f}"
    chance = f"{found.p:.4f}" if found.p else f"<{2 / RESAMPLES:.4f}"
    return [difference, interval, chance, str(found.questions)]


def comparison_text(results: list[Result], baseline: str) -> str:
    """Markdown: tables of all figures, and one of paired differences from the baseline."""
    rows = by_row(results)
    text = ["Mean over seeds ± its standard error; with one seed ± standard error over questions where it is "
            "known. In %, but for chrF (0 to 100), bits per byte and NLL per token.", *figure_tables(rows)]
    methods = list(dict.fromkeys(row[2] for row in rows))
    if baseline not in methods:
        text += [f"No method here is called {baseline}, so there are no paired differences; "
                 f"--baseline takes {', '.join(methods)}."]
    lines, equal = differences(rows, baseline)
    if lines:
        text += [f"Difference from {baseline} ± standard error, paired by question "
                 f"({RESAMPLES:,} bootstrap draws of questions; figures averaged over seeds).",
                 table(["language", "samples", "method", "figure", "difference", "95 %", "p", "questions"],
                       lines)]
    if equal:
        text += [f"{equal} more figures equal those of {baseline} on every question."]
    return "\n\n".join(text) + "\n"


def settings_of(directory: Path) -> dict:
    """What a directory's numbers depend on: decoding, template, shots, file hashes."""
    if not is_run(directory):
        return read_json(directory / "result.json")["settings"]
    config = read_json(directory / "config.json")
    methods = read_json(directory / "report.json")["methods"]
    first = next(iter(methods.values()))
    return {"hashes": config.get("inputs", {}),
            "decoding": first.get("decoding", {}),
            "eval_split": config["flags"].get("eval_split")}


def settings_text(directories: list[Path]) -> str:
    """Settings of all directories: for those of one kind what they share once, then what differs."""
    lines, kinds = ["Settings:"], {}
    for directory in directories:
        settings = settings_of(directory)
        kinds.setdefault(tuple(settings), {})[directory] = settings
    for group in kinds.values():
        names = ", ".join(map(str, group))
        shared = common_items(list(group.values()))
        lines.append(f"- {names}: {json.dumps(shared, ensure_ascii=False)}")
        for directory, settings in group.items():
            own = {key: value for key, value in settings.items() if key not in shared}
            if own:
                lines.append(f"  - {directory}: {json.dumps(own, ensure_ascii=False)}")
    return "\n".join(lines)


def common_items(dicts: list[dict]) -> dict:
    """What all of these dicts with the same keys say alike."""
    first, *others = dicts
    return {key: value for key, value in first.items()
            if all(other[key] == value for other in others)}
