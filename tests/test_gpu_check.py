"""The check for a first hour on a GPU: its parts are apart, and all of it runs without one."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import gpu_check, gpu_math, gpu_runs, step

ROOT = Path(__file__).parents[1]
SAYS = "from bench.gpu_check import say; say('speed', key='3 TFLOP/s'); say('right', ok={ok})"
HANGS = ("import subprocess, sys, time; from bench.gpu_check import say; say('begun');"
         "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
         "open({file!r}, 'w').write(str(child.pid)); time.sleep(60)")
DIES = "import os; print('what came last', flush=True); os.kill(os.getpid(), 9)"


def conduct(monkeypatch, tmp_path, fakes: dict[str, str], seconds: int = 20, *flags: str):
    """main() with fake parts, given as Python code: (exit code, results by part)."""
    parts = {name: gpu_check.Part(seconds, "none", "a fake") for name in fakes}
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    monkeypatch.setattr(gpu_check, "command_of", lambda name, args: [sys.executable, "-c", fakes[name]])
    code = gpu_check.main(["--out", str(tmp_path), *flags])
    results = {name: [] for name in fakes}
    for line in (tmp_path / "results.jsonl").read_text().splitlines():
        result = json.loads(line)
        results[result.pop("part")].append(result)
    return code, results


def ended(pid: int) -> bool:
    """Whether a process is gone, or only waits for its parent to hear of its end."""
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"


def test_the_list_names_every_part_and_each_has_its_function(capsys):
    assert gpu_check.main(["--list"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == list(gpu_check.PARTS)
    for name, part in gpu_check.PARTS.items():
        assert name in {"gpu_math": gpu_math, "gpu_runs": gpu_runs}[part.module].PARTS


def test_a_part_that_hangs_or_dies_costs_the_others_nothing(monkeypatch, tmp_path, capsys):
    file = tmp_path / "child"
    fakes = {"hangs": HANGS.format(file=str(file)), "dies": DIES, "says": SAYS.format(ok=True)}
    began = time.perf_counter()
    code, results = conduct(monkeypatch, tmp_path, fakes, 4)
    assert time.perf_counter() - began < 30 and code == 1
    assert [found["name"] for found in results["hangs"]] == ["begun", "END"]
    assert results["hangs"][-1]["code"] == "time limit" and not results["hangs"][-1]["ok"]
    assert results["dies"][-1]["code"] == -9 and results["dies"][-1]["note"] == "what came last"
    assert [found["name"] for found in results["says"]] == ["speed", "right", "END"]
    assert all(found.get("ok", True) for found in results["says"])
    deadline = time.perf_counter() + 10
    while not ended(int(file.read_text())) and time.perf_counter() < deadline:
        time.sleep(0.05)
    assert ended(int(file.read_text()))                  # what the part started ends with it
    printed = capsys.readouterr().out
    assert "FAILED  hangs: END" in printed and "3 TFLOP/s" in printed
    assert "what came last" in (tmp_path / "log.txt").read_text()


def test_a_result_that_is_not_ok_fails_the_check_and_the_part_ended_well(monkeypatch, tmp_path):
    code, results = conduct(monkeypatch, tmp_path, {"says": SAYS.format(ok=False)})
    assert code == 1 and results["says"][-1] == {"name": "END", "ok": True, "code": 0} | {
        "seconds": results["says"][-1]["seconds"]}


def test_parts_for_which_no_time_is_left_are_skipped(monkeypatch, tmp_path):
    code, results = conduct(monkeypatch, tmp_path, {"says": SAYS.format(ok=True)}, 20, "--budget", "5")
    assert code == 0 and [found["name"] for found in results["says"]] == ["SKIPPED"]


def test_the_figures_of_a_step_are_read_as_they_are_printed():
    text = ("loading\n"
            "ours     seconds 0.05039, tflops 1.9e+02, chosen_logp -271.3, busy nan: 79.374 samples/s\n"
            "products seconds 0.02, peak_gb 0.29: 164.7 samples/s\nours / products: 0.4 of its samples/s")
    ours = gpu_runs.figures(text, "ours")
    assert math.isnan(ours.pop("busy"))
    assert ours == {"seconds": 0.05039, "tflops": 190.0, "chosen_logp": -271.3}
    assert gpu_runs.figures(text, "products") == {"seconds": 0.02, "peak_gb": 0.29}


@pytest.mark.parametrize("name, kind", [
    ("triton_tem_fused_flex_attention_backward_1", "attention"),
    ("row_kernel", "head_rows"),
    ("nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_NNT", "products"),
    ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "products"),
    ("triton_poi_fused_silu_mul_3", "fused"),
    ("Memcpy HtoD (Pinned -> Device)", "copies"),
    ("void at::native::vectorized_elementwise_kernel<4>", "other")])
def test_kernels_are_told_by_their_names(name, kind):
    assert step.kernel_kind(name) == kind


@pytest.mark.slow
def test_tiny_shapes_pass_without_a_gpu(tmp_path):
    """Of each kind of part one; CI runs all of them."""
    command = [sys.executable, str(ROOT / "bench/gpu_check.py"), "--cpu-smoke"]
    done = subprocess.run([*command, "--parts", "env", "kernels", "demo"], cwd=tmp_path,
                          env=os.environ | {"OUT": str(tmp_path)}, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {found["part"] for found in results if found["name"] == "END"} == {"demo", "env", "kernels"}
    assert sum(found.get("ok") is True for found in results) >= 12
    assert all(found.get("ok", True) for found in results)
