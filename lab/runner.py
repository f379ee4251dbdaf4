"""Runs what is missing of a plan, one after the other, and leaves a line for each.

A run is the ordinary `python clo.py` in a directory of its own; the lab then scores the trained model itself:
the base model is answered and scored once for all, one classifier judges every reply's language, and small
training sets do not change it. A killed lab goes on where it stopped, inside of a run too.
"""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

import data
import model as llama
from engine import ranks
from engine.files import InputError, fingerprint, locked, parse_json, read_json, read_records, whole_lines
from formats import hub
from formats.languages import language_list
from formats.weights import DTYPES
from lab import measure
from lab.plan import BASE, Run, base_run, ready

RESULTS = Path(__file__).parent / "results"
LOWEST_PRIORITY = 19
ONE_ANSWER = {"baseline": "none", "answers": 1}     # the lab answers the questions, see above


class RunFailed(Exception):
    """A command of the lab ended with an error; the message says which, and where its log is."""


# -------------------------------------------------------------------------------------------------- the queue

def read_results(path: Path) -> list[dict]:
    """The lines of a file in lab/results; without the half one that a kill leaves."""
    return [parse_json(line, path, "one object a line is wanted", number)
            for number, line in enumerate(whole_lines(path), 1)]


def work(plan: dict, runs: Path, results: Path) -> dict[str, str]:
    """Run what is missing of the plan; {run: why it failed}."""
    os.nice(LOWEST_PRIORITY)
    failed = {}
    with locked(runs / plan["name"]):
        while missing := ready(plan, read_results(results), failed):
            run = missing[0]
            print(f"{run.name}: first of {len(missing)} that can begin", flush=True)
            try:
                append_line(results, perform(plan, run, runs))
            except RunFailed as error:
                failed[run.name] = str(error)
                print(error, flush=True)
    return failed


