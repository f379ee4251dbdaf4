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
from itertools import chain
from pathlib import Path

from engine.files import InputError, as_kind, need, read_json
from evals.answers import read_lines
from evals.figures import ANSWER_KEYS, FEW, RESAMPLES, SCORE, SHARE, Sample, measure, paired_difference
from evals.report import in_language, shown, shown_difference, side, table

# ------------------------------------------------------------------------------------------ results on disk

# Runs that differ in these alone are the same, or have rows and columns of the table that say so.
SAME_METHOD = {"seed", "lang", "samples", "method", "baseline", "device", "save_every", "eval_every", "merge",
               "shard"}
WRITTEN = ("report.json", "result.json", "config.json", "answers.jsonl")
SOURCE, TARGET = "source", "target"     # figures carry these in place of language codes, to fit one column


@dataclass
class Result:
    """What is known of one trained model: figures by name, and what they are computed from."""
    language: str
    size: str                                                       # training samples
    method: str
    seed: str
    figures: dict[str, dict] = field(default_factory=dict)          # each as in result.json
    samples: dict[str, Sample] = field(default_factory=dict)        # question by question
    curves: dict[str, dict[int, float]] = field(default_factory=dict)    # held-out NLL by place and step

    @property
    def row(self) -> tuple[str, str, str]:
        """What is averaged over seeds."""
        return self.language, self.size, self.method


def holds(directory: Path, name: str, key: str) -> bool:
    path = directory / name
    return path.is_file() and key in read_json(path)


def is_run(directory: Path) -> bool:
    """Of clo.py, and finished."""
    return holds(directory, "report.json", "methods")


def is_begun(directory: Path) -> bool:
    """Of clo.py; models have a config.json, too, without "flags"."""
    return holds(directory, "config.json", "flags")


def is_finished(directory: Path) -> bool:
    """A run, or an evaluation; methods inside a run have a result.json without "figures"."""
    return is_run(directory) or holds(directory, "result.json", "figures")


def find_results(paths: list) -> tuple[list[Path], list[Path]]:
    """(directories of finished runs and evaluations that the paths stand for, what holds none of them).
    A file, or a method's directory, stands for what it belongs to, a directory for all that is below it."""
    missing = [str(path) for path in paths if not Path(path).exists()]
    if missing:
        raise InputError(f"{', '.join(missing)}: no such file or directory; run directories of clo.py and "
                         f"directories of mc, perplexity, judge are compared")
    found, left_out = {}, []
    for path in map(Path, paths):
        below = {file.parent for name in WRITTEN for file in path.rglob(name)}
        owners = [path, path.parent, path.parent.parent]
        finished = sorted(filter(is_finished, below))
        if not finished:
            finished = list(filter(is_finished, owners))[:1]
        found |= {directory.resolve(): directory for directory in finished}
        left_out += sorted(filter(is_unfinished, below)) if finished else [path]
    if not found:
        raise InputError(f"{', '.join(map(str, paths))}: neither report.json (a finished run) "
                         f"nor result.json (an evaluation) is there")
    return list(found.values()), list(dict.fromkeys(left_out))


def is_unfinished(directory: Path) -> bool:
    """A run or evaluation that was begun and has no result; a method's directory belongs to its run."""
    return not is_finished(directory) and not is_begun(directory.parent) and (
        is_begun(directory) or (directory / "answers.jsonl").exists())


Results = list[Result]


@dataclass
class Run:
    """A finished run directory of clo.py."""
    directory: Path
    lang: str                           # its target language, or several joined by commas
    samples: int
    seed: int
    methods: dict[str, dict]            # the scores of each
    flags: dict
    labels: dict[str, str] = field(default_factory=dict)        # what tables call its methods

    def result(self, method: str, target: str) -> Result:
        """What is known of a method before anything is read. A target language is called "sw", or
        "sw (sw,yo)" where the run had several."""
        language = target if target == self.lang else f"{target} ({self.lang})"
        label = self.labels.get(method, method)
        return Result(language, str(self.samples), label, str(self.seed))


def read_report(directory: Path) -> Run:
    path = directory / "report.json"
    report = read_json(path)
    known = [need(report, key, path) for key in ("lang", "samples", "seed", "methods")]
    as_kind(known[0], str, f"{path}: lang")
    as_kind(known[3], dict, f"{path}: methods")
    known[1] = report.get("rows", known[1])         # before a translation's checks: the same for all seeds
    path = directory / "config.json"
    flags = as_kind(need(read_json(path), "flags", path), dict, f"{path}: flags")
    return Run(directory, *known, flags)


def label_methods_(runs: list[Run]) -> None:
    """Name methods by the flags, beyond those the table shows, in which their runs on one language differ."""
    differing = {}
    for run in runs:
        for other in runs:
            common = run.methods.keys() & other.methods.keys() if run.lang == other.lang else ()
            names = {name for name in run.flags if run.flags[name] != other.flags.get(name)}
            for method in common:
                differing.setdefault(method, set()).update(names - unread_flags(method, run.flags))
    for run in runs:
        for method in run.methods:
            label = method
            for name in sorted(differing[method]):
                label += f" {name.replace('_', '-')}={shown_flag(run.flags.get(name))}"
            run.labels[method] = label


