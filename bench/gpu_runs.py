"""The parts of bench.gpu_check that run the project's own commands and read what these print. They need no
torch themselves, and so begin at once."""

import json
import os
import re
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from bench.gpu_check import run_part, say

BF16 = "--device cuda --dtype bf16".split()
TINY = "--width 64 --mlp 96 --layers 2 --head-dim 16 --vocab 500 --threads 1".split()
TINY_STEP = [*TINY, *"--samples 4 --batch-size 4 --prompt 8 --response 20 --trl-batch 2".split()]
LARGEST_TRACE = 15e6        # bytes; a larger one is not kept
CLOCKS = ("seconds", "tokens_per_second", "peak_memory_gb")     # what no two runs have the same


def scratch() -> Path:
    """A folder of the part's own, which goes when everything has ended."""
    return Path(os.environ["TMPDIR"])


def run(name: str, command: list[str], **environment: str) -> str | None:
    """What a command printed, which goes to the log too; None if it failed, which is a result."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-u", *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, errors="replace", env=os.environ | environment)
    seconds = round(time.perf_counter() - began, 1)
    print(done.stdout)
    if done.returncode:
        note = " | ".join(done.stdout.strip().splitlines()[-4:])
        say(name, ok=False, code=done.returncode, note=note[-500:])
        return None
    say(name, ok=True, seconds=seconds, command=" ".join(command))
    return done.stdout


def run_and_tell(name: str, command: list[str], *starts: str) -> None:
    """Run a command; every line it prints that starts like one of these is a figure."""
    text = run(name, command) or ""
    for line in text.splitlines():
        if line.startswith(starts):
            say(name, key=line.strip())


# ------------------------------------------------------------------------------------------------------ speed

def bench(smoke: bool, out: Path) -> None:
    """The op's time in units of its matrix products, which run between it; the aim is 1.10."""
    file = out / "kernels.json"
    flags = "--shapes llama-3-8b llama-3.2-1b --modes frozen forward --rounds 9"
    if smoke:
        flags = "--shapes 64x32x500 --modes frozen --rounds 1 --device cpu --dtype fp32 --only ours"
    budgets = ["--chunk-bytes", "300000000", "600000000", "2400000000"]
    text = run("kernels.bench", ["-m", "kernels.bench", *flags.split(), *budgets, "--json", str(file)])
    if text is None:
        return
    for row in json.loads(file.read_text())["rows"]:
        peak = f", peak {row['peak MB']:.0f} MB" if "peak MB" in row else ""
        say(f"{row['shape']} {row['mode']} {row['name']}",
            key=f"{row['ms']:.2f} ms, {row['x floor']:.3f} x its products{peak}")


def figures(text: str, side: str) -> dict[str, float]:
    """The numbers that bench.step printed of a side, by name."""
    line = next(line for line in text.splitlines() if line.startswith(f"{side:9}"))
    return {name: float(value) for name, value in re.findall(r"(\w+) ([-+.\w]+)(?=[,:] )", line)}


def measured_rate(out: Path) -> float | None:
    """TFLOP/s of matrix products that the part `env` found, if it ran."""
    file = out / "results.jsonl"
    found = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return next((result["tflops"] for result in found if result["name"] == "products"), None)


def step(name: str, flags: list[str], out: Path, trace: Path) -> None:
    """bench.step, ours beside its products: share of the matrix rate, memory, time by kind of kernel."""
    command = ["-m", "bench.step", "--sides", "ours", "products", "--init-on-device", *flags]
    text = run(name, [*command, "--profile", str(trace)])
    if trace.exists() and trace.stat().st_size > LARGEST_TRACE:
        trace.unlink()
    if text is None:
        return
    ours, products, rate = figures(text, "ours"), figures(text, "products"), measured_rate(out)
    own = products["seconds"] / ours["seconds"]
    share = f" = {ours['tflops'] / rate:.1%} of the rate of matrix products (aim 55 %)" if rate else ""
    say(f"{name}: speed", key=f"{ours['tflops']:.3g} TFLOP/s{share}, {own:.1%} of its own products' rate")
    say(f"{name}: memory", key=f"peak {ours['peak_gb']:.1f} GB")
    if "busy" in ours:
        kinds = ("products", "attention", "head_rows", "fused", "copies", "other")
        seconds = ", ".join(f"{kind} {ours[kind]:.3g}" for kind in kinds)
        say(f"{name}: a step", key=f"GPU busy {ours['busy']:.0%} of the time; s: {seconds}")


def step1b(smoke: bool, out: Path) -> None:
    """Micro-batches of 4 rows and of 1: is a small model's step bound by what the program launches?"""
    flags = [*BF16, *"--shape Llama-3.2-1B --row-tokens 4096 --samples 128 --batch-size 64".split()]
    for rows in ["4"] if smoke else ["4", "1"]:
        step(f"Llama-3.2-1B, {rows} rows", [*(TINY_STEP if smoke else flags), "--micro-rows", rows], out,
             out / f"trace_1b_{rows}.json.gz")


