"""The compiler report and the benchmark of the kernels, each as a user starts it."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from kernels import bench, measure

ROOT = Path(__file__).parents[1]
needs_triton = pytest.mark.skipif(not find_spec("triton"), reason="Triton is not installed")


def python(*arguments, **environment):
    """Run Python in the project's root, outside of Triton's interpreter unless asked."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=inherited | environment,
                          text=True, capture_output=True)


@pytest.mark.slow
@needs_triton
def test_every_kernel_compiles_for_every_gpu_without_a_spill(tmp_path):
    done = python("-m", "kernels.aot", "--asm", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.rsplit(maxsplit=3) for line in done.stdout.splitlines()[2:]]
    targets = ("sm_80", "sm_90", "sm_100", "gfx942")
    assert [row[0].split() for row in rows] == [
        [name, q_type] for name in targets for q_type in ("fp32", "bf16", "fp16")]
    assert all(8 <= int(registers) <= 64 and spills == "0" for _, registers, spills, _ in rows)
    for q_type in ("fp32", "bf16", "fp16"):
        ptx = (tmp_path / f"sm_90-{q_type}.ptx").read_text()
        assert ptx.count("ld.global.v4.b32") >= 2, "the logits are no longer read 16 bytes at a time"
        assert "ld.global.b128" not in ptx and "st.global.v4.b32" in ptx


@needs_triton
def test_with_and_without_a_gradient_one_binary_runs():
    """What the launcher builds a binary for, from the arguments of both modes: types and specialised values.
    A second one would sum in another order, and a reference would not equal its policy to the last bit."""
    code = """from kernels.rows import row_kernel
wants = {p.name: p.is_constexpr for p in row_kernel.params}
assert [name for name in wants if wants[name]] == ["N_WORDS", "BLOCK_V"], wants
assert [p.name for p in row_kernel.params if p.do_not_specialize] == ["keep_q"]
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
backend = make_backend(GPUTarget("cuda", 90, 32))
bind = create_function_from_signature(row_kernel.signature, row_kernel.params, backend)
logits = torch.empty(8, 33)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    q = logits if dtype == torch.float32 else logits.view(dtype)[:, 33:]
    pointers = logits, torch.empty(8, dtype=torch.int64), *torch.empty(4, 8), q
    made = [bind(*pointers, 33, q.stride(0), keep, N_WORDS=33, BLOCK_V=16)[1] for keep in (0, 1)]
    assert made[0] == made[1], made
print("one")"""
    done = python("-c", code)
    assert done.returncode == 0 and done.stdout == "one\n", done.stderr


@needs_triton
@pytest.mark.slow
def test_a_spill_fails_the_report():
    """One warp for a block of 8,192 logits has 256 of them per thread, and 255 registers."""
    code = """import sys
from kernels import aot
aot.BLOCK_V, aot.WARPS = 8192, 1
aot.TARGETS, aot.Q_TYPES = {"sm_90": aot.TARGETS["sm_90"]}, ("fp32",)
sys.exit(aot.main([]))"""
    done = python("-c", code)
    assert done.returncode == 1 and int(done.stdout.split()[-2]) > 0, done.stdout + done.stderr


@needs_triton
def test_the_report_refuses_to_run_in_the_interpreter():
    done = python("-m", "kernels.aot", TRITON_INTERPRET="1")
    assert done.returncode == 2 and done.stderr.startswith("error: TRITON_INTERPRET=1")


@needs_triton
def test_amd_assembly_is_read_for_its_spills():
    from kernels.aot import amd_usage
    notes = """.private_segment_fixed_size: 12
               .sgpr_count: 20
               .sgpr_spill_count: 1
               .vgpr_count: 40
               .vgpr_spill_count: 2"""
    assert amd_usage(notes) == (40, 15)


@pytest.mark.slow
def test_the_benchmark_prints_and_writes_the_same_table(tmp_path, capsys):
    file = tmp_path / "numbers.json"
    arguments = "--shapes 24x8x50 --modes frozen --rounds 1 --device cpu --dtype fp32 --only ours"
    assert bench.main([*arguments.split(), "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["name"] for row in rows] == ["floor", "ours", "eager"]
    assert rows[0]["x floor"] == 1 and rows[2]["x eager"] == 1 and rows[2]["error"] <= 1
    printed = capsys.readouterr().out
    assert all(f"{row['ms']:.2f}" in printed for row in rows) and "peak MB" in printed


def test_the_plot_has_a_bar_for_every_row_of_every_group(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [{"shape": "24x8x50", "mode": mode, "name": name, "x floor": 1.2}
            for mode in ("forward", "frozen") for name in ("floor", "ours")]
    bench.plot(rows, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_a_gpu_spins_before_the_clock_starts(monkeypatch):
    """So that the launches of the timed call wait behind the spin, and none of them is timed."""
    order = []

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            order.append("record")

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return 1.5
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append("spin"))
    assert measure.time_ms(lambda: order.append("call"), torch.device("cuda")) == 1.5
    assert order == ["spin", "record", "call", "record"]


def test_a_peer_that_refuses_a_shape_is_named_and_left_out():
    def refuse(*_):
        raise RuntimeError("only for sm_999\nand a long trace")
    functions = {"eager": measure.reference.token_logp, "peer": refuse}
    data = measure.example((8, 4, 12), torch.float32, torch.device("cpu"), "frozen")
    ratios, refused = measure.error_ratios(functions, data, rows=8)
    assert list(ratios) == ["eager"] and refused == {"peer": "only for sm_999"}
    with pytest.raises(RuntimeError, match="sm_999"):
        measure.error_ratios({"ours": refuse}, data, rows=8)


def test_other_bounds_of_the_logits_are_contenders_of_their_own():
    found = measure.contenders(torch.device("cpu"), budgets=(2_000_000, 10**9))
    assert {"ours", "ours, 2 MB", "ours, 1000 MB"} <= set(found)
    assert found["ours, 2 MB"].keywords == {"chunk_bytes": 2_000_000}


@pytest.mark.slow
def test_trls_op_computes_what_ours_does():
    pytest.importorskip("trl.kernels")
    data = measure.example((24, 8, 50), torch.float32, torch.device("cpu"), "frozen")
    found, expected = (measure.run(function, *data) for function in (measure.trl_logp, measure.token_logp))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.slow
def test_peak_memory_counts_what_a_call_touches():
    """Eager holds logits and log-probs, 8 MB each; ours one chunk of 256 rows, 4 MB."""
    case = (512, 16, 4000), torch.float32, torch.device("cpu"), "forward"
    peaks = {name: measure.peak_bytes(name, *case) for name in ("ours", "eager")}
    assert peaks["eager"] >= 16e6 and peaks["ours"] < 0.6 * peaks["eager"]


def test_an_unknown_shape_or_contender_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(["--shapes", "24x8"])
    assert stop.value.code == 2 and "24x8" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        bench.main(["--shapes", "24x8x50", "--only", "nobody", "--device", "cpu"])
    assert stop.value.code == 2 and "nobody" in capsys.readouterr().err
