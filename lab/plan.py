"""A plan is a small JSON table of runs of clo.py; here it becomes the list of those that can begin.

    {"purpose": "...",
     "settings": {"model": ..., "data": ..., "eval-data": ..., "dtype": "fp32", "max-new-tokens": 64},
     "methods": {"sft": {"method": "sft", "lr": [1e-3, 3e-3]},
                 "clo": {"method": "clo"},
                 "sft, clo's compute": {"method": "sft", "tokens-of": "clo", "passes-of": "sft"}},
     "grid": {"size": 200, "seed": 0},
     "runs": [{"languages": ["sw"], "sizes": [50, null], "seeds": [0, 1, 2], "methods": ["sft", "clo"]}]}

Settings are flags of clo.py without their dashes; size null is all rows. A list is a grid: its values are
tried at the grid's size and seed, and the one with which the expected target answers cost the fewest bits per
byte on the validation split is used for the test split, at every size and seed. Equal compute:

    epochs = epochs of passes-of * tokens of tokens-of / tokens of passes-of                           (eq. 1)

with the tokens that both sent through the model on the same rows, a preference's reference pass included. The
base model is scored without being asked for, where there is a grid on the validation split too.
"""

import itertools
import re
from dataclasses import dataclass
from pathlib import Path

from engine.files import fingerprint, need, read_json

BASE = "base"
NEEDED = ("model", "data", "eval-data", "dtype", "max-new-tokens")
BASE_FLAGS = (*NEEDED, "translator", "source", "device")            # what its figures depend on
OURS = ("tokens-of", "passes-of")                                   # settings that are no flags
PARTS = ("languages", "sizes", "seeds", "methods")
PLANS = Path(__file__).parent / "plans"
ALL_ROWS = 10 ** 9                          # what "all rows" are taken for when costs are compared
PASSES = {"sft-en": 1, "sft-tgt": 1, "sft": 2, "dpo": 5, "clo": 5, "sft+dpo": 7}     # through a row, roughly


@dataclass(frozen=True)
class Run:
    """One model to train and score, or the base model to score."""
    language: str               # target, or several: sw,yo
    size: int | None            # training rows
    seed: int
    method: str                 # what tables call it
    split: str                  # "test", or "validation" for a point of a grid
    flags: dict                 # of clo.py

    @property
    def name(self) -> str:
        """Of its line and its replies; other flags make another name."""
        return self.named(self.split, self.flags)

    @property
    def training(self) -> dict:
        """The flags that it trains by: a point of a grid and the run on the test split for which it is chosen
        are one training."""
        return {flag: value for flag, value in self.flags.items() if flag != "eval-split"}

    @property
    def directory(self) -> str:
        """Of its training."""
        return self.named("trained", self.training)

    def named(self, what: str, flags: dict) -> str:
        parts = self.language, self.method, self.size or "all", f"s{self.seed}", what, fingerprint(flags)[:6]
        return re.sub(r"[^\w.]+", "-", "-".join(map(str, parts)))

    @property
    def cost(self) -> tuple:
        """The base first, then the grids, which others wait for, then few rows, then one seed of all methods
        before the next, in it few passes."""
        passes = PASSES.get(self.flags.get("method"), 0)
        return self.method != BASE, self.split == "test", self.size or ALL_ROWS, self.seed, passes


def read_plan(name: str) -> dict:
    """The plan in a file, or of that name in lab/plans/; its "name" is the file's. InputError says what it
    lacks."""
    path = Path(name) if Path(name).suffix else PLANS / f"{name}.json"
    plan = read_json(path)
    settings, methods = need(plan, "settings", path), need(plan, "methods", path)
    for key in NEEDED:
        need(settings, key, f"{path}: settings")
    for part in need(plan, "runs", path):
        for key in PARTS:
            need(part, key, f"{path}: runs")
        for method in part["methods"]:
            need(methods, method, f"{path}: methods")
    for method, own in methods.items():
        need(own, "method", f"{path}: {method}")
        for key in OURS:
            need(methods, own.get(key, method), f"{path}: {method}, {key}")
        if grid_axes(settings | own):
            need(plan, "grid", f"{path}: {method} has a list to choose from")
    return plan | {"name": path.stem}


def grid_axes(settings: dict) -> dict[str, list]:
    return {flag: value for flag, value in settings.items() if isinstance(value, list)}


def ready(plan: dict, lines: list[dict], failed=()) -> list[Run]:
    """The runs that are not done and can begin, in the order of Run.cost. lines: what is done. failed: names of
    runs to leave out; a grid is decided without them."""
    tried = {line["run"] for line in lines} | set(failed)
    found = {}
    for part in plan["runs"]:
        splits = ("test", "validation") if "grid" in plan else ("test",)
        wanted = [base_run(plan, *place) for place in itertools.product(part["languages"], splits)]
        for place in itertools.product(*(part[key] for key in PARTS)):
            wanted += runs_of(plan, place, lines, tried)
        found |= {run.name: run for run in wanted if run.name not in tried}
    return sorted(found.values(), key=lambda run: run.cost)


def base_run(plan: dict, language: str, split: str) -> Run:
    """The untrained model, which is scored once for all."""
    flags = {flag: value for flag, value in plan["settings"].items() if flag in BASE_FLAGS}
    return Run(language, None, 0, BASE, split, flags | {"lang": language, "eval-split": split})


def runs_of(plan: dict, place: tuple, lines: list[dict], tried: set[str]) -> list[Run]:
    """The run at a place (language, size, seed, method); the points of its grid while one of them was not
    tried; nothing while it waits for another run's tokens."""
    language, _, _, method = place
    axes = grid_axes(plan["settings"] | plan["methods"][method])
    if not axes:
        return make_runs(plan, place, "test", [{}], lines)
    there = language, plan["grid"]["size"], plan["grid"]["seed"], method
    values = [dict(zip(axes, point)) for point in itertools.product(*axes.values())]
    points = make_runs(plan, there, "validation", values, lines)
    missing = [run for run in points if run.name not in tried]
    if missing:
        return missing
    bits = {line["run"]: target_bits(line) for line in lines}
    known = [run for run in points if run.name in bits]
    if not known:
        return []
    best = min(known, key=lambda run: bits[run.name])
    return make_runs(plan, place, "test", [{flag: best.flags[flag] for flag in axes}], lines)


def make_runs(plan: dict, place: tuple, split: str, values: list[dict], lines: list[dict]) -> list[Run]:
    """A run for each of the values of a grid; none while the epochs of eq. 1 are not known."""
    language, size, seed, method = place
    settings = plan["settings"] | plan["methods"][method]
    if "tokens-of" in settings:
        spent, own = (line_of(lines, (language, size, seed, settings.pop(key))) for key in OURS)
        if spent is None or own is None:
            return []
        settings["epochs"] = round(own["epochs"] * spent["tokens"] / own["tokens"], 3)           # eq. 1
    settings |= {"lang": language, "seed": seed, "eval-split": split}
    settings |= {"samples": size} if size else {}
    return [Run(*place, split, settings | value) for value in values]


def line_of(lines: list[dict], place: tuple) -> dict | None:
    """The latest line of this place, on whichever split: the tokens are the same."""
    found = [line for line in lines
             if (line["language"], line["size"], line["seed"], line["method"]) == place]
    return found[-1] if found else None


def target_bits(line: dict) -> float:
    """Bits per byte of the expected answers in the target languages."""
    columns = [line["questions"][language] for language in line["language"].split(",")]
    bits, size = (sum(sum(column[key]) for column in columns) for key in ("bits", "bytes"))
    return bits / size