def step8b(smoke: bool, out: Path) -> None:
    flags = [*BF16, *"--shape Llama-3-8B --row-tokens 4096 --samples 48 --batch-size 16".split()]
    step("Llama-3-8B", TINY_STEP if smoke else flags, out, scratch() / "trace.json.gz")


def gen(smoke: bool, out: Path) -> None:
    if not find_spec("transformers"):
        say("generation", key="transformers is not installed: not run")
        return
    shape = [*BF16, "--shape", "Llama-3.2-1B", "--tokens", "48"]
    if smoke:
        shape = [*TINY, "--tokens", "8"]
    for batch in ["4"] if smoke else ["1", "64"]:
        run_and_tell(f"generation, batch {batch}", [
            "-m", "bench.generate", "--rounds", "2", "--batch", batch, *shape], "ours", "transformers ")
    shape = "--device cuda --dtype bfloat16 --width 1024 --ffn 4096 --layers 12 --vocab 128112 --tokens 24"
    if smoke:
        shape = "--width 64 --ffn 96 --layers 1 --vocab 600 --sentences 4 --tokens 4 --beams 2 --threads 1"
    command = "-m bench.translate --no-memory --rounds 2 --sizes 64"
    run_and_tell("translation", [*command.split(), *shape.split()], "| ours", "| transformers")


def trl(smoke: bool, out: Path) -> None:
    if not find_spec("trl") or not find_spec("datasets"):
        say("TRL", key="trl and datasets are not installed: not run")
        return
    flags = [*BF16, *"--shape Llama-3.2-1B --samples 64 --batch-size 32 --trl-batch 8".split()]
    flags += ["--trl-liger"] * bool(find_spec("liger_kernel"))
    run_and_tell("TRL", ["-m", "bench.step", "--sides", "ours", "trl", "--trl-precompute",
                         *(TINY_STEP if smoke else flags)], "ours ", "trl ")


# ------------------------------------------------------------------------------------------------ correctness

def clo_command(smoke: bool, out: Path, *flags: str) -> list[str]:
    """clo.py on a small part of the demo."""
    size = "--device cpu --samples 6 --epochs 1 --batch-size 2" if smoke else "--device cuda --samples 64"
    brief = "--baseline none --holdout 4 --answers 4 --max-new-tokens 12 --save-every 1"
    return ["clo.py", "--lang", "sw", *size.split(), *brief.split(), "--out", str(out), *flags]


def metrics(folder: Path) -> list[dict]:
    """What a run logged of its steps, less what a clock or the memory says."""
    path = folder / "clo/metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []      # the last one may be half written
    steps = [json.loads(line) for line in lines]
    return [{name: value for name, value in step.items() if name not in CLOCKS} for step in steps]


def demo(smoke: bool, out: Path) -> None:
    """A run; and the same one killed by SIGKILL after its second step, and taken up again."""
    whole, broken = scratch() / "whole", scratch() / "broken"
    text = run("clo.py", clo_command(smoke, whole))
    if text is None:
        return
    for rewards in re.findall("rewards before the first update: .*", text):
        say("clo.py", key=rewards)
    command = [sys.executable, *clo_command(smoke, broken)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and len(metrics(broken)) < 3:          # step 0 comes before the first
            time.sleep(0.02)
        process.kill()
    done = len(metrics(broken)) - 1
    say("killed", ok=process.returncode < 0, key=f"after step {done} of {len(metrics(whole)) - 1}")
    if run("taken up again", clo_command(smoke, broken)) is None:
        return
    one, other = (folder / "clo/adapter/adapter_model.safetensors" for folder in (whole, broken))
    say("the same adapter, byte for byte", ok=one.read_bytes() == other.read_bytes())
    say("the same metrics, step by step", ok=metrics(whole) == metrics(broken))


def shard(smoke: bool, out: Path) -> None:
    """The one process that torchrun would start for one GPU; port 0 is any free one."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    where = {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    run("clo.py --shard", clo_command(smoke, scratch() / "run", "--shard"), **alone, **where)


def pytest(smoke: bool, out: Path) -> None:
    command = "-m pytest -q -p no:cacheprovider tests/test_kernels.py".split()
    few = ["-k", "worked_example"] if smoke else []
    text = run("tests/test_kernels.py", [*command, "-m", "slow or not slow", *few])
    if text:
        say("tests/test_kernels.py", key=text.strip().splitlines()[-1].strip("= "))


PARTS = {part.__name__: part for part in (bench, step1b, step8b, demo, gen, pytest, shard, trl)}

if __name__ == "__main__":
    run_part(PARTS)
