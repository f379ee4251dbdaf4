"""The parts of bench.gpu_check that compute for themselves: what the device can do at best, and whether its
gradients, its attention and its log-probs are those of float64."""

import contextlib
import os
import random
import shutil
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

import clo
import data
import kernels
import model as llama
from bench.gpu_check import run_part, say
from engine import ranks
from formats.configs import Config
from kernels import measure
from kernels.chunks import matmul_into

CPU = torch.device("cpu")
SHAPE = Config(512, 128, 192, 4, 8, 2, 16)      # FlexAttention wants heads of 16 channels at least
ERROR_LIMIT = 1.5                               # of token_logp, in units of plain PyTorch's in the same dtype
CHECKED_ROWS = 64                               # of its rows, spread over all: float64 takes time and memory


def device_of(smoke: bool) -> torch.device:
    if smoke:
        return CPU
    if not torch.cuda.is_available():
        say("no CUDA device", ok=False, note="--cpu-smoke runs without one")
        sys.exit(1)
    return torch.device("cuda")


@contextlib.contextmanager
def check(name: str):
    """What PyTorch, its compiler or Triton raise inside is a failed result, and the part goes on."""
    try:
        yield
    except measure.refusals() as error:
        traceback.print_exc()
        say(name, ok=False, note=f"{type(error).__name__}: {str(error)[:400]}")