def shown_flag(value) -> str:
    if value is None:                   # what that stood for, the program of that run knows
        return "default"
    return f"{value:g}" if isinstance(value, float) else str(value)


def unread_flags(method: str, flags: dict) -> set[str]:
    """Flags in which runs of a method may differ and be the same: none of its stages reads them. A stage is
    called by what it minimises: sft, dpo, or clo, which at a lambda of 1 is sft."""
    if method == "base":
        return set(flags)
    unread = set(SAME_METHOD)
    stages = method.split("+")
    if "clo" not in stages:
        unread |= {"lam", "nll"}
    plain = [stage.startswith("sft") or (stage == "clo" and flags.get("lam") == 1) for stage in stages]
    if all(plain):
        unread |= {"beta", "preference", "anchor"}
    elif not any(plain):
        unread.add("baseline_epochs")
    return unread


def training_steps(directory: Path) -> list[dict]:
    """The lines of a method's metrics.jsonl; a second stage's steps go on where the first one's end."""
    lines = []
    for path in sorted(directory.rglob("metrics.jsonl")):
        before = lines[-1]["step"] if lines else 0
        lines += [line | {"step": before + line["step"]} for line in read_lines(path)]
    return lines


def run_results(run: Run) -> Results:
    """The methods of a run, one Result for each target language."""
    source, results = run.flags.get("source", "en"), []
    for method, scores in run.methods.items():
        answers = read_lines(run.directory / method / "answers.jsonl", ANSWER_KEYS)
        steps = training_steps(run.directory / method)
        for target in run.lang.split(","):
            result = run.result(method, target)
            for place, language in ((SOURCE, source), (TARGET, target)):
                for sample in measure(in_language(answers, language)).values():
                    name = f"{place} {sample.figure.title}"
                    result.samples[name] = sample
                    result.figures[name] = sample.summary()
                key = f"nll_{side(language, source, run.lang)}"
                if key in scores["heldout"]:
                    result.figures[f"{place} nll"] = {"value": scores["heldout"][key], "digits": 3}
                validated = [line for line in steps if key in line]
                result.curves[place] = {line["step"]: line[key] for line in validated}
            results.append(result)
    return results


def origins(settings: dict, runs: list[Run]) -> list[tuple[Run, str]]:
    """[(run, method)] whose model was evaluated: that of runs/NAME/METHOD/adapter or model;
    "base" of every run that began with the model."""
    named = settings.get("adapter") or settings.get("model") or ""
    trained = Path(named).resolve().parent
    for run in runs:
        if run.directory.resolve() == trained.parent:
            return [(run, trained.name)]
    if settings.get("adapter"):
        return []
    begun = [run for run in runs if named and named == run.flags.get("model")]
    return [(run, "base") for run in begun]


def evaluation_results(directory: Path, runs: list[Run]) -> Results:
    """What `eval.py mc`, `perplexity` or `judge` wrote:
    the figures of one model, in the rows of the run it came from."""
    settings, figures = read_result(directory / "result.json")
    results = []
    language = settings.get("language") or "-"
    for run, method in origins(settings, runs):
        targets = run.lang.split(",")
        # a benchmark's figures name its own language
        if language in targets or language != "-" and "benchmark" not in settings:
            targets = [language]
        results += [run.result(method, target) for target in targets]
    model = settings.get("adapter") or settings.get("model") or directory.name
    results = results or [Result(language, "-", str(model), "-")]
    samples = scored_samples(read_lines(directory / "answers.jsonl"), directory / "answers.jsonl")
    for result in results:
        result.figures |= figures
        result.samples |= samples
    return results


def read_result(path: Path) -> tuple[dict, dict]:
    """(settings, figures) of a result.json. InputError for another program's, which may have figures, too."""
    written = read_json(path)
    settings, figures = (as_kind(need(written, key, path), dict, f"{path}: {key}")
                         for key in ("settings", "figures"))
    for key in ("model", "adapter"):
        as_kind(settings.get(key) or "", str, f"{path}: {key}")
    for name, figure in figures.items():
        as_number(need(figure, "value", f"{path}: {name}"), f"{path}: {name}: value")
    return settings, figures


def as_number(value, where) -> float:
    if type(value) not in (int, float):
        raise InputError(f"{where}: a number expected, found {value!r:.80}")
    return value


def scored_samples(lines: list[dict], path: Path) -> dict[str, Sample]:
    """{figure: its sample} of lines with "scores" in %."""
    scores = {}
    for line in lines:
        for name, score in as_kind(line.get("scores", {}), dict, f"{path}: scores").items():
            question = need(line, "question", path)
            scores.setdefault(name, {})[question] = as_number(score, f"{path}: {question}: {name}")
    samples = {}
    for name, found in scores.items():
        kind = SHARE if set(found.values()) <= {0, 100} else SCORE
        counts = {question: kind.of_line(score) for question, score in found.items()}
        samples[name] = Sample(kind, counts)
    return samples


