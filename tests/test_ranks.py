"""ranks.py and the promises of a run: any number of ranks, sharded or not, killed or not, one result.

The processes that torchrun starts here run this file itself: see its end.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_clo import CLO, changed, fails, groups_of, parallel_rows, without_times

import clo
import data
import model as llama
from conftest import Recorder, write_checkpoint
from engine import ranks, runs
from engine.files import InputError, read_json
from formats.checkpoints import save
from formats.configs import Config
from formats.records import write_rows

ROOT = Path(__file__).parents[1]
ENVIRONMENT = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def finished(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run([*map(str, command)], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)


def on_two(*command: str) -> subprocess.CompletedProcess:
    return finished(*TORCHRUN, *command)


def start(*command: str) -> subprocess.Popen:
    return subprocess.Popen([*map(str, command)], cwd=ROOT, env=ENVIRONMENT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_until(condition, process: subprocess.Popen) -> bool:
    """Look as often as a processor allows; False when the process ends first."""
    while process.poll() is None:
        if condition():
            return True
    return False


@pytest.fixture
def world(tmp_path):
    """A checkpoint none of whose sizes two ranks divide evenly, rows for it,
    and flags of a short run in float64."""
    write_checkpoint(tmp_path / "base", hidden_size=17, intermediate_size=25, num_attention_heads=3,
                     num_key_value_heads=1, tie_word_embeddings=False, model_type="qwen2", qkv_bias=True)
    rows = parallel_rows(24)
    write_rows(tmp_path / "rows.jsonl", rows[:16])
    splits = ("test", "validation")
    write_rows(tmp_path / "eval.jsonl",
                    [row | {"split": splits[i % 2]} for i, row in enumerate(rows[16:])])
    return tmp_path, ["--model", str(tmp_path / "base"), "--data", str(tmp_path / "rows.jsonl"),
                      "--out", str(tmp_path / "run"), "--lang", "sw", "--row-tokens", "200",
                      "--max-new-tokens", "6", "--lr", "1e-2", "--device", "cpu", "--dtype", "fp64",
                      "--baseline", "none", "--batch-size", "4"]


def state(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of a finished run's last checkpoint, whole: weights and AdamW's moments."""
    path = runs.checkpoints(run / "clo" / "checkpoint")[-1]
    parts = [load_file(file) for file in sorted(path.iterdir())]
    return {name: torch.cat([part[name] for part in parts]) if value.ndim else value
            for name, value in parts[0].items()}


def results(run: Path) -> dict:
    """What a run leaves, to be compared bit for bit:
    tensors, the last checkpoints, metrics without their times."""
    last = [runs.checkpoints(path)[-1] for path in run.rglob("checkpoint")]
    found = {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*.safetensors"))
             if path.parent in last or "checkpoint" not in path.parts}
    return found | {str(path.relative_to(run)): without_times(path)
                    for path in sorted(run.rglob("metrics.jsonl"))}


# ---- many ranks, one result