def append_line(path: Path, line: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = b"".join(old + b"\n" for old in whole_lines(path))
    with open(path, "ab") as file:
        file.truncate(len(whole))                       # a kill may have left half a line
        file.write(json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
        os.fsync(file.fileno())


def call(program: str, flags: dict, directory: Path) -> None:
    """python PROGRAM --flag value ...; what it prints is appended to DIRECTORY.log. RunFailed if it fails."""
    words = [word for flag, value in flags.items() for word in switch(flag, value)]
    log = directory.with_name(directory.name + ".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        process = subprocess.Popen([sys.executable, str(hub.ROOT / program), *words], stdout=file, stderr=file)
        try:
            code = process.wait()
        except KeyboardInterrupt:                       # the run has had it too, and saves what it has
            process.wait()
            raise
    if code:
        last = log.read_text(encoding="utf-8").strip().splitlines()[-1:]
        raise RunFailed(f"{directory.name}: {program} ended with code {code}: {''.join(last)} (see {log})")


def switch(flag: str, value) -> list[str]:
    """A flag as words of a command line; true is a switch, false and null leave it away."""
    if value is None or value is False:
        return []
    return [f"--{flag}"] if value is True else [f"--{flag}", str(value)]


# ---------------------------------------------------------------------------------------------------- one run

def perform(plan: dict, run: Run, runs: Path) -> dict:
    """Train (the base alone is not), score, and tell: the line of a run."""
    languages = [run.flags.get("source", "en"), *language_list(run.language)]
    rows = translated(run, runs)
    directory, told = runs / run.name, {"epochs": 0, "rows": 0, "seconds": 0, "tokens": 0}
    if run.method != BASE:
        flags = {flag: value for flag, value in run.flags.items() if flag != "translator"}
        call("clo.py", flags | ONE_ANSWER | {"data": rows, "out": directory}, directory)
        told = training_facts(directory, run.flags["method"])
    base = base_run(plan, run.language)
    if run.split == "test" and run.method != BASE and not answers_of(runs, base).exists():
        score(base, runs, rows, languages, base)        # scored on another machine: its replies are wanted here
    asked, questions = score(run, runs, rows, languages, base)
    return {"run": run.name, "plan": plan["name"], "language": run.language, "method": run.method,
            "size": run.size, "seed": run.seed, "split": run.split, **told, "flags": run.flags,
            **machine(), "asked": asked, "questions": questions}


def translated(run: Run, runs: Path) -> Path:
    """The training rows: those of the plan, or with a translator their translation, made once."""
    if "translator" not in run.flags:
        return Path(run.flags["data"])
    given = {flag: run.flags[flag] for flag in ("data", "translator")}
    name = f"rows-{run.language}-{fingerprint(given)[:6]}"
    part, whole = runs / f"{name}.part.jsonl", runs / f"{name}.jsonl"
    if not whole.exists():                              # a part of them goes on where it stopped
        call("translate.py", given | {"lang": run.language, "out": part}, runs / name)
        part.rename(whole)
    return whole


def answers_of(runs: Path, run: Run) -> Path:
    return runs / run.name / "replies.jsonl"


def score(run: Run, runs: Path, data_file: Path, languages: list[str], base: Run) -> tuple[str, dict]:
    """(hash of what was asked, {language: columns}); a point of a grid writes no replies."""
    flags, split = run.flags, run.flags["eval-split"]
    found = data.read_rows(hub.find(flags["eval-data"]), languages[0], targets=languages[1:])
    rows = [row for row in found if row.get("split") == split and set(languages) <= row.keys()]
    if not rows:
        raise InputError(f"{flags['eval-data']}: no row of split {split!r} in {', '.join(languages)}")
    tokenizer = data.load_tokenizer(hub.local(flags["model"]), flags.get("template-args"))
    model, system = open_model(run, runs / run.name), flags.get("system-prompt")
    columns = measure.answer_columns(model, tokenizer, rows, languages, system)
    if split == "test":
        known = data.read_rows(data_file, languages[0], targets=languages[1:])
        classifier = measure.fit_classifier(known, languages)
        more = measure.reply_columns(model, tokenizer, rows, languages, classifier, flags["max-new-tokens"],
                                     answers_of(runs, run), answers_of(runs, base), system)
        columns = {language: columns[language] | more[language] for language in languages}
    return fingerprint([[row[language] for language in languages] for row in rows]), columns


def open_model(run: Run, directory: Path) -> llama.Llama:
    """The base with what the run trained, from the layout that the run wrote for other tools."""
    where = {"device": ranks.pick_device(run.flags.get("device", "auto")), "dtype": DTYPES[run.flags["dtype"]]}
    if run.method == BASE:
        return llama.load(run.flags["model"], **where)
    trained = directory / run.flags["method"]
    if run.flags.get("train", "lora") == "lora":
        return llama.load(run.flags["model"], adapter=trained / "adapter", **where)
    return llama.load(trained / "model", **where)


def training_facts(directory: Path, method: str) -> dict:
    """Epochs, rows trained on, seconds of all steps, and the tokens that went through the model: those of all steps,
    and once more those of an epoch where a preference needs a reference pass."""
    flags = read_json(directory / "config.json")["flags"]
    seconds = tokens = 0
    for path in sorted((directory / method).rglob("metrics.jsonl")):
        steps = [line for _, line in read_records(path) if "tokens" in line]
        stage = method if path.parent.name == method else path.parent.name.split("-", 1)[1]
        read = sum(line["tokens"] for line in steps)
        seconds += sum(line["seconds"] for line in steps)
        tokens += read if stage.startswith("sft") else read * (1 + 1 / flags["epochs"])
    report = read_json(directory / "report.json")
    return {"epochs": flags["epochs"], "rows": report["samples"], "seconds": round(seconds, 1),
            "tokens": round(tokens)}


def machine() -> dict:
    """What numbers depend on beside the settings."""
    info = Path("/proc/cpuinfo")
    names = info.read_text().splitlines() if info.exists() else []
    found = [line.split(":", 1)[1].strip() for line in names if line.startswith("model name")]
    cpu = found[0] if found else platform.processor() or platform.machine()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"commit": commit(), "cpu": cpu, "gpu": gpu, "threads": torch.get_num_threads(),
            "torch": torch.__version__}


def commit() -> str | None:
    """Of the program, with a "+" where files that it tracks have changed; None outside of git."""
    def git(*words):
        return subprocess.run(["git", "-C", str(hub.ROOT), *words], capture_output=True, text=True)
    head = git("rev-parse", "--short=12", "HEAD")
    if head.returncode:
        return None
    changed = git("status", "--porcelain", "--untracked-files=no", ":!lab/results").stdout.strip()
    return head.stdout.strip() + ("+" if changed else "")


def describe(plan: dict, lines: list[dict]) -> str:
    """What is missing and can begin, in its order."""
    missing = ready(plan, lines)
    return "\n".join([*(run.name for run in missing), f"{plan['name']}: {len(lines)} lines, "
                      f"{len(missing)} runs can begin; others may wait for their grid or another's tokens"])