def read_results(directories: list[Path]) -> Results:
    """Results of run and evaluation directories, those of one trained model merged. InputError when a model
    has two figures of one name that differ."""
    runs = [read_report(directory) for directory in directories if is_run(directory)]
    label_methods_(runs)
    found = [(run.directory, run_results(run)) for run in runs]
    found += [(directory, evaluation_results(directory, runs)) for directory in directories
              if not is_run(directory)]
    merged = {}
    for directory, results in found:
        for result in results:
            known = merged.setdefault((*result.row, result.seed), result)
            for name, figure in result.figures.items():
                if known.figures.setdefault(name, figure)["value"] != figure["value"]:
                    raise InputError(f"{directory}: a second, different {name!r} for {' '.join(known.row)}, "
                                     f"seed {known.seed}: compare one of the two at a time")
            known.samples |= result.samples
    return list(merged.values())


# ------------------------------------------------------------------------------------------------- comparison

Rows = dict[tuple[str, str, str], Results]      # {(language, samples, method): its results over seeds}


def by_row(results: Results) -> Rows:
    """Results that differ only in the seed,
    in the order of languages, sample sizes and the order they were given."""
    rows = {}
    for result in results:
        rows.setdefault(result.row, []).append(result)
    return dict(sorted(rows.items(), key=lambda item: language_and_size(*item[0])))


def language_and_size(language: str, size: str, method: str) -> tuple[str, int]:
    return language, int(size) if size.isdigit() else -1


def over_seeds(name: str, results: Results) -> dict | None:
    """A figure's mean ± standard error over seeds; with one seed over questions, where that is known."""
    found = [result.figures[name] for result in results if name in result.figures]
    if len(found) < 2:
        return found[0] if found else None
    values = [figure["value"] for figure in found]
    error = statistics.stdev(values) / math.sqrt(len(values))
    return found[0] | {"value": statistics.fmean(values), "stderr": error}


def names_in(dicts: list[dict]) -> list[str]:
    """The keys of all of them, in order."""
    return list(dict.fromkeys(chain.from_iterable(dicts)))


def figure_tables(rows: Rows) -> list[str]:
    """All figures: those of the source, of the target language, of evaluations. A row stands only in tables
    where it has one."""
    parts = {SOURCE: [], TARGET: [], "": []}
    results = sum(rows.values(), [])
    for name in names_in([result.figures for result in results]):
        place = name.split(" ")[0]
        parts[place if place in parts else ""].append(name)
    tables = []
    for names in filter(None, parts.values()):
        lines = []
        for row, group in rows.items():
            values = [over_seeds(name, group) for name in names]
            if any(values):
                cells = map(shown, values)
                lines.append([*row, str(len(group)), *cells])
        tables.append(table(["language", "samples", "method", "seeds", *names], lines))
    return tables


def samples_of(group: Results, name: str) -> list[Sample]:
    """Those of a figure over seeds."""
    return [result.samples[name] for result in group if name in result.samples]


def differences(rows: Rows, baseline: str) -> tuple[list[list[str]], int]:
    """(a line for each figure that can be paired with the baseline's,
    how many more have no difference anywhere)."""
    lines, equal = [], 0
    for (language, size, method), group in rows.items():
        base = rows.get((language, size, baseline), group)
        if base is group:
            continue
        for name in names_in([result.samples for result in group]):
            own, others = samples_of(group, name), samples_of(base, name)
            found = paired_difference(own, others) if others else None
            if not found:
                continue
            if found.nowhere:
                equal += 1
            else:
                digits = own[0].figure.digits
                interval = f"{found.low:+.{digits}f} to {found.high:+.{digits}f}"
                chance = f"{found.p:.4f}" if found.p else f"<{2 / RESAMPLES:.4f}"
                chance = chance if found.questions >= FEW else "-"
                difference = shown_difference(found, digits)
                cells = [difference, interval, chance, str(found.questions)]
                lines.append([language, size, method, name, *cells])
    return lines, equal


def comparison_text(results: Results, baseline: str) -> str:
    """Markdown: tables of all figures, and one of paired differences from the baseline."""
    rows = by_row(results)
    text = ["Mean over seeds ± its standard error; with one seed ± standard error over questions where it is "
            "known. In %, but for chrF (0 to 100), bits per byte and NLL per token.", *figure_tables(rows)]
    methods = list(dict.fromkeys(method for _, _, method in rows))
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
    return {
        "hashes": config.get("inputs", {}),
        "decoding": first.get("decoding", {}),
        "eval_split": config["flags"].get("eval_split")}


def settings_text(directories: list[Path]) -> str:
    """Settings, once for all directories that share them."""
    groups = {}
    for directory in directories:
        settings = json.dumps(settings_of(directory), ensure_ascii=False)
        groups.setdefault(settings, []).append(str(directory))
    lines = [f"- {', '.join(names)}: {settings}" for settings, names in groups.items()]
    return "\n".join(["Settings:", *lines])
