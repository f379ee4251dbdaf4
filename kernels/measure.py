"""Who runs in the benchmark, and how one run is timed, weighed and checked. `bench.py` prints the results.

A contender is a function (hidden, weight, targets) -> log-probs (N,) or, where it has nothing per token, the
mean of minus these. Peers run when they are installed; none is needed.
"""

import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F

from . import linear_cross_entropy, reference, token_logp

MODES = {"forward": 1, "frozen": 2, "trainable": 3}  # and how many products of 2NHV FLOPs each has to do
SPIN_CYCLES = 3 * 10**6  # of a GPU's clock, 2 ms or so: longer than the host takes to launch one call
SMALL_CHUNK_BYTES = 240 * 10**6  # with the directions, below 320 MB at 8,192 rows of 4,096


def versions():
    """{package: version} of PyTorch and of what is installed of Triton and the peers."""
    modules = {"torch": "torch", "triton": "triton", "liger-kernel": "liger_kernel",
               "cut-cross-entropy": "cut_cross_entropy", "trl": "trl"}
    return {package: version(package) for package, module in modules.items() if find_spec(module)}


def trl_logp(hidden, weight, targets):
    """TRL's own op: log-probs, of which the backward multiplies the logits out again."""
    from trl.kernels import ChunkedLogProbFunction
    temperature, words, softcap, scale, more = 1.0, 8192, None, 1.0, ()
    return ChunkedLogProbFunction.apply(hidden, weight, None, targets, temperature, words, softcap, scale,
                                        more)[0]


def contenders(device, budgets=()):
    """{name: function} of what can run on `device`: ours, plain PyTorch, the peers installed.
    budgets: bytes of logits; ours runs with each of them, too."""
    found = {"ours": token_logp, "ours, mean": linear_cross_entropy, "eager": reference.token_logp}
    for size in budgets:
        found[f"ours, {size / 1e6:.0f} MB"] = partial(token_logp, chunk_bytes=size)
    if device.type == "cuda":
        found["ours, small"] = partial(token_logp, chunk_bytes=SMALL_CHUNK_BYTES)
        found["torch.compile"] = torch.compile(reference.token_logp, dynamic=True)  # once for all sizes
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        options = torch.nn.LinearCrossEntropyOptions()
        chunked = partial(F.linear_cross_entropy, options=options)
        found["torch chunked"] = lambda h, w, y: -chunked(h, w, y, reduction="none")
        found["torch chunked, mean"] = chunked
    if device.type == "cuda" and find_spec("liger_kernel"):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as liger
        found["liger, mean"] = liger
        found["liger"] = lambda h, w, y: -liger(h, w, y, reduction="none")
    if device.type == "cuda" and find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy as cce
        found["cce exact"] = lambda h, w, y: -cce(h, w, y, reduction="none", filter_eps=None)
        found["cce filtered"] = lambda h, w, y: -cce(h, w, y, reduction="none")
    trl = find_spec("trl")
    if trl and Path(trl.origin).with_name("kernels").is_dir():  # older versions have none
        found["trl"] = trl_logp
    return found


def example(shape, dtype, device, mode):
    """(hidden, weight, targets, upstream gradient): logits of spread 2, gradients of both signs."""
    N, H, V = shape
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(N, H, generator=generator, device=device).to(dtype)
    weight = torch.randn(V, H, generator=generator, device=device) * (2 * H**-0.5)
    weight = weight.to(dtype)
    targets = torch.randint(V, (N,), generator=generator, device=device)
    upstream = torch.randn(N, generator=generator, device=device) / N
    hidden.requires_grad_(mode != "forward")
    weight.requires_grad_(mode == "trainable")
    return hidden, weight, targets, upstream


def run(function, hidden, weight, targets, upstream):
    """Forward, and backward where a gradient is wanted: [output, gradients...], all of them fresh tensors."""
    hidden.grad = weight.grad = None
    output = function(hidden, weight, targets)
    if output.requires_grad:
        output.backward(upstream.to(output.dtype) if output.ndim else None)
    results = (output.detach(), hidden.grad, weight.grad)
    return [x for x in results if x is not None]


