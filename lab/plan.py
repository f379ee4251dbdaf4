"""A plan is a small JSON table of runs of clo.py; here it becomes the list of those that can begin.

    {"purpose": "...",
     "settings": {"model": "demo/llama", "data": ..., "eval-data": ..., "dtype": "fp32", "max-new-tokens": 64},
     "methods": {"sft": {"method": "sft", "lr": [1e-3, 3e-3]},
                 "clo": {"method": "clo"},
                 "sft, clo's compute": {"method": "sft", "lr": 1e-3, "tokens-of": "clo", "passes-of": "sft"}},
     "grid": {"size": 200, "seed": 0},
     "runs": [{"languages": ["sw"], "sizes": [50, 200, null], "seeds": [0, 1, 2], "methods": ["sft", "clo"]}]}

Settings are flags of clo.py without their dashes; size null is all rows. A list is a grid: its values are
tried at the grid's size and seed, and the one whose expected target answers cost the fewest bits per byte on the
validation split is taken for the test split, at every size and seed. Equal compute:

    epochs = epochs of passes-of * tokens of tokens-of / tokens of passes-of                                (eq. 1)

with the tokens that both sent through the model on the same rows, a preference's reference pass included. The
base model is scored without being asked for.
"""

import itertools
import re
from dataclasses import dataclass
from pathlib import Path

from engine.files import InputError, as_kind, fingerprint, need, read_json

BASE = "base"
NEEDED = ("model", "data", "eval-data", "dtype", "max-new-tokens")
OURS = ("tokens-of", "passes-of")           # settings that are no flags
PLANS = Path(__file__).parent / "plans"
ALL_ROWS = 10 ** 9                          # what "all rows" are taken for when costs are compared
PASSES = {"sft-en": 1, "sft-tgt": 1, "sft": 2, "dpo": 5, "clo": 5, "sft+dpo": 7}     # through a row, roughly
PARTS = ("languages", "sizes", "seeds", "methods")


@dataclass(frozen=True)
class Run:
    """One model to train and score, or the base model to score."""
    language: str               # target, or several: sw,yo
    method: str                 # what tables call it
    size: int | None            # training rows
    seed: int
    split: str                  # "test", or "validation" for a point of a grid
    flags: dict                 # of clo.py

    @property
    def name(self) -> str:
        """Of its directory and its line; other flags make another name."""
        size = self.size or "all"
        parts = [self.language, self.method, size, f"s{self.seed}", self.split, fingerprint(self.flags)[:6]]
        return re.sub(r"[^\w.]+", "-", "-".join(map(str, parts)))

    @property
    def cost(self) -> tuple:
        """What is run first: few rows, then one seed of all methods before the next, in it few passes."""
        return self.size or ALL_ROWS, self.seed, PASSES.get(self.flags.get("method"), 0)


def read_plan(name: str) -> dict:
    """The plan in a file, or of that name in lab/plans/; its "name" is the file's. InputError says what it
    lacks."""
    path = Path(name)
    if not path.suffix:
        path = PLANS / f"{name}.json"
    plan = read_json(path)
    settings = as_kind(need(plan, "settings", path), dict, f"{path}: settings")
    for key in NEEDED:
        need(settings, key, f"{path}: settings")
    methods = as_kind(need(plan, "methods", path), dict, f"{path}: methods")
    for number, part in enumerate(as_kind(need(plan, "runs", path), list, f"{path}: runs"), 1):
        for key in PARTS:
            as_kind(need(part, key, f"{path}: runs, part {number}"), list, f"{path}: {key}")
        check_methods(part["methods"], methods, path)
    for method, own in methods.items():
        need(own, "method", f"{path}: methods, {method}")
        check_methods([own[key] for key in OURS if key in own], methods, path)
        if grid_axes(settings | own):
            need(plan, "grid", f"{path}: {method} has a list to choose from")
    return plan | {"name": path.stem}


