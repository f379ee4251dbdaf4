"""The comparison of many runs and evaluations: one table, and paired differences from a baseline.

    python eval.py compare runs/sw-0 runs/sw-1 runs/sw-2 --baseline sft --plot plots

It puts runs over methods, seeds, sample sizes and languages into one table: mean and standard error over
seeds, and for what was answered question by question a paired bootstrap against a named baseline. Directories
that `eval.py mc`, `perplexity` and `judge` wrote for a run's adapter add their figures to the row of that run.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from engine.files import InputError, as_kind, need, parse_json, read_records, read_text
from evals.figures import ANSWER_KEYS, MEAN, RESAMPLES, SHARE, Difference, Sample, measure, paired_difference
from evals.report import in_language, shown_difference, side, table, with_error

# ------------------------------------------------------------------------------------------ results on disk

IGNORED_FLAGS = {"out", "seed", "lang", "samples", "method", "baseline", "fresh", "device", "save_every",
                 "dry_run"}
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


def is_run(directory: Path) -> bool:
    """Of clo.py, and finished."""
    return (directory / "report.json").is_file()


def is_begun(directory: Path) -> bool:
    """Of clo.py; models have a config.json, too, without "flags"."""
    path = directory / "config.json"
    return path.is_file() and "flags" in load_object(path)


def is_evaluation(directory: Path) -> bool:
    """Of eval.py, and finished; a method's directory inside a run has a result.json without "figures"."""
    path = directory / "result.json"
    return path.is_file() and "figures" in load_object(path)


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


def results_of(path: Path) -> list[Path]:
    if path.is_dir():
        files = [*path.rglob("report.json"), *path.rglob("result.json")]
        below = [file.parent for file in files if is_run(file.parent) or is_evaluation(file.parent)]
        if below:
            return sorted(set(below))
    owners = [path, path.parent] if path.is_dir() else [path.parent, path.parent.parent]
    return [owner for owner in owners if is_run(owner) or is_evaluation(owner)][:1]


def unfinished(directory: Path) -> list[Path]:
    """Runs and evaluations below a directory that were begun and have no result."""
    begun = [file.parent for file in directory.rglob("config.json") if is_begun(file.parent)]
    begun += [file.parent for file in directory.rglob("answers.jsonl") if not is_begun(file.parent.parent)]
    return sorted(path for path in begun if not is_run(path) and not is_evaluation(path))


def differing_flags(configs: dict[Path, dict]) -> dict[str, set[str]]:
    """{method: flags, beyond those the table shows, in which its runs on one language differ}:
    they tell rows apart."""
    values = {}
    for run, flags in configs.items():
        for method in load_object(run / "report.json")["methods"]:
            for key in flags.keys() - unread_flags(method, flags):
                values.setdefault((method, key, flags.get("lang")), set()).add(json.dumps(flags[key]))
    differing = {}
    for (method, key, _), found in values.items():
        if len(found) > 1:
            differing.setdefault(method, set()).add(key)
    return differing


def unread_flags(method: str, flags: dict) -> set[str]:
    """Flags in which runs of a method may differ and be the same."""
    if method == "base":
        return set(flags)
    plain = method.startswith("sft") and method != "sft+dpo"
    return IGNORED_FLAGS | PREFERENCE_FLAGS if plain else IGNORED_FLAGS


def origins(settings: dict, configs: dict[Path, dict]) -> list[tuple[Path, str]]:
    """[(run directory, method)] whose model was evaluated: that of runs/NAME/METHOD/adapter or model;
    "base" of every run that began with the model."""
    trained = Path(settings.get("adapter") or settings.get("model") or "").resolve().parent
    found = [(run, trained.name) for run in configs if run.resolve() == trained.parent]
    named = None if settings.get("adapter") else settings.get("model")
    return found or [(run, "base") for run, flags in configs.items()
                     if named and named in (flags.get("base"), flags.get("model"))]


def label(method: str, flags: dict, differing: dict[str, set[str]]) -> str:
    told = [f"{key.replace('_', '-')}={flags.get(key)}" for key in sorted(differing.get(method, ()))]
    return " ".join([method, *told])


def row_language(target: str, lang: str) -> str:
    """How a table names a run's language: "sw", or "sw (sw,yo)" where the run had several targets."""
    return target if target == lang else f"{target} ({lang})"


def new_result(report: dict, target: str, method: str) -> Result:
    return Result(row_language(target, report["lang"]), str(report["samples"]), method, str(report["seed"]))


def read_run(run: Path, flags: dict, differing: dict[str, set[str]]) -> list[Result]:
    """The methods of a run directory of clo.py, one Result for each target language."""
    report, results = load_object(run / "report.json"), []
    source, lang = flags.get("source", "en"), report["lang"]
    for method, scores in need(report, "methods", run / "report.json").items():
        answers = load_lines(run / method / "answers.jsonl", ANSWER_KEYS)
        metrics = run / method / "metrics.jsonl"
        steps = load_lines(metrics, ()) if metrics.is_file() else []
        for target in lang.split(","):
            result = new_result(report, target, label(method, flags, differing))
            for place, language in ((SOURCE, source), (TARGET, target)):
                for sample in measure(in_language(answers, language)).values():
                    result.add(f"{place} {sample.figure.title}", sample)
                key = f"nll_{side(language, source, lang)}"
                if key in scores.get("heldout", {}):
                    result.figures[f"{place} nll"] = Value(scores["heldout"][key], digits=3)
                result.curves[place] = {line["step"]: line[key] for line in steps if key in line}
            results.append(result)
    return results