def relative(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference over that of what is expected."""
    found = found.detach().to(CPU, torch.float64)
    expected = expected.detach().to(CPU, torch.float64)
    return ((found - expected).norm() / expected.norm()).item()


# ------------------------------------------------------------------------------------------------ ceilings

def sustained_seconds(work, device: torch.device, seconds: float) -> float:
    """Seconds of one call of work(), over so many in which a GPU grows warm and its clock falls."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    work()
    wait()
    calls, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        for _ in range(10):
            work()
        wait()
        calls += 10
    return (time.perf_counter() - began) / calls


def env(smoke: bool, out: Path) -> None:
    """Versions, and the ceilings: bytes moved and matrix products, a second."""
    device = device_of(smoke)
    say("versions", python=sys.version.split()[0], cpus=os.cpu_count(), compiler=shutil.which("gcc"),
        **measure.versions())
    n, size, seconds = (256, 2**20, 0.1) if smoke else (8192, 2**31, 2)
    if not smoke:
        card = torch.cuda.get_device_properties(0)
        gigabytes = card.total_memory / 1e9
        say("device", key=f"{card.name}, {gigabytes:.0f} GB", processors=card.multi_processor_count)
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.max.sm,power.limit", "--format=csv,noheader"]
        state = subprocess.run(query, capture_output=True, text=True)
        say("clocks, power", found=state.stdout.strip())

    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    took = sustained_seconds(lambda: target.copy_(source), device, seconds)
    say("copies", key=f"{2 * size / took / 1e12:.2f} TB/s, read and written")

    dtype = torch.float32 if smoke else torch.bfloat16
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    wide = torch.empty(n, n, device=device)
    for name, multiply in (("products", lambda: a @ b),
                           ("products, fp32 results", lambda: matmul_into(wide, a, b))):
        rate = 2 * n**3 / sustained_seconds(multiply, device, seconds) / 1e12
        say(name, key=f"{rate:.3g} TFLOP/s, sustained", tflops=rate)


# ----------------------------------------------------------------------------------------------- gradients

def small_model(dtype, device, rounded=None, recompute=False, compiler=None) -> llama.Llama:
    """Weights so large that every block matters, and LoRA's B away from zero. rounded: with their values as
    of that dtype, so that float64 is the truth about the same model."""
    model = llama.initialise_(llama.Llama(SHAPE, recompute=recompute, compiler=compiler))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    model = model.to(rounded or dtype).to(dtype)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in clo.make_trainable(model, "lora", rank=4, alpha=8, seed=0).items():
        if name.endswith("lora_B"):
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.to(device)


def small_batches(tokens: int, rows: int, forks: int = 32, stretch: int = 1) -> list[data.Batch]:
    """Random forks in batches of one shape, as on a GPU; stretch: times as long."""
    rng = random.Random(3)

    def ids(low, high):
        length = rng.randint(stretch * low, stretch * high)
        return [rng.randrange(SHAPE.vocab_size) for _ in range(length)]
    made = [data.Fork(ids(2, 12), [ids(3, 30), ids(3, 30)], "en", row, 0) for row in range(forks)]
    return data.micro_batches(made, tokens, rows, trim=False, ends=False)


def masked(batch: data.Batch, device: torch.device) -> data.Batch:
    """The batch as a GPU sees it, also where there is none."""
    return replace(batch.to(device), lines=None)


@dataclass
class Pass:
    """What one pass over a batch gives: log-probs (S,), and the gradients of a weighted sum of them."""
    logp: Tensor
    gradients: dict[str, Tensor]

    @classmethod
    def of(cls, model: llama.Llama, batch: data.Batch) -> "Pass":
        model.zero_grad(set_to_none=True)
        logp = llama.continuation_logps(model, batch)
        weights = torch.linspace(-1, 1, len(logp), dtype=logp.dtype, device=logp.device)
        (logp * weights).sum().backward()
        learned = clo.trainable(model)
        return cls(logp.detach(), {name: parameter.grad for name, parameter in learned.items()})

    def equals(self, other: "Pass") -> bool:
        """To the last bit."""
        same = [torch.equal(self.gradients[name], found) for name, found in other.gradients.items()]
        return torch.equal(self.logp, other.logp) and all(same)

    def error(self, truth: "Pass") -> float:
        return max(relative(self.gradients[name], true) for name, true in truth.gradients.items())


def check_pass(name: str, dtype, compiler, limit: float, device: torch.device, batches: list) -> None:
    """A pass against float64 on the CPU, without masks; whether its bits stay; what other rows compile."""
    truth = Pass.of(small_model(torch.float64, CPU, rounded=dtype), batches[0])
    model = small_model(dtype, device, compiler=compiler)
    first, *others = (masked(batch, device) for batch in batches)
    began = time.perf_counter()
    found = Pass.of(model, first)
    took = time.perf_counter() - began
    error = found.error(truth)
    say(f"{name} against float64", ok=error < limit, seconds=round(took, 1),
        key=f"gradients {error:.1e}, log-probs {relative(found.logp, truth.logp):.1e}")
    say(f"{name}: two passes have the same bits", ok=Pass.of(model, first).equals(found))
    with torch.no_grad():
        reference = llama.continuation_logps(model, first)
    say(f"{name}: policy and reference have the same bits", ok=torch.equal(reference, found.logp),
        difference=(reference - found.logp).abs().max().item())
    if compiler:
        before = graphs()
        for batch in others:
            Pass.of(model, batch)
        say(f"{name}: other rows compile nothing", ok=graphs() == before, graphs=[before, graphs()])


def graphs() -> int:
    """How many graphs torch.compile has made."""
    from torch._dynamo.utils import counters
    return counters["stats"]["unique_graphs"]


def check_recompute(dtype, compiler, device: torch.device, batch: data.Batch) -> None:
    kept, recomputed = (small_model(dtype, device, recompute=recompute, compiler=compiler)
                        for recompute in (False, True))
    same = Pass.of(recomputed, batch).equals(Pass.of(kept, batch))
    say("recomputed gradients have the same bits", ok=same)
    if device.type == "cuda":
        with torch.no_grad():
            quiet = peak_mb(lambda: llama.continuation_logps(kept, batch))
        less, more = (peak_mb(lambda: Pass.of(model, batch)) for model in (recomputed, kept))
        say("memory of a pass", ok=quiet <= 1.1 * less,
            key=f"without gradient {quiet:.0f} MB, recomputed {less:.0f} MB, kept {more:.0f} MB")


def peak_mb(work) -> float:
    """MB of a GPU that work() takes beyond what was taken before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


MASKS = [(2, 512, 8, 2, 64, None),              # rows, tokens, query heads, kv heads, head width, window
         (1, 200, 6, 2, 32, 48),
         (1, 128, 4, 2, 32, None),
         (1, 96, 6, 2, 32, None),
         (1, 512, 4, 4, 128, None)]


def check_attention(shape: tuple, device: torch.device) -> None:
    """Attention of packed forks and its gradients in fp32, the way the device takes, against the dense mask
    in float64."""
    B, T, Q, G, D, window = shape
    batch = small_batches(T, B)[0]
    generator = torch.Generator().manual_seed(0)
    *qkv, up = (torch.randn(B, T, heads, D, generator=generator) for heads in (Q, G, G, Q))
    real = (batch.fork >= 0)[..., None, None]

    def attend(device, dtype):
        leaves = [x.to(device, dtype).requires_grad_() for x in qkv]
        rows = [x.to(device) for x in (batch.fork, batch.branch, batch.positions)]
        attention = llama.fork_attention(*rows, D, window)
        seen = attention(*leaves) * real.to(device)
        return [seen, *torch.autograd.grad(seen, leaves, up.to(device, dtype))]
    pairs = zip(attend(device, torch.float32), attend(CPU, torch.float64))
    errors = [relative(found, true) for found, true in pairs]
    say(f"attention of {B} x {T}, heads {Q}/{G} of {D}, window {window}", ok=max(errors) < 2e-3,
        key="output, q, k, v: " + ", ".join(f"{error:.0e}" for error in errors))


def grads(smoke: bool, out: Path) -> None:
    device = device_of(smoke)
    compiler = "aot_eager" if smoke else "inductor"
    if not smoke:
        ranks.fix_order_of_sums()
    batches = small_batches(256, 2)
    for name, dtype, used, limit in (("plain fp32", torch.float32, None, 2e-3),
                                     ("compiled fp32", torch.float32, compiler, 2e-3),
                                     ("compiled bf16", torch.bfloat16, compiler, 8e-2)):
        torch.compiler.reset()          # a function may be compiled so many times and no more
        with check(name):
            check_pass(name, dtype, used, limit, device, batches)
    for shape in MASKS[-1:] if smoke else MASKS:
        with check(f"attention {shape}"):
            check_attention(shape, device)
    torch.compiler.reset()
    with check("recomputing"):
        check_recompute(torch.bfloat16, compiler, device, masked(batches[0], device))


def attention(smoke: bool, out: Path) -> None:
    """A layer's attention, forward and backward: as many warps as FlexAttention takes by itself, 4, and 8."""
    device = device_of(smoke)
    dtype = torch.float32 if smoke else torch.bfloat16
    B, T, forks, stretch = (1, 128, 4, 1) if smoke else (4, 4096, 60, 9)        # of some 360 tokens each
    batch = small_batches(T, B, forks, stretch)[0]
    rows = [x.to(device) for x in (batch.fork, batch.branch, batch.positions)]
    for model, Q, G, D in (("1B", 32, 8, 64), ("8B", 32, 8, 128)):
        like = {"device": device, "dtype": dtype, "requires_grad": True}
        leaves = [torch.randn(B, T, heads, D, **like) for heads in (Q, G, G)]
        attend = llama.fork_attention(*rows, D)
        ways = {"as it is": attend}
        if "flex" in attend.keywords:
            for warps in (4, 8):
                flex = partial(attend.keywords["flex"], kernel_options={"num_warps": warps})
                ways[f"{warps} warps"] = partial(attend, flex=flex)
        for name, way in ways.items():
            def work():
                torch.autograd.grad(way(*leaves).sum(), leaves)
            with check(f"{model}, {name}"):
                seconds = sustained_seconds(work, device, 0.1 if smoke else 0.5)
                say(f"{model}, heads of {D}, {name}", key=f"{1e3 * seconds:.3f} ms")


# ----------------------------------------------------------------------------------------------- log-probs

def check_logp(N: int, H: int, V: int, dtype, device: torch.device, chunk_bytes: int = 0) -> None:
    """token_logp and its gradient against float64 and beside plain PyTorch; whether its bits stay."""
    hidden, weight, targets, upstream = measure.example((N, H, V), dtype, device, "frozen")
    targets[:2] = torch.tensor([0, V - 1])[:N]
    backend = "triton" if find_spec("triton") else ""
    op = partial(kernels.token_logp, chunk_bytes=chunk_bytes, backend=backend)
    ours = measure.run(op, hidden, weight, targets, upstream)
    rows = torch.linspace(0, N - 1, min(N, CHECKED_ROWS), device=device).round().long()

    def reference(dtype):
        leaf = hidden.detach()[rows].to(dtype).requires_grad_()
        given = leaf, weight.to(dtype), targets[rows], upstream[rows]
        return measure.run(kernels.reference.token_logp, *given)
    ratios = []
    for found, plain, true in zip(ours, reference(dtype), reference(torch.float64)):
        usual = max(relative(plain, true), torch.finfo(torch.float32).eps)
        ratios.append(relative(found[rows], true) / usual)
    name = f"{N}x{H}x{V} {str(dtype).removeprefix('torch.')}"
    say(name, ok=max(ratios) < ERROR_LIMIT,
        key=f"error of log-probs {ratios[0]:.2f}, of gradients {ratios[1]:.2f} times plain PyTorch's")

    again = measure.run(op, hidden, weight, targets, upstream)
    with torch.no_grad():
        quiet = op(hidden, weight, targets)
    same = torch.equal(again[0], ours[0]) and torch.equal(again[1], ours[1])
    say(f"{name}: the same bits twice, and without gradient", ok=same and torch.equal(quiet, ours[0]))


def logps(smoke: bool, out: Path) -> None:
    device = device_of(smoke)
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    cases = [(37, 24, 101, fp32, 16 * 101 * 4),
             (37, 24, 101, bf16, 16 * 101 * 4),
             (9, 16, 515, fp16)]
    if not smoke:
        cases += [(65, 64, 50257, bf16),
                  (333, 72, 50257, bf16, 64 * 50257 * 4),
                  (257, 128, 32001, fp16),
                  (511, 256, 151936, bf16, 10**8),
                  (130, 2048, 128256, bf16),
                  (64, 512, 2, bf16),
                  (17040, 64, 128256, bf16, 17040 * 128256 * 4)]        # 2.19e9 logits in one chunk
    for N, H, V, *rest in cases:
        with check(f"{N}x{H}x{V}"):
            check_logp(N, H, V, rest[0], device, *rest[1:])


PARTS = {"env": env, "grads": grads, "attention": attention, "kernels": logps}

if __name__ == "__main__":
    run_part(PARTS)
