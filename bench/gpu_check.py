"""A project's first hour on a GPU, as one command: is everything right there, how fast, where does time go?

    python -m bench.gpu_check --list                    parts and their time limits, in order of value
    python -m bench.gpu_check --budget 470              all of them, as far as 470 seconds go
    python -m bench.gpu_check --parts grads bench       some of them
    python -m bench.gpu_check --cpu-smoke               each on tiny shapes without a GPU: does the check run?

Every part is a process of its own with a time limit: one that hangs, is killed or trips a device-side
assertion costs the others nothing. What it finds is printed as JSON lines: `ok` false is a failure, `key` the
figure that the summary at the end repeats. They are kept in DIR/results.jsonl, all else that a part says in
DIR/log.txt; DIR is --out, else $OUT, else a new temporary folder. Needs what requirements.txt names (torch
2.11 does) and transformers for the part `gen`; no network. The exit code is 1 if anything failed.

bench/gpu_math.py holds the parts that compute for themselves, bench/gpu_runs.py those that run the project's
own commands and read what these print.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHORTEST = 8            # seconds; with less left a part is not begun
SMOKE_LIMIT = 150       # seconds of a part on tiny shapes, on a machine that does other work too
POLL = 0.1              # seconds between two looks at the running parts
NOTE_LINES = 6          # of a failed part's log that its result repeats


@dataclass(frozen=True)
class Part:
    seconds: int        # that it may take on a GPU
    module: str         # of bench/, whose function has the part's name
    what: str           # the question it answers


PARTS = {
    "env": Part(40, "gpu_math", "versions, copies, matrix products: the ceilings for all that follows"),
    "grads": Part(170, "gpu_math", "compiled blocks and FlexAttention against float64; bits; recomputing"),
    "kernels": Part(75, "gpu_math", "token_logp against float64: odd shapes, over 2^31 logits; bits"),
    "bench": Part(110, "gpu_runs", "kernels.bench: time over its matrix products alone, by size of a chunk"),
    "step1b": Part(120, "gpu_runs", "a step of Llama-3.2-1B's shape: share of the matrix rate, memory"),
    "step8b": Part(110, "gpu_runs", "a step of Llama-3-8B's shape: the same"),
    "demo": Part(160, "gpu_runs", "clo.py from end to end; killed and resumed it gives the same bytes"),
    "attention": Part(80, "gpu_math", "FlexAttention's time with its own number of warps, and with others"),
    "gen": Part(100, "gpu_runs", "generation and translation beside transformers"),
    "pytest": Part(90, "gpu_runs", "tests/test_kernels.py on the GPU"),
    "shard": Part(90, "gpu_runs", "clo.py --shard with one process: NCCL and FSDP2"),
    "trl": Part(150, "gpu_runs", "a step of the 1B shape beside TRL's, where TRL is installed"),
}


# -------------------------------------------------------------------------------------- said by a part

def say(name: str, ok=None, key=None, **more) -> None:
    """Print one result. ok: False is a failure; key: what the summary shows; note: why, if it failed."""
    found = {"name": name} | ({} if ok is None else {"ok": bool(ok)}) | ({} if key is None else {"key": key})
    print(json.dumps(found | more, default=str), flush=True)


def run_part(functions: dict, argv=None) -> None:
    """The main of a module of parts: NAME DIR [--cpu-smoke] calls functions[NAME](smoke, DIR)."""
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=list(functions))
    parser.add_argument("out", type=Path)
    parser.add_argument("--cpu-smoke", action="store_true")
    args = parser.parse_args(argv)
    functions[args.part](args.cpu_smoke, args.out)


def result_of(line: str) -> dict | None:
    """What `say` printed; None for any other line, and for one that a kill cut short."""
    if not line.startswith('{"name": '):
        return None
    with contextlib.suppress(json.JSONDecodeError):
        return json.loads(line)


# ------------------------------------------------------------------------------------------- conductor

def command_of(name: str, args) -> list[str]:
    module = f"bench.{PARTS[name].module}"
    return [sys.executable, "-u", "-m", module, name, str(args.out)] + ["--cpu-smoke"] * args.cpu_smoke


def environment(folder: Path, smoke: bool) -> dict[str, str]:
    """Of a part: its temporary files go with its folder; what it compiles serves the next part too."""
    variables = {
        "TMPDIR": str(folder),
        "TORCHINDUCTOR_CACHE_DIR": str(folder.parent / "inductor"),
        "TRITON_CACHE_DIR": str(folder.parent / "triton"),
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",       # as clo.py asks for
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false"}
    if smoke:
        variables |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return os.environ | variables


class Running:
    """A part under way: its process (which leads a group of its own), log and deadline."""

    def __init__(self, name: str, seconds: float, scratch: Path, args):
        folder = scratch / name
        folder.mkdir()
        self.name, self.log = name, folder / "log.txt"
        self.began, self.seconds = time.perf_counter(), seconds
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                command_of(name, args), stdout=log, stderr=subprocess.STDOUT, cwd=ROOT,
                env=environment(folder, args.cpu_smoke), start_new_session=True)

    def ended(self) -> bool:
        late = time.perf_counter() - self.began > self.seconds
        return late or self.process.poll() is not None

    def stop(self) -> int | None:
        """Its exit code; None if it was still running. Whatever it started and left behind is ended too."""
        code = self.process.poll()
        if code != 0:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        return code

    def results(self, code: int | None) -> list[dict]:
        """What it said, and how it ended."""
        lines = self.log.read_text(errors="replace").splitlines()
        found = [result for line in lines if (result := result_of(line))]
        end = {"name": "END", "ok": code == 0, "code": "time limit" if code is None else code,
               "seconds": round(time.perf_counter() - self.began, 1)}
        if code != 0:
            end["note"] = " | ".join(line.strip()[:200] for line in lines[-NOTE_LINES:])
        return [{"part": self.name} | result for result in [*found, end]]


def conduct(args, jobs: int) -> list[dict]:
    """All results of the parts, in order, `jobs` at a time. With little time left a part is skipped."""
    began = time.perf_counter()
    waiting, running, results = list(dict.fromkeys(args.parts)), [], []
    limits = {name: SMOKE_LIMIT if args.cpu_smoke else PARTS[name].seconds for name in waiting}
    with tempfile.TemporaryDirectory(prefix="gpu_check-", ignore_cleanup_errors=True) as scratch:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    name = waiting.pop(0)
                    left = args.budget - (time.perf_counter() - began)
                    if left < SHORTEST:
                        skipped = {"part": name, "name": "SKIPPED", "note": f"{left:.0f} s left"}
                        results += keep([skipped], args.out)
                        continue
                    running.append(Running(name, min(limits[name], left), Path(scratch), args))
                time.sleep(POLL)
                for part in [part for part in running if part.ended()]:
                    running.remove(part)
                    results += keep(part.results(part.stop()), args.out)
                    with open(args.out / "log.txt", "a") as log:
                        log.write(f"\n== {part.name}\n{part.log.read_text(errors='replace')}")
        finally:
            for part in running:
                part.stop()
    return results


def keep(results: list[dict], out: Path) -> list[dict]:
    """Print results and append them to results.jsonl."""
    with open(out / "results.jsonl", "a") as file:
        for result in results:
            print(json.dumps(result), flush=True)
            file.write(json.dumps(result) + "\n")
    return results


def summary(results: list[dict]) -> str:
    failed = [result for result in results if result.get("ok") is False]
    lines = [f"\n{len(results)} results, {len(failed)} failed"]
    lines += [f"FAILED  {found['part']}: {found['name']}: {found.get('note') or found.get('key', '')}"
              for found in failed]
    lines += [f"{found['part']:9} {found['name']:40} {found['key']}" for found in results if "key" in found]
    return "\n".join(lines)


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="say what the parts are, and run none")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART",
                        help=f"some of {', '.join(PARTS)} (default: all, in this order)")
    parser.add_argument("--budget", type=float, default=470, metavar="SECONDS",
                        help="for everything (default: %(default)g)")
    parser.add_argument("--cpu-smoke", action="store_true", help="tiny shapes on the CPU, two at a time")
    parser.add_argument("--out", type=Path, metavar="DIR",
                        help="folder for results.jsonl, log.txt and the files of the parts (default: $OUT, "
                             "else a new temporary one)")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse_args(argv)
    if args.list:
        for name, part in PARTS.items():
            print(f"{name:10}{part.seconds:4} s  {part.what}")
        return 0
    args.out = (args.out or Path(os.environ.get("OUT") or tempfile.mkdtemp(prefix="gpu_check-"))).resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in ("results.jsonl", "log.txt"):
        (args.out / name).unlink(missing_ok=True)
    began = time.perf_counter()
    results = conduct(args, jobs=2 if args.cpu_smoke else 1)
    print(summary(results))
    print(f"{time.perf_counter() - began:.0f} s; {args.out}/results.jsonl, log.txt")
    return 1 if any(result.get("ok") is False for result in results) else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))    # the running parts end too
    sys.exit(main())
