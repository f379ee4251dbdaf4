"""Runs what is missing of a plan, one after the other, and leaves a line for each. Several processes may work
at one plan: each takes a run that no other holds.

A run is the ordinary `python clo.py` in a directory of its own, which a grid's point shares with the run on the
test split for which it is chosen: what is trained is trained once. The lab scores the trained model itself: the
base model is answered and scored once for all, and one classifier judges the language of every reply, however
few rows a run has trained on. A killed lab goes on where it stopped, inside of a run too.
"""

import json
import platform
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import torch

import data
import model as llama
from engine import ranks
from engine.files import HeldByAnother, InputError, fingerprint, locked, read_json, write_text
from formats import hub
from formats.languages import language_list
from formats.weights import DTYPES
from lab import measure
from lab.plan import BASE, Run, base_run, ready

RESULTS = Path(__file__).parent / "results"
ONE_ANSWER = {"baseline": "none", "answers": 1, "max-new-tokens": 8}     # the lab answers the questions
LOOK_AGAIN = 5              # seconds, while other processes hold all that can begin


class RunFailed(Exception):
    """A command of the lab ended with an error; the message says which, and where its log is."""


# -------------------------------------------------------------------------------------------------- the queue

def read_results(path: Path) -> list[dict]:
    return measure.read_lines(path) if path.exists() else []


def write_results(path: Path, lines: list[dict]) -> None:
    """The whole file anew: a kill leaves the old one. Without spaces: most of it is small numbers."""
    texts = [json.dumps(line, ensure_ascii=False, separators=(",", ":")) for line in lines]
    write_text(path, "".join(text + "\n" for text in texts))


def work(plan: dict, runs: Path, results: Path) -> dict[str, str]:
    """Run what is missing of the plan; {run: why it failed}."""
    failed, told = {}, False
    while missing := ready(plan, read_results(results), failed):
        with ExitStack() as held:
            run = take_free(held, missing, runs)
            if run is None:
                if not told:
                    print(f"other processes hold all {len(missing)} that can begin; waiting", flush=True)
                told = True
                time.sleep(LOOK_AGAIN)
                continue
            if run not in ready(plan, read_results(results), failed):
                continue                                # another process ended it before we took it
            print(f"{run.name}: first of {len(missing)} that can begin", flush=True)
            try:
                line = perform(plan, run, runs)
            except RunFailed as error:
                failed[run.name] = str(error)
                print(error, flush=True)
                continue
            with locked(results, wait=True):
                write_results(results, [*read_results(results), line])
            told = False
    return failed


def take_free(held: ExitStack, missing: list[Run], runs: Path) -> Run | None:
    """The first run that no other process is at; it is ours until `held` closes."""
    for run in missing:
        try:
            held.enter_context(locked(turn_of(runs, run)))
        except HeldByAnother:
            continue
        return run
    return None


def turn_of(runs: Path, run: Run) -> Path:
    """Held by the process that is at this run, from its first step to its line."""
    return runs / f"{run.name}.line"