def read_evaluation(directory: Path, configs: dict[Path, dict],
                    differing: dict[str, set[str]]) -> list[Result]:
    """What `eval.py mc`, `perplexity` or `judge` wrote:
    the figures of one model, in the rows of the run it came from."""
    found = load_object(directory / "result.json")
    settings = need(found, "settings", directory / "result.json")
    language, results = settings.get("language") or "-", []
    for run, method in origins(settings, configs):
        report = load_object(run / "report.json")
        targets = report["lang"].split(",")
        # a benchmark's figures name its own
        if language in targets or language != "-" and "benchmark" not in settings:
            targets = [language]
        name = label(method, configs[run], differing)
        results += [new_result(report, target, name) for target in targets]
    model = settings.get("adapter") or settings.get("model") or directory.name
    results = results or [Result(language, "-", str(model), "-")]
    lines = [line for _, line in read_records(directory / "answers.jsonl")]
    for name, figure in need(found, "figures", directory / "result.json").items():
        scores = {line["question"]: line["scores"][name] for line in lines
                  if "question" in line and name in line.get("scores", {})}
        for result in results:
            if scores:
                result.samples[name] = scored_sample(scores)
            result.figures[name] = Value(figure["value"], figure.get("stderr"), figure.get("digits", 2))
    return results


def scored_sample(scores: dict[str, float]) -> Sample:
    """Of {question: score in %}."""
    figure = SHARE if set(scores.values()) <= {0, 100} else MEAN
    return Sample(figure, {question: figure.of_line(score) for question, score in scores.items()})


def read_results(directories: list[Path]) -> list[Result]:
    """Results of run and evaluation directories, those of one trained model merged."""
    configs = {directory: need(load_object(directory / "config.json"), "flags", directory / "config.json")
               for directory in directories if is_run(directory)}
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
    for name, figure in other.figures.items():
        if known.figures.setdefault(name, figure).value != figure.value:
            raise InputError(f"{directory}: a second, different {name!r} for {' '.join(known.row)}, "
                             f"seed {known.seed}: compare one of the two at a time")
    known.samples |= other.samples


# ------------------------------------------------------------------------------------------------- comparison

COLUMNS = 7                             # figures side by side in a table


def mean_and_error(values: list[float]) -> tuple[float, float | None]:
    """Mean, and its standard error over the values (None for a single one)."""
    n, mean = len(values), sum(values) / len(values)
    if n == 1:
        return mean, None
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)


def by_row(results: list[Result]) -> dict[tuple, list[Result]]:
    """Results that differ only in the seed,
    in the order of languages, sample sizes and the order they were given."""
    rows = {}
    for result in results:
        rows.setdefault(result.row, []).append(result)
    return dict(sorted(rows.items(), key=lambda item: (item[0][0], as_number(item[0][1]))))


def as_number(size: str) -> int:
    return int(size) if size.isdigit() else -1


def shown(name: str, results: list[Result]) -> str:
    """A cell: mean ± standard error over seeds; with one seed over questions, where that is known."""
    found = [result.figures[name] for result in results if name in result.figures]
    if not found:
        return "-"
    mean, error = mean_and_error([figure.value for figure in found])
    return with_error(mean, found[0].error if len(found) == 1 else error, found[0].digits)


def column_groups(names: list[str]) -> list[list[str]]:
    """Figures that stand side by side: those of the source, of the target language, of evaluations."""
    groups = {SOURCE: [], TARGET: [], "": []}
    for name in names:
        place = name.split(" ")[0]
        groups[place if place in groups else ""].append(name)
    return [group[first:first + COLUMNS] for group in groups.values()
            for first in range(0, len(group), COLUMNS)]


def figure_tables(rows: dict[tuple, list[Result]]) -> list[str]:
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


def differences(rows: dict[tuple, list[Result]], baseline: str) -> tuple[list[list[str]], int]:
    """(a line for each figure that can be paired with the baseline's,
    how many more have no difference anywhere)."""
    lines, equal = [], 0
    for (language, size, method), group in rows.items():
        base = rows.get((language, size, baseline), []) if method != baseline else []
        for name in dict.fromkeys(name for result in base for name in result.samples):
            one, other = ([result.samples[name] for result in results if name in result.samples]
                          for results in (group, base))
            found = paired_difference(one, other) if one and other else None
            if found and found.nowhere:
                equal += 1
            elif found:
                lines.append([language, size, method, name, *difference_cells(found, one[0].figure.digits)])
    return lines, equal


def difference_cells(found: Difference, digits: int) -> list[str]:
    chance = f"{found.p:.4f}" if found.p else f"<{2 / RESAMPLES:.4f}"
    return [shown_difference(found, digits), f"{found.low:+.{digits}f} to {found.high:+.{digits}f}", chance,
            str(found.questions)]


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
        return load_object(directory / "result.json")["settings"]
    config, report = load_object(directory / "config.json"), load_object(directory / "report.json")
    return {"hashes": config.get("inputs", {}),
            "decoding": next(iter(report["methods"].values())).get("decoding", {}),
            "eval_split": config["flags"].get("eval_split")}


def settings_text(directories: list[Path]) -> str:
    """Settings of all directories: for those of one kind what they share once, then what differs."""
    lines, kinds = ["Settings:"], {}
    for directory in directories:
        settings = settings_of(directory)
        kinds.setdefault(tuple(settings), {})[directory] = settings
    for group in kinds.values():
        first, *others = group.values()
        shared = {key: value for key, value in first.items()
                  if all(settings[key] == value for settings in others)}
        lines.append(f"- {', '.join(map(str, group))}: {json.dumps(shared, ensure_ascii=False)}")
        for directory, settings in group.items():
            own = {key: value for key, value in settings.items() if key not in shared}
            if own:
                lines.append(f"  - {directory}: {json.dumps(own, ensure_ascii=False)}")
    return "\n".join(lines)
