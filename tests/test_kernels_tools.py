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


def start(*arguments, **environment):
    """Run `python -m ...` in the project's root, outside of Triton's interpreter unless asked."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, env=inherited | environment,
                          text=True, capture_output=True)


@needs_triton
def test_every_kernel_compiles_for_every_gpu_without_a_spill(tmp_path):
    done = start("kernels.aot", "--asm", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.rsplit(maxsplit=3) for line in done.stdout.splitlines()[2:]]
    targets = ("sm_80", "sm_90", "sm_100", "gfx942")
    assert [row[0].split()[0] for row in rows] == [name for name in targets for _ in range(4)]
    assert all(8 <= int(registers) <= 64 and spills == "0" for _, registers, spills, _ in rows)
    ptx = (tmp_path / "sm_90-q-bf16.ptx").read_text()
    assert ptx.count("ld.global.v4.b32") >= 2, "the logits are no longer read 16 bytes at a time"
    assert "ld.global.b128" not in ptx and "st.global.v4.b32" in ptx


@needs_triton
@pytest.mark.slow
def test_a_spill_fails_the_report():
    """One warp for a block of 8,192 logits has 256 of them per thread, and 255 registers."""
    code = """import sys
from kernels import aot
aot.BLOCK_V, aot.WARPS = 8192, 1
aot.TARGETS, aot.VARIANTS = {"sm_90": aot.TARGETS["sm_90"]}, {"forward only": ("fp32", False)}
sys.exit(aot.main([]))"""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=inherited, text=True,
                          capture_output=True)
    assert done.returncode == 1 and int(done.stdout.split()[-2]) > 0, done.stdout + done.stderr


@needs_triton
def test_the_report_refuses_to_run_in_the_interpreter():
    done = start("kernels.aot", TRITON_INTERPRET="1")
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


def test_a_peer_that_refuses_a_shape_is_named_and_left_out():
    def refuse(*_):
        raise RuntimeError("only for sm_999\nand a long trace")
    functions = {"eager": measure.reference.token_logp, "peer": refuse}
    data = measure.example((8, 4, 12), torch.float32, torch.device("cpu"), "frozen")
    ratios, refused = measure.error_ratios(functions, data, rows=8)
    assert list(ratios) == ["eager"] and refused == {"peer": "only for sm_999"}
    with pytest.raises(RuntimeError, match="sm_999"):
        measure.error_ratios({"ours": refuse}, data, rows=8)


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