@pytest.mark.slow
@pytest.mark.parametrize("train", ["lora", "attention", "full"])
def test_a_sharded_model_trains_to_what_one_process_gives(world, train):
    path, flags = world
    flags = [*flags, "--train", train, *(["--merge"] if train == "lora" else [])]
    clo.main(flags)
    run = on_two("clo.py", *changed(flags, "--out", path / "two"), "--shard")
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("loaded again") == (2 if train == "lora" else 1)
    assert run.stdout.count("Talk to it") == 1
    one, two = state(path / "run"), state(path / "two")
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-10,
                                   msg=lambda text: f"{name}: {text}")
    for a, b in zip(*(without_times(path / name / "clo" / "metrics.jsonl") for name in ("run", "two"))):
        assert a.keys() == b.keys()
        assert all(b[key] == (a[key] if key == "answers" else pytest.approx(a[key], abs=1e-10)) for key in a)
    one, two = (load_file(path / name / "clo" / "model" / "model.safetensors") for name in ("run", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-7)                 # written as fp32
    one, two = ((path / name / "clo" / "answers.jsonl").read_text() for name in ("run", "two"))
    assert one == two


@pytest.mark.slow
def test_ranks_share_work_weights_and_what_the_first_one_does(world):
    path, _ = world
    run = on_two("tests/test_ranks.py", "shared_model", path)
    assert run.returncode == 0, run.stderr[-3000:]
    assert sorted(run.stdout.split()) == ["rank-0-is-fine"]


def shared_model(path: Path) -> None:
    ranks.start("cpu")
    r = ranks.rank()
    for items in range(1, 6):
        dealt = ranks.deal(items)
        assert len(dealt) == -(-items // 2) and all(0 <= i < items for i, _ in dealt)
        assert ranks.gather([i for i, counted in dealt if counted]) == list(range(items))
    assert ranks.largest(7 + r, torch.device("cpu")) == 8
    tokens = torch.arange(22).view(2, 11)
    expected = llama.load(path / "base", dtype=torch.float64)
    model = ranks.load(path / "base", "cpu", torch.float64)
    full = sum(parameter.numel() for parameter in expected.parameters())
    own = sum(ranks.local_part(parameter).numel() for parameter in model.parameters())
    assert ranks.gather([own]) != [full, full] and sum(ranks.gather([own])) == full and own < 0.6 * full
    for parameter, (name, other) in zip(model.parameters(), expected.named_parameters()):
        assert torch.equal(parameter.full_tensor(), other), name
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), expected(tokens), rtol=0, atol=1e-12)
    replies = llama.generate(model, [[1, 2, 3], [4]], max_tokens=5, stop_ids={0})   # all ranks do it alike
    assert replies == llama.generate(expected, [[1, 2, 3], [4]], max_tokens=5, stop_ids={0})
    assert ranks.on_first(lambda: r) == 0
    for train in ("lora", "attention", "full"):  # fp32 among bf16 weights; gradients are summed, not averaged
        def learn(model):
            clo.make_trainable(model, train, 4, 8, seed=0, device="cpu")
        alone = llama.load(path / "base", dtype=torch.bfloat16)
        learn(alone)
        shared = ranks.load(path / "base", "cpu", torch.bfloat16, prepare=learn)
        for model in (alone, shared):
            hidden = model(tokens)
            (hidden @ model.head.to(hidden.dtype).T).float().log_softmax(-1)[..., 5].sum().backward()
        ranks.sum_gradients_(parameter for parameter in shared.parameters() if parameter.requires_grad)
        for (name, one), two in zip(alone.named_parameters(), shared.parameters()):
            assert (one.requires_grad, one.dtype) == (two.requires_grad, two.dtype), name
            assert not one.requires_grad or torch.equal(ranks.full(two.grad), 2 * one.grad), name
    ranks.barrier()
    print("rank-0-is-fine")
    ranks.stop()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(),
                    reason="needs Linux's account of a process's memory")
