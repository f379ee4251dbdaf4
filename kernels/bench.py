"""Speed, memory and error of the head's ops, beside plain PyTorch and the peers installed: `python -m
kernels.bench`.

The yardstick is not another program but the matrix products that any exact algorithm has to do: one of 2NHV
FLOPs for the log-probs, one more for the gradient of the hidden states, one more for the gradient of the
head. They run alone, whole, into memory taken beforehand, in turn with the contenders in the same rounds, and
`x floor` is the median of the round-by-round ratios: whatever else the machine does hits both alike. 1.00 is
the limit.

    python -m kernels.bench                                       on a GPU: the shapes of five models in bf16
    python -m kernels.bench --shapes llama-3-8b 4096x2048x50000 --modes frozen --json FILE --plot FILE

Before anything is timed, errors are checked against float64; ours must stay within 1.5 times that of plain
PyTorch in the same dtype, else the exit code is 1. `error` is the worst such ratio of log-probs and
gradients. `peak MB` is measured, not derived: what one call takes beyond its inputs. A name with "mean"
returns only the mean; it solves an easier problem. A peer that refuses a shape is named and left out.
"""

import argparse
import json
import statistics
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch

from . import measure

SHAPES = {"llama-3.2-1b": (8192, 2048, 128256), "llama-3-8b": (8192, 4096, 128256),
          "llama-2-7b": (8192, 4096, 32000), "mistral-7b": (8192, 4096, 32768),
          "qwen2.5-3b": (8192, 2048, 151936)}
CPU_SHAPE, CPU_CONTENDERS = (512, 512, 32000), ("ours", "ours, mean", "eager")  # the peers are slow there
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ERROR_ROWS = 64
ERROR_LIMIT = 1.5
COLUMNS = {"ms": 2, "TFLOP/s": 2, "x floor": 2, "x eager": 2, "peak MB": 0, "error": 2}  # and their decimals


def interleave(functions, rounds, device, clock, show):
    """{name: [ms, ...]}: every function once a round, after one call to warm up."""
    times = {name: [] for name in functions}
    for i in range(rounds + 1):
        for name, function in functions.items():
            show(f"round {i} of {rounds}, {name}")
            ms = measure.time_ms(function, device, clock)
            if i > 0:
                times[name].append(ms)
    return times


def bench(contenders, shape, mode, dtype, device, rounds, clock, show, budgets=()):
    """[{name, ms, ...}] for one shape and mode, the floor first, of {name: function}."""
    N, H, V = shape
    data = measure.example(shape, dtype, device, mode)
    show("errors")
    ratios, refused = measure.error_ratios(contenders, data, ERROR_ROWS)
    for name, why in refused.items():
        print(f"{name} does not run {N}x{H}x{V} {mode}: {why}")
    calls = {name: lambda f=contenders[name]: measure.run(f, *data) for name in ratios}
    floor = measure.floor(shape, dtype, device, mode)
    times = interleave({"floor": floor} | calls, rounds, device, clock, show)
    rows = []
    for name, values in times.items():
        ms = statistics.median(values)
        row = {"shape": f"{N}x{H}x{V}", "mode": mode, "name": name, "ms": ms,
               "TFLOP/s": measure.MODES[mode] * 2 * N * H * V / ms / 1e9,
               "x floor": statistics.median(a / b for a, b in zip(values, times["floor"])),
               "x eager": statistics.median(a / b for a, b in zip(values, times["eager"]))}
        if name in ratios:
            show(f"memory, {name}")
            peak = measure.peak_bytes(name, shape, dtype, device, mode, budgets)
            row |= {"peak MB": peak / 1e6, "error": ratios[name]}
        rows.append(row)
    return rows