def check_methods(names: list[str], methods: dict, path: Path) -> None:
    for name in names:
        if name not in methods:
            raise InputError(f"{path}: no method is called {name!r}; methods has {', '.join(methods)}")


def grid_axes(settings: dict) -> dict[str, list]:
    return {flag: value for flag, value in settings.items() if isinstance(value, list)}


def ready(plan: dict, lines: list[dict], failed=()) -> list[Run]:
    """The runs that are not done and can begin, cheapest first. lines: what is done. failed: names of runs to
    leave out; a grid is decided without them."""
    done = {line["run"] for line in lines}
    found = {}
    for part in plan["runs"]:
        for language in part["languages"]:
            base = base_run(plan, language)
            found[base.name] = base
        for cell in itertools.product(*(part[key] for key in PARTS)):
            for run in runs_of(plan, cell, lines, done | set(failed)):
                found[run.name] = run
    missing = [run for name, run in found.items() if name not in done and name not in failed]
    return sorted(missing, key=lambda run: (run.method != BASE, run.cost))


def base_run(plan: dict, language: str) -> Run:
    """The untrained model, which is scored once for all."""
    wanted = (*NEEDED, "translator", "source", "system-prompt", "template-args", "device")
    flags = {flag: value for flag, value in plan["settings"].items() if flag in wanted}
    return Run(language, BASE, None, 0, "test", flags | {"lang": language, "eval-split": "test"})


def runs_of(plan: dict, cell: tuple, lines: list[dict], tried: set[str]) -> list[Run]:
    """The run of a (language, size, seed, method); the points of its grid while one of them was not tried;
    nothing while it waits for another run's tokens."""
    language, size, seed, method = cell
    axes, chosen = grid_axes(plan["settings"] | plan["methods"][method]), {}
    if axes:
        points = [dict(zip(axes, values)) for values in itertools.product(*axes.values())]
        place = language, plan["grid"]["size"], plan["grid"]["seed"], method
        runs = [make_run(plan, place, "validation", point, lines) for point in points]
        open_ones = [run for run in runs if run is not None and run.name not in tried]
        bits = {line["run"]: target_bits(line) for line in lines}
        known = [(bits[run.name], i) for i, run in enumerate(runs) if run is not None and run.name in bits]
        if open_ones or not known:
            return open_ones
        chosen = points[min(known)[1]]
    run = make_run(plan, cell, "test", chosen, lines)
    return [] if run is None else [run]


def make_run(plan: dict, cell: tuple, split: str, chosen: dict, lines: list[dict]) -> Run | None:
    """None while the epochs of equal compute (eq. 1) are not known."""
    language, size, seed, method = cell
    settings = plan["settings"] | plan["methods"][method] | chosen
    if "tokens-of" in settings:
        spent, own = (line_of(lines, language, size, seed, settings[key]) for key in OURS)
        if spent is None or own is None:
            return None
        settings["epochs"] = round(own["epochs"] * spent["tokens"] / own["tokens"], 3)               # eq. 1
    flags = {flag: value for flag, value in settings.items() if flag not in OURS}
    flags |= {"lang": language, "seed": seed, "eval-split": split}
    flags |= {"samples": size} if size else {}
    return Run(language, method, size, seed, split, flags)


def line_of(lines: list[dict], language: str, size: int | None, seed: int, method: str) -> dict | None:
    """The latest line of this place, on whichever split: the tokens are the same."""
    wanted = language, size, seed, method
    found = [line for line in lines
             if (line["language"], line["size"], line["seed"], line["method"]) == wanted]
    return found[-1] if found else None


def target_bits(line: dict) -> float:
    """Bits per byte of the expected answers in the target languages."""
    columns = [line["questions"][language] for language in line["language"].split(",")]
    bits, size = (sum(sum(column[key]) for column in columns) for key in ("bits", "bytes"))
    return bits / size