def copies(data, rows, dtype=None):
    """The first `rows` rows of `example`, as new leaves, in `dtype` or their own."""
    hidden, weight, targets, upstream = data
    leaves = []
    for x in (hidden[:rows], weight):
        copy = x.detach().to(dtype or x.dtype, copy=True)
        leaves.append(copy.requires_grad_(x.requires_grad))
    return *leaves, targets[:rows], upstream[:rows]


def refusals():
    """The exceptions by which a peer says that a shape, a dtype or a GPU is not for it."""
    if not find_spec("triton"):
        return RuntimeError, AssertionError
    from triton.errors import TritonError
    return RuntimeError, AssertionError, TritonError


def error_ratios(functions, data, rows):
    """({name: worst ratio of its error to that of plain PyTorch in the same dtype}, {name: why it has none}).

    An error is the root mean square of the difference from float64, of an output of `run`, on the first
    `rows` rows. Below the resolution of fp32 none is counted.
    """
    def rms(x):
        return x.double().square().mean().sqrt().item()

    def error_of(outputs, truth):
        return [rms(x - true) for x, true in zip(outputs, truth, strict=True)]

    truth, plain = {}, {}
    for ndim, function in ((1, reference.token_logp), (0, reference.linear_cross_entropy)):
        truth[ndim] = run(function, *copies(data, rows, torch.float64))
        resolution = [torch.finfo(torch.float32).eps * rms(true) for true in truth[ndim]]
        errors = error_of(run(function, *copies(data, rows)), truth[ndim])
        plain[ndim] = [max(pair) for pair in zip(errors, resolution)]
    ratios, refused = {}, {}
    for name, function in functions.items():
        try:
            outputs = run(function, *copies(data, rows))
        except refusals() as failure:
            if name.startswith(("ours", "eager")):
                raise
            reason = str(failure).strip() or type(failure).__name__
            refused[name] = reason.splitlines()[0]
            continue
        ndim = outputs[0].ndim
        errors = error_of(outputs, truth[ndim])
        ratios[name] = max(error / usual for error, usual in zip(errors, plain[ndim]))
    return ratios, refused


def floor(shape, dtype, device, mode):
    """A function that runs only the matrix products `mode` needs, whole, into memory taken beforehand."""
    N, H, V = shape
    half = dtype in (torch.bfloat16, torch.float16)
    hidden, weight, _, _ = (x.detach() for x in example(shape, dtype, device, "forward"))
    # Not zeros: a GPU multiplies zeros with less power, so faster.
    signs = torch.rand(N if mode != "forward" else 0, V, dtype=dtype, device=device)
    wide = torch.float32 if half and device.type == "cuda" else dtype
    into = partial(torch.empty, dtype=wide, device=device)
    products = [
        (hidden, weight.T, into(N, V)),
        (signs, weight, into(N, H)),
        (signs.T, hidden, into(V, H))]

    def multiply():
        for a, b, out in products[:MODES[mode]]:
            if wide == dtype:
                torch.mm(a, b, out=out)
            else:
                torch.mm(a, b, out_dtype=wide, out=out)
    return multiply


def time_ms(function, device, clock=time.perf_counter):
    """Milliseconds of one call: on a GPU by its own clock, elsewhere by `clock`, in seconds.

    A GPU spins first, so that the launches wait in line behind that and none of them is timed.
    """
    if device.type != "cuda":
        start = clock()
        function()
        return (clock() - start) * 1e3
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(SPIN_CYCLES)
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def resident_bytes(field):
    """This process's memory: "VmRSS" now, "VmHWM" at its highest (both highest where there is no /proc)."""
    status = Path("/proc/self/status")
    if status.exists():
        behind = status.read_text().split(field + ":")[1]
        return int(behind.split()[0]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def peak_here(name, shape, dtype, device, mode, budgets=()):
    """Bytes that one call takes at its highest beyond its inputs, its results included, in this process."""
    function = contenders(device, budgets)[name]
    data = example(shape, dtype, device, mode)
    run(function, *example((8, shape[1], 64), dtype, device, mode))  # thread pools and libraries come first
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(function, *data)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    before = resident_bytes("VmRSS")
    run(function, *data)
    return resident_bytes("VmHWM") - before


def peak_bytes(*case):
    """`peak_here`; on a CPU in a fresh process, because memory once touched stays resident."""
    if case[3].type == "cuda":
        return peak_here(*case)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(peak_here, *case).result()
