"""Compare settings of clo.py on the validation split, over languages and seeds: how the defaults were chosen.

    python -m bench.defaults --lang sw,de --seeds 3 method=clo,sft beta=0.1,0.5 lr=1e-3,3e-3 epochs=1,2

Every combination of the given values is trained for every language and seed; flags that are not given keep
their default. The translation is made once per language. Settings are rows of the printed table; figures are
means over languages and seeds of exact answers on the validation questions, with the standard error over
those runs. A finished run is not repeated.
"""

import argparse
import contextlib
import io
import itertools
import json
import math
from pathlib import Path

from tqdm import tqdm

import clo
import eval as evaluation
import translate
from engine.files import run
from engine.progress import progress
from formats.records import read_rows, write_rows

FIGURES = ("en correct", "en in en", "tgt correct", "tgt in tgt", "nll_en", "nll_tgt", "train s")


def translated(lang: str, args) -> Path:
    """The demo's training rows with their translation, made once."""
    path = args.out / f"rows-{lang}.jsonl"
    if not path.exists():
        drafts = args.out / f"drafts-{lang}.jsonl"
        rows = translate.translate_rows(read_rows(args.data), translate.load(args.translator),
                                        "en", lang, drafts)
        write_rows(path, rows)
    return path


def figures(lang: str, method: str, flags: list[str], out: Path, rows: Path, eval_data: str) -> list[float]:
    """One run of clo.py, quietly; its figures on the validation split."""
    if not (out / "report.json").exists():
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            clo.main(["--lang", lang, "--data", str(rows), "--eval-data", eval_data,
                      "--eval-split", "validation", "--out", str(out), "--baseline", "none",
                      "--method", method, *flags])
    scores = json.loads((out / "report.json").read_text())["methods"][method]
    return [scores["en"]["correct"], scores["en"]["right_language"],
            scores[lang]["correct"], scores[lang]["right_language"],
            scores["heldout"]["nll_en"], scores["heldout"]["nll_tgt"], scores["train_seconds"]]


def mean_and_error(values: list[float]) -> str:
    mean = sum(values) / len(values)
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1) / len(values))
    return f"{mean:.2f} ± {error:.2f}"


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("settings", nargs="+", metavar="FLAG=VALUE[,VALUE...]",
                        help="flags of clo.py without their dashes")
    parser.add_argument("--lang", default="sw", help="target languages, joined by commas")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each setting, seeds 0, 1, ...")
    parser.add_argument("--out", type=Path, default=Path("runs/defaults"), help="directory for rows and runs")
    parser.add_argument("--data", default="demo/english.jsonl", help="English training rows")
    parser.add_argument("--eval-data", default="demo/eval.jsonl", help="rows with a validation split")
    parser.add_argument("--translator", default="demo/m2m100", help="M2M100 directory")
    parser.add_argument("--model", default="demo/llama", help="base model directory")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse_args(argv)
    axes = [[(flag, value) for value in values.split(",")]
            for flag, values in (s.split("=", 1) for s in args.settings)]
    grid = [dict(point) for point in itertools.product(*axes)]
    lines = []
    for point in progress(grid, unit="setting"):
        found = []
        for lang, seed in itertools.product(args.lang.split(","), range(args.seeds)):
            method = point.get("method", "clo")
            flags = [f"--{key}={value}" for key, value in point.items() if key != "method"] + [
                f"--seed={seed}", f"--model={args.model}"]
            name = "-".join([lang, f"s{seed}", *(f"{key}{value}" for key, value in point.items())])
            found.append(figures(lang, method, flags, args.out / name, translated(lang, args),
                                 args.eval_data))
        lines.append([" ".join(f"{key}={value}" for key, value in point.items())]
                     + [mean_and_error(list(c)) for c in zip(*found)])
        tqdm.write(evaluation.table(["", *FIGURES], lines[-1:]).splitlines()[-1])
    print(f"\nvalidation split, languages {args.lang}, {args.seeds} seeds, mean ± standard error over runs\n")
    print(evaluation.table(["", *FIGURES], lines))


if __name__ == "__main__":
    run(main)