def show_progress(text):
    """One line that overwrites itself, only where somebody watches."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def print_rows(rows):
    show_progress("")
    print(f"{rows[0]['shape']} {rows[0]['mode']:12}" + "".join(f"{column:>10}" for column in COLUMNS))
    for row in rows:
        cells = [f"{row[name]:10.{digits}f}" if name in row else " " * 10 for name, digits in COLUMNS.items()]
        print(f"  {row['name']:24}" + "".join(cells), flush=True)


def plot(rows, path):
    """Bars of `x floor` for each shape and mode."""
    from matplotlib.figure import Figure
    groups = {}
    for row in rows:
        groups.setdefault((row["shape"], row["mode"]), []).append(row)
    figure = Figure(figsize=(8, 0.3 * len(rows) + 1.1 * len(groups)), layout="constrained")  # inches
    for axes, (title, group) in zip(figure.subplots(len(groups), squeeze=False)[:, 0], groups.items()):
        bars = axes.barh([row["name"] for row in group], [row["x floor"] for row in group])
        axes.bar_label(bars, fmt="%.2f", padding=3)
        axes.margins(x=0.1)
        axes.axvline(1.0, color="black", linewidth=1)
        axes.set(title=" ".join(title), xlabel="time / matrix products alone")
        axes.invert_yaxis()
    figure.savefig(path)


def shape_of(text):
    """(N, H, V) of a model's name or of "NxHxV"."""
    numbers = SHAPES.get(text) or tuple(int(part) for part in text.split("x") if part.isdigit())
    if len(numbers) != 3 or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither NxHxV nor one of {', '.join(SHAPES)}")
    return numbers


def choose(names, device, budgets=()):
    """The contenders of these names; eager is always among them."""
    found = measure.contenders(device, budgets)
    if not names:
        names = CPU_CONTENDERS if device.type == "cpu" else found
    missing = set(names) - set(found)
    if missing:
        print(f"error: no {', '.join(sorted(missing))} here; there is {', '.join(found)}", file=sys.stderr)
        raise SystemExit(2)
    return {name: function for name, function in found.items() if name in names or name == "eager"}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", type=shape_of, metavar="SHAPE",
                        help=f"NxHxV or {', '.join(SHAPES)} (default: all of these; on a CPU a small one)")
    parser.add_argument("--modes", nargs="+", choices=measure.MODES, default=list(measure.MODES),
                        help="differentiate nothing, the hidden states, the head too (default: all three)")
    parser.add_argument("--dtype", choices=DTYPES, help="of hidden and weight (default: bf16; fp32 on a CPU)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--only", nargs="+", metavar="NAME",
                        help="contenders to run beside eager (default: all; on a CPU ours)")
    parser.add_argument("--chunk-bytes", nargs="+", type=int, default=[], metavar="BYTES",
                        help="run ours with these bounds of its logits too, as contenders \"ours, N MB\"")
    parser.add_argument("--rounds", type=int, default=7, help="timed calls of each (default: %(default)s)")
    parser.add_argument("--cpu-time", action="store_true",
                        help="on a CPU count the time it worked for us, not the time that passed: for a "
                             "machine that others use too, with OMP_NUM_THREADS=1")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them (needs matplotlib)")
    args = parser.parse_args(argv)
    if args.plot and not find_spec("matplotlib"):
        parser.error("--plot needs matplotlib: pip install matplotlib")
    return args


def main(argv=None):
    args = parse_args(argv)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    gpu = device.type == "cuda"
    dtype = args.dtype or ("bf16" if gpu else "fp32")
    where = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    versions = measure.versions()
    print(f"{where}, {dtype}, medians of {args.rounds} rounds; "
          + ", ".join(f"{package} {version}" for package, version in versions.items()))
    contenders, rows = choose(args.only, device, args.chunk_bytes), []
    clock = time.process_time if args.cpu_time else time.perf_counter
    for shape in args.shapes or (SHAPES.values() if gpu else [CPU_SHAPE]):
        for mode in args.modes:
            new = bench(contenders, shape, mode, DTYPES[dtype], device, args.rounds, clock, show_progress,
                        args.chunk_bytes)
            print_rows(new)
            rows += new
    if args.json:
        report = {"where": where, "versions": versions, "dtype": dtype, "rows": rows}
        args.json.write_text(json.dumps(report, indent=1))
    if args.plot:
        plot(rows, args.plot)
    wrong = [row for row in rows if row["name"].startswith("ours") and row["error"] > ERROR_LIMIT]
    for row in wrong:
        print(f"error: {row['name']} {row['shape']} {row['mode']}: {row['error']:.2f} times the error of "
              f"plain PyTorch, more than {ERROR_LIMIT}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