def test_loading_takes_a_rank_its_share_of_the_memory_and_of_the_file(tmp_path):
    config = Config(vocab_size=8203, hidden_size=1024, intermediate_size=6145, num_hidden_layers=1,
                          num_attention_heads=8, num_key_value_heads=8, head_dim=64)
    save(llama.initialise_(llama.Llama(config)), tmp_path)
    run = on_two("tests/test_ranks.py", "memory_of_loading", tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    size = (tmp_path / "model.safetensors").stat().st_size
    lines = [line for line in run.stderr.splitlines() if line.startswith("memory:")]
    assert len(lines) == 2
    for line in lines:
        held, peak = map(int, line.split()[1:])
        assert 0.45 * size < held < 0.6 * size and peak < 1.25 * size, (held, peak, size)


def memory_of_loading(path: Path) -> None:
    """Says how many bytes a model takes of this rank's own memory, and how many its pages took at the peak:
    its own and those it read of the file. Reading all of it would show as half the file more, a copy of all
    as the whole more."""
    def kilobytes(kind: str) -> int:
        return int(re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
    ranks.start("cpu")
    ranks.load(path, "cpu", torch.float32)                   # the libraries' own first-time memory
    Path("/proc/self/clear_refs").write_text("5")            # the peak starts anew
    own, resident = kilobytes("RssAnon"), kilobytes("VmRSS")
    kept = ranks.load(path, "cpu", torch.float32)
    grown = kilobytes("RssAnon") - own, kilobytes("VmHWM") - resident
    print("memory:", *(1024 * number for number in grown), file=sys.stderr, flush=True)
    assert kept is not None
    ranks.barrier()
    ranks.stop()


def test_shard_without_torchrun_is_refused(world, capsys):
    with pytest.raises(SystemExit) as error:
        clo.main([*world[1], "--shard"])
    assert error.value.code == 2 and "torchrun" in capsys.readouterr().err.splitlines()[-1]


# ---- one fails, all leave

@pytest.mark.slow
@pytest.mark.parametrize("part", ["one_fails", "first_fails"])
def test_when_a_rank_fails_it_says_why_at_once_and_all_are_gone_within_a_minute(part, tmp_path):
    started = time.monotonic()
    run = on_two("tests/test_ranks.py", part, tmp_path)
    assert run.returncode != 0 and time.monotonic() - started < 60
    lines = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert lines == ["error: no bread"], run.stderr


@pytest.mark.slow
def test_when_a_rank_is_killed_the_other_says_so_in_one_line(tmp_path):
    run = on_two("tests/test_ranks.py", "one_is_killed", tmp_path)
    assert run.returncode != 0
    [line] = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert "was killed" in line


def one_is_killed(path: Path) -> None:
    ranks.start("cpu")
    ranks.barrier()
    signal.signal(signal.SIGTERM, lambda *_: None)
    if ranks.rank():
        os.kill(os.getpid(), signal.SIGKILL)
    ranks.barrier()


def one_fails(path: Path) -> None:
    ranks.start("cpu")
    ranks.barrier()
    signal.signal(signal.SIGTERM, lambda *_: None)  # as during training, where it asks for a checkpoint first
    if ranks.rank():
        raise InputError("no bread")
    while True:                                              # as in a library that waits for the other rank
        time.sleep(1)


def first_fails(path: Path) -> None:
    ranks.start("cpu")

    def fail():
        raise InputError("no bread")
    ranks.on_first(fail)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(),
                    reason="finds the ranks' processes as Linux lists them")
def test_signals_save_a_sharded_run_once_and_it_goes_on_bit_for_bit(world):
    path, flags = world
    flags = [*flags, "--train", "full", "--epochs", "6", "--shard"]
    assert on_two("clo.py", *flags).returncode == 0
    flags = changed(flags, "--out", path / "stopped")
    metrics, step = path / "stopped" / "clo" / "metrics.jsonl", 0
    for number, to_rank, code in ((signal.SIGTERM, False, None), (signal.SIGINT, True, 130)):
        process, lines = start(*TORCHRUN, "clo.py", *flags), step + 3
        assert wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") > lines, process)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[1]) if to_rank else process.pid, number)
        out, err = process.communicate(timeout=120)
        assert process.returncode != 0 and out.count(f"stopped by signal {int(number)}") == 1
        assert (code is None
                or re.search(rf"exitcode *: {code} ", err))      # of the first rank that torchrun saw leave
        assert step == 0 or f"resuming at step {step} of 24" in out
        step = int(runs.checkpoints(path / "stopped" / "clo" / "checkpoint")[-1].name[5:])
    three = finished(*TORCHRUN[:-1], "3", "clo.py", *flags)
    assert (three.returncode != 0
            and sum("written by 2 ranks" in line for line in three.stderr.splitlines()) == 1)
    last = on_two("clo.py", *flags)
    assert last.returncode == 0 and f"resuming at step {step} of 24" in last.stdout
    assert results(path / "stopped") == results(path / "run")


# ---- resuming

@pytest.mark.slow
@pytest.mark.parametrize("flags, kills", [(["--method", "sft+dpo", "--lora-rank", "96"], 4),
                                          (["--train", "full", "--shard"], 2)])
def test_kills_at_any_moment_and_during_a_checkpoint_change_nothing(world, flags, kills):
    path, common = world
    flags, draw = [*common, *flags, "--epochs", "3", "--save-every", "1"], random.Random(0)
    launch = [*TORCHRUN, "clo.py"] if "--shard" in flags else [sys.executable, "clo.py"]
    assert finished(*launch, *flags).returncode == 0
    flags, run, halves = changed(flags, "--out", path / "killed"), path / "killed", 0
    for attempt in range(kills):
        process = start(*launch, *flags)
        if attempt % 3 == 2:
            wait_until(lambda: found(run, ""), process)
            time.sleep(draw.random())
        else:                                    # at the writing of a checkpoint, each time of another step
            wait_until(lambda: found(run, f"step-*{(4 * attempt + 1) % 10}.tmp"), process)
        kill(process)
        halves += any(found(run, "step-*.tmp"))
    assert halves, "no kill fell into the writing of a checkpoint"
    again = finished(*launch, *flags)
    assert again.returncode == 0, again.stderr[-3000:]
    assert not list(run.rglob("*.tmp")) and results(run) == results(path / "run")


def found(run: Path, name: str) -> list[Path]:
    """What is in the checkpoint directories of a run,
    without looking into what may be gone the next moment."""
    return [path for stage in ("*", "*/*") for path in run.glob(f"{stage}/checkpoint/{name}")]


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to it and to the ranks that it started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    for child in children.read_text().split() if children.exists() else ():
        os.kill(int(child), signal.SIGKILL)
    process.kill()
    process.communicate()


def forget_the_end(run: Path) -> None:
    """As if the run had been killed while its last step's checkpoint was there and nothing else."""
    (run / "clo" / "result.json").unlink()
    shutil.rmtree(run / "clo" / "adapter")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


DAMAGE = {"cut short": lambda path: cut(path / "state-0-of-1.safetensors"),
          "without its tensors": lambda path: (path / "state-0-of-1.safetensors").unlink(),
          "empty": lambda path: (path / "state-0-of-1.safetensors").write_bytes(b""),
          "of another model": lambda path: shutil.copyfile(path.parents[2] / "other",
                                                           path / "state-0-of-1.safetensors")}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_gives_the_same_end(world, capsys, damage):
    path, flags = world
    flags = [*flags, "--save-every", "2", "--epochs", "1"]
    clo.main(flags)
    expected = results(path / "run")
    runs.save_tensors(path / "run" / "other", {"weight.x": torch.ones(1)})
    newest = runs.checkpoints(path / "run" / "clo" / "checkpoint")[-1]
    DAMAGE[damage](newest)
    (path / "run" / "clo" / "checkpoint" / "step-000004.tmp").mkdir()
    forget_the_end(path / "run")
    capsys.readouterr()
    clo.main(flags)
    out = capsys.readouterr().out
    assert (out.count("checkpoint passed over") == 1 and newest.name in out
            and "resuming at step 2 of 4" in out)
    (path / "run" / "other").unlink()
    assert results(path / "run") == expected


@pytest.mark.parametrize("left", ["", "\0" * 9 + "\n"])
def test_lines_that_a_power_failure_took_are_written_again_from_the_checkpoint_before(world, capsys, left):
    path, flags = world
    flags = [*flags, "--save-every", "2", "--epochs", "1"]
    clo.main(flags)
    expected, metrics = results(path / "run"), path / "run" / "clo" / "metrics.jsonl"
    forget_the_end(path / "run")
    metrics.write_text("".join(metrics.read_text().splitlines(True)[:4]) + left)
    capsys.readouterr()
    with pytest.raises(InputError) as error:
        clo.main(flags)
    shutil.rmtree(re.search("delete (.*) to go on", str(error.value))[1])
    clo.main(flags)
    assert "resuming at step 2 of 4" in capsys.readouterr().out
    assert results(path / "run") == expected


def test_the_same_command_goes_on_and_says_its_step(world, capsys):
    path, flags = world
    flags = [*flags, "--epochs", "1"]
    clo.main(flags)
    forget_the_end(path / "run")
    clo.main([*flags, "--save-every", "1"])                                  # which decides nothing
    assert "clo: resuming at step 4 of 4" in capsys.readouterr().out
    steps = [line.get("seconds", 0) for line in map(json.loads, open(path / "run" / "clo" / "metrics.jsonl"))]
    assert read_json(path / "run" / "clo" / "result.json")["train_seconds"] > sum(steps) > 0
    fails(capsys, changed(flags, "--lr", "0.5"), "lr = 0.01", "0.5")


def test_a_finished_run_is_merged_without_training_again(world, capsys):
    path, flags = world
    flags = [*flags, "--epochs", "1"]
    clo.main(flags)
    shutil.rmtree(path / "run" / "clo" / "checkpoint")                       # as the run says that one may
    clo.main([*flags, "--merge"])
    told, merged = capsys.readouterr().out, path / "run" / "clo" / "model"
    assert "clo: done before" in told and f"{merged}: written, loaded again" in told
    clo.main(changed([*flags, "--merge"], "--out", path / "at once"))
    for name, weight in load_file(path / "at once" / "clo" / "model" / "model.safetensors").items():
        assert torch.equal(weight, load_file(merged / "model.safetensors")[name])
    clo.main([*flags, "--merge"])
    assert capsys.readouterr().out.count("loaded again") == 2                # of "at once", and no other


# ---- nothing but seed and data decides

def test_the_same_seed_gives_the_same_run_bit_for_bit_and_another_one_does_not(world):
    path, flags = world
    for name, seed in (("run", 0), ("again", 0), ("other", 1)):
        clo.main([*changed(flags, "--out", path / name), "--epochs", "1", "--seed", str(seed)])
    assert results(path / "run") == results(path / "again") != results(path / "other")


def test_the_order_of_samples_within_a_step_changes_nothing(checkpoint):
    groups, found = groups_of(checkpoint), []
    for order in (groups, groups[::-1], groups[3:] + groups[:3]):
        model = llama.load(checkpoint, dtype=torch.float64)
        recorder = Recorder(clo.make_trainable(model, "attention", 4, 8, seed=0))
        [step] = data.make_steps(order, CLO, data.Packing(10, 96), None)
        for batch in step:
            batch.ref_logp = llama.continuation_logps(model, batch).detach()
        result = clo.train_step(model, step, CLO, recorder, 1e9)
        found.append((len(step), result["loss"].item(), list(recorder.gradients.values())))
    for _, loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][1], abs=1e-10)
        for one, two in zip(gradient, found[0][2]):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-10)


if __name__ == "__main__":
    parts = {part.__name__: part
             for part in (shared_model, memory_of_loading, one_fails, one_is_killed, first_fails)}
    ranks.run(lambda: parts[sys.argv[1]](Path(sys.argv[2])))


@pytest.mark.parametrize("given, expected", [
    ({}, "expandable_segments:True"), ({"PYTORCH_ALLOC_CONF": "backend:native"}, "backend:native"),
    ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, None)])
def test_cudas_memory_grows_in_place_unless_the_user_says_otherwise(given, expected, monkeypatch):
    """Set before CUDA is touched for the first time, which is where the device is picked."""
    monkeypatch.setattr(ranks.os, "environ", dict(given))
    ranks.pick_device("cpu")
    assert ranks.os.environ.get("PYTORCH_ALLOC_CONF") == expected