def call(program: str, flags: dict, directory: Path) -> None:
    """python PROGRAM --flag value ...; what it prints is appended to DIRECTORY.log. RunFailed if it fails."""
    words = [sys.executable, str(hub.ROOT / program)]
    for flag, value in flags.items():
        words.append(f"--{flag}")
        if value is not True:                           # else a switch
            words.append(str(value))
    log = directory.with_name(directory.name + ".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        process = subprocess.Popen(words, stdout=file, stderr=file)
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.terminate()                         # clo.py saves what it has
            process.wait()
            raise
    if code:
        last = log.read_text(encoding="utf-8").strip().splitlines()[-1:]
        raise RunFailed(f"{directory.name}: {program} ended with code {code}: {''.join(last)} (see {log})")


# ---------------------------------------------------------------------------------------------------- one run

def perform(plan: dict, run: Run, runs: Path) -> dict:
    """Train, but for the base, and score; the line of the run."""
    told, before = {"epochs": 0, "rows": 0, "seconds": 0, "tokens": 0}, None
    rows = translated(run, runs)
    if run.method != BASE:
        flags = {flag: value for flag, value in run.training.items() if flag != "translator"}
        directory = runs / run.directory
        call("clo.py", flags | ONE_ANSWER | {"data": rows, "out": directory}, directory)
        told = training_facts(directory, run.flags["method"])
        before = base_replies(base_run(plan, run.language, run.split), runs, rows)
    asked, questions = score(run, runs, rows, before)
    line = {"run": run.name, "plan": plan["name"]}
    for key in ("language", "method", "size", "seed", "split", "flags"):
        line[key] = getattr(run, key)
    return line | told | machine() | {"asked": asked, "questions": questions}


def translated(run: Run, runs: Path) -> Path:
    """The training rows: those of the plan, or with a translator their translation, made once."""
    if "translator" not in run.flags:
        return Path(run.flags["data"])
    given = {flag: run.flags[flag] for flag in ("data", "translator")}
    name = f"rows-{run.language}-{fingerprint(given)[:6]}"
    part, whole = runs / f"{name}.part.jsonl", runs / f"{name}.jsonl"
    with locked(whole, wait=True):                      # another process may be translating them
        if not whole.exists():                          # a part of them goes on where it stopped
            call("translate.py", given | {"lang": run.language, "out": part}, runs / name)
            part.rename(whole)
    return whole


def replies_of(runs: Path, run: Run) -> Path:
    return runs / run.name / "replies.jsonl"


def base_replies(base: Run, runs: Path, data_file: Path) -> list[dict]:
    path = replies_of(runs, base)
    with locked(turn_of(runs, base), wait=True):        # another process may be asking it
        if not path.exists():                           # its line was made on another machine
            score(base, runs, data_file, None)
    return measure.read_lines(path)


def score(run: Run, runs: Path, data_file: Path, before: list[dict] | None) -> tuple[str, dict]:
    """(hash of what was asked, {language: columns}). before: the base's replies, for "kept"."""
    flags = run.flags
    languages = [flags.get("source", "en"), *language_list(run.language)]
    found = data.read_rows(hub.find(flags["eval-data"]), languages[0], targets=languages[1:])
    rows = [row for row in found if row.get("split") == run.split and set(languages) <= row.keys()]
    if not rows:
        raise InputError(f"{flags['eval-data']}: no row of split {run.split!r} holds {', '.join(languages)}")
    tokenizer = data.load_tokenizer(hub.model_directory(flags["model"]))
    model = open_model(run, runs / run.directory)
    columns = measure.answer_columns(model, tokenizer, rows, languages)
    known = data.read_rows(data_file, languages[0], targets=languages[1:])
    lines = measure.reply(model, tokenizer, rows, languages, known, flags["max-new-tokens"],
                          replies_of(runs, run))
    for language, more in measure.reply_columns(lines, before).items():
        columns[language] |= more
    return fingerprint([[row[language] for language in languages] for row in rows]), columns


def open_model(run: Run, directory: Path) -> llama.Llama:
    """The base with what the run trained, from the layout that the run wrote for other tools."""
    flags = run.flags
    where = ranks.pick_device(flags.get("device", "auto")), DTYPES[flags["dtype"]]
    if run.method == BASE:
        return llama.load(flags["model"], *where)
    trained = directory / flags["method"]
    if flags.get("train", "lora") == "lora":
        return llama.load(flags["model"], *where, adapter=trained / "adapter")
    return llama.load(trained / "model", *where)


def training_facts(directory: Path, method: str) -> dict:
    """Epochs, rows trained on, seconds of all steps, and the tokens that went through the model: those of all
    steps, and once more those of an epoch where a preference needs a reference pass."""
    flags = read_json(directory / "config.json")["flags"]
    seconds = tokens = 0
    for path in (directory / method).rglob("metrics.jsonl"):
        steps = [line for line in measure.read_lines(path) if "tokens" in line]
        stage = path.parent.name                        # clo, sft-tgt, 1-sft, 2-dpo
        trained = sum(line["tokens"] for line in steps)
        referred = 0 if "sft" in stage.split("-") else trained / flags["epochs"]
        seconds += sum(line["seconds"] for line in steps)
        tokens += trained + referred
    rows = read_json(directory / "report.json")["samples"]
    return {"epochs": flags["epochs"], "rows": rows, "seconds": round(seconds, 1), "tokens": round(tokens)}


def machine() -> dict:
    """What numbers depend on beside the settings."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"commit": commit(), "cpu": names[0] if names else platform.machine(), "gpu": gpu,
            "threads": torch.get_num_threads(), "torch": torch.__version__}


def commit() -> str | None:
    """Of the program, with a "+" where its code has changed since; None outside of git."""
    def git(*words):
        return subprocess.run(["git", "-C", str(hub.ROOT), *words], capture_output=True, text=True)
    head = git("rev-parse", "--short=12", "HEAD")
    changed = git("diff", "--quiet", "HEAD", "--", "*.py").returncode
    return None if head.returncode else head.stdout.strip() + "+" * bool(changed)
