"""runs.py: what may be deleted, what a kill or a full disk leaves, and damaged files of a run."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine import runs
from engine.files import InputError, write_json

FLAGS = {"seed": 0, "model": "nowhere/base", "data": "nowhere/rows.jsonl"}


CHOSEN = {"dtype": "fp32", "micro_rows": 1}


def begin(directory, fresh=False, inputs=None, chosen=CHOSEN, **flags):
    return runs.claim_run(directory, FLAGS | flags, inputs or {"data": "1"}, chosen, fresh)[0]


def refused(*words, **keywords):
    """InputError of one line with all these words."""
    return pytest.raises(InputError, match=r"\A(?=.*" + ")(?=.*".join(words) + r")[^\n]*\Z", **keywords)


def tree(directory: Path) -> dict:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# ---- signals

def test_a_second_ctrl_c_stops_at_once_and_a_second_of_another_kind_does_not(monkeypatch, capfd):
    monkeypatch.delenv("RANK", raising=False)
    with runs.StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.number == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        monkeypatch.setenv("RANK", "0")                            # torchrun passes on what a terminal sent to all
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.number == signal.SIGINT
    assert "Ctrl-C again stops at once" in capfd.readouterr().err
    with runs.StopSignal():
        os.kill(os.getpid(), signal.SIGTERM)
    assert "torchrun kills what has not saved within its --shutdown-timeout" in capfd.readouterr().err


# ---- the directory

def test_fresh_renames_the_old_run_aside_and_says_so(tmp_path, capsys):
    run = begin(tmp_path / "run")
    (run / "clo").mkdir()
    (run / "clo" / "result.json").write_text("{}")
    (tmp_path / "run.old-1").mkdir()
    before = {path.relative_to(run): content for path, content in tree(run).items()}
    begin(run, fresh=True, beta=2)
    assert [path.name for path in run.iterdir()] == ["config.json"]
    aside = tmp_path / "run.old-2"
    assert {path.relative_to(aside): content for path, content in tree(aside).items()} == before
    assert f"{run} is now {aside}" in capsys.readouterr().out


def test_a_run_that_had_nothing_yet_makes_room_for_a_corrected_command(tmp_path):
    begin(tmp_path, beta=1)
    begin(tmp_path, beta=2)
    (tmp_path / "translated-sw.jsonl").write_text("")
    with refused("belongs to a run with beta = 2, now it is 1"):
        begin(tmp_path, beta=1)
    assert json.loads((tmp_path / "config.json").read_text())["flags"]["beta"] == 2


def test_a_changed_file_is_named_by_the_flag_and_the_file(tmp_path):
    run = begin(tmp_path / "run", inputs={"data": "1", "tokenizer": "2"})
    (run / "translated-sw.jsonl").write_text("")
    with refused("the contents of nowhere/rows.jsonl changed"):
        begin(run, inputs={"data": "3", "tokenizer": "2"})
    with refused("the contents of the tokenizer of nowhere/base changed"):
        begin(run, inputs={"data": "1", "tokenizer": "4"})


def test_a_run_that_goes_on_keeps_what_it_chose_when_it_began(tmp_path):
    run = begin(tmp_path / "run", chosen={"dtype": "bf16", "micro_rows": 4})
    (run / "translated-sw.jsonl").write_text("")
    assert runs.claim_run(run, FLAGS, {"data": "1"}, CHOSEN)[1] == {"dtype": "bf16", "micro_rows": 4}


FOREIGN = {"a model's": json.dumps({"model_type": "llama", "hidden_size": 16}), "a list": "[]",
           "no flags": json.dumps({"flags": None, "inputs": {}, "versions": {}}), "empty": "",
           "cut short": '{"flags": {"seed"', "deep": "[" * 100_000}


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("text", FOREIGN.values(), ids=FOREIGN)
def test_a_config_that_is_not_a_runs_keeps_its_directory_from_fresh(tmp_path, text, fresh):
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    before = tree(tmp_path)
    with refused("config.json", "choose another --out"):
        begin(tmp_path, fresh)
    assert tree(tmp_path) == before


def test_a_directory_named_config_json_is_refused(tmp_path):
    (tmp_path / "config.json").mkdir()
    with refused("config.json", "choose another --out"):
        begin(tmp_path, fresh=True)


@pytest.mark.parametrize("name", runs.READ)
@pytest.mark.parametrize("below", ["", "clo/model"])
def test_fresh_spares_what_the_new_run_reads(tmp_path, name, below):
    begin(tmp_path / "run")
    (tmp_path / "run" / below).mkdir(parents=True, exist_ok=True)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    before = tree(tmp_path)
    with refused("--fresh would move", "choose another --out"):
        begin(tmp_path / "run", fresh=True, **{name: str(tmp_path / "link" / below)})
    assert tree(tmp_path) == before


def test_a_file_as_run_directory_is_refused(tmp_path):
    (tmp_path / "run").write_text("mine")
    for fresh in (False, True):
        with refused(str(tmp_path / "run"), "choose another --out"):
            begin(tmp_path / "run", fresh)
    assert (tmp_path / "run").read_text() == "mine"


def test_a_kill_while_the_config_is_written_leaves_a_directory_to_begin_in(tmp_path):
    (tmp_path / "config.json.tmp").write_text('{"flags"')
    begin(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


# ---- checkpoints

def trained(steps: int = 1):
    parameters = {"w": torch.nn.Parameter(torch.zeros(3))}
    optimizer = torch.optim.AdamW(parameters.values(), fused=False)
    for _ in range(steps):
        parameters["w"].grad = torch.ones(3)
        optimizer.step()
    return parameters, optimizer


def saved(directory: Path, *steps: int) -> Path:
    for step in steps:
        runs.save_checkpoint(directory, step, *trained(step))
    return directory


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("tensors", [{}, {"weight.w": torch.zeros(3)}, {"weight.v": torch.zeros(3)}])
def test_a_checkpoint_without_all_of_its_tensors_is_passed_over(tmp_path, capsys, tensors):
    saved(tmp_path, 2, 4)
    save_file(tensors, tmp_path / "step-000004" / "state-0-of-1.safetensors")
    parameters, optimizer = trained()
    assert runs.load_checkpoint(tmp_path, parameters, optimizer) == 2
    assert torch.equal(parameters["w"], trained(2)[0]["w"])
    assert "passed over" in capsys.readouterr().out


def test_when_every_checkpoint_is_damaged_the_beginning_is_said(tmp_path, capsys):
    for step in (2, 4):
        saved(tmp_path, step)
        (tmp_path / f"step-{step:06d}" / "state-0-of-1.safetensors").write_bytes(b"cut short")
    assert runs.load_checkpoint(tmp_path, *trained()) == 0
    newer, older = capsys.readouterr().out.splitlines()
    assert "going back to the one before: " in newer and "step-000004 is damaged" in newer
    assert "the training begins anew: " in older and "step-000002 is damaged" in older


def test_what_is_named_almost_like_a_checkpoint_is_left_alone(tmp_path):
    saved(tmp_path, 2)
    for name in ("step-abc9", "step-1e9", "step-000002-mine"):
        shutil.copytree(tmp_path / "step-000002", tmp_path / name)
    assert runs.load_checkpoint(tmp_path, *trained()) == 2
    saved(tmp_path, 4, 6)
    assert names(tmp_path) == ["step-000002-mine", "step-000004", "step-000006", "step-1e9", "step-abc9"]


def test_a_file_in_the_place_of_a_checkpoint_is_passed_over_and_replaced(tmp_path, capsys):
    saved(tmp_path, 2)
    (tmp_path / "step-000004").write_text("no directory")
    assert runs.load_checkpoint(tmp_path, *trained()) == 2 and "step-000004" in capsys.readouterr().out
    saved(tmp_path, 4)
    assert runs.load_checkpoint(tmp_path, *trained()) == 4
    assert names(tmp_path) == ["step-000002", "step-000004"]


@pytest.mark.parametrize("finish", [lambda path: runs.load_checkpoint(path, *trained()),
                                    lambda path: saved(path, 6)], ids=["load", "save"])
def test_what_a_killed_deletion_left_goes_at_the_next_load_or_save(tmp_path, finish):
    saved(tmp_path, 4, 6)
    (tmp_path / "step-000002").mkdir()
    (tmp_path / "step-000003.old").mkdir()
    (tmp_path / "step-000005.tmp").mkdir()
    finish(tmp_path)
    assert names(tmp_path) == ["step-000004", "step-000006"]


def test_a_checkpoint_passed_over_does_not_outlive_the_next_one(tmp_path):
    saved(tmp_path, 2, 9)
    (tmp_path / "step-000009" / "state-0-of-1.safetensors").unlink()
    assert runs.load_checkpoint(tmp_path, *trained()) == 2
    saved(tmp_path, 4)
    assert names(tmp_path) == ["step-000002", "step-000004"]


def test_a_full_disk_is_one_line_and_keeps_the_checkpoint_before(tmp_path, full_disk):
    saved(tmp_path, 2)
    with full_disk(100), refused("step-000004 cannot be written", "make room"):
        saved(tmp_path, 4)
    assert runs.load_checkpoint(tmp_path, *trained()) == 2
    saved(tmp_path, 4)
    assert runs.load_checkpoint(tmp_path, *trained()) == 4


# ---- other files

def test_a_step_whose_line_finds_no_room_names_the_file(tmp_path, full_disk):
    log = runs.MetricsLog(tmp_path, 0)
    log.write({"step": 0})
    with full_disk(20), refused("metrics.jsonl cannot be written", "make room"):
        log.write({"step": 1})


WHOLE = [b'{"step": 0}', b'{"step": 1}', b'{"step": 2}']


@pytest.mark.parametrize("after", [b"", b'{"step": 3}\n{"st', b"\xff", b"5\n{}\n"])
def test_lines_past_the_checkpoint_are_dropped(tmp_path, after):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join(WHOLE) + b"\n" + after)
    runs.truncate_metrics(path, 2)
    assert path.read_bytes() == b"\n".join(WHOLE) + b"\n"
    runs.truncate_metrics(path, 0)
    assert path.read_bytes() == b""


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("line", [b"", b'{"st', b"\xff\xfe", b"5", b"[]", b'"step"', b"null", b"{}",
                                  b'{"step": null}', b'{"step": 7}', b"[" * 100_000, None])
def test_a_damaged_line_up_to_the_checkpoint_is_refused(tmp_path, line, number):
    path = tmp_path / "metrics.jsonl"
    lines = WHOLE[:number] + ([] if line is None else [line]) + WHOLE[number + 1:]
    path.write_bytes(b"\n".join(lines) + b"\n")
    with refused("metrics.jsonl", "--fresh"):
        runs.truncate_metrics(path, 2)
    assert path.read_bytes() == b"\n".join(lines) + b"\n"


def test_metrics_that_are_not_there_are_refused_after_a_checkpoint_alone(tmp_path):
    with refused("metrics.jsonl", f"delete {tmp_path}/checkpoint/step-000002", "--fresh"):
        runs.truncate_metrics(tmp_path / "metrics.jsonl", 2)
    runs.truncate_metrics(tmp_path / "metrics.jsonl", 0)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"heldout": {"nll_en": 1', "\0", "[" * 100_000,
                                  '{"heldout": 1, "train_seconds": 1}'])
def test_a_damaged_result_is_refused_with_the_way_out(tmp_path, text):
    path = tmp_path / "result.json"
    path.write_text(text)
    with refused("result.json is damaged", "delete it"):
        runs.read_result(path, trained=False)
    write_json(path, {"heldout": {}, "train_seconds": 0.0})
    assert runs.read_result(path, trained=False) == {"heldout": {}, "train_seconds": 0.0}


@pytest.mark.parametrize("place, config", [("adapter", "adapter_config.json"), ("model", "config.json")])
def test_a_result_whose_weights_are_gone_or_cut_is_refused_with_the_way_out(tmp_path, place, config):
    path, weights = tmp_path / "result.json", tmp_path / place / "x.safetensors"
    write_json(path, {"heldout": {}, "train_seconds": 0.0})
    with refused("has lost what was trained", "delete"):
        runs.read_result(path, trained=True)
    weights.parent.mkdir()
    save_file({"a": torch.zeros(9)}, weights)
    with refused("has lost what was trained", "delete"):
        runs.read_result(path, trained=True)
    write_json(weights.with_name(config), {})
    assert runs.read_result(path, trained=True)["train_seconds"] == 0
    weights.write_bytes(weights.read_bytes()[:-20])
    with refused("has lost what was trained", "delete"):
        runs.read_result(path, trained=True)


def test_a_result_whose_model_lost_a_shard_is_refused_with_the_way_out(tmp_path):
    path, model = tmp_path / "result.json", tmp_path / "model"
    model.mkdir()
    write_json(path, {"heldout": {}, "train_seconds": 0.0})
    for name in ("one", "two"):
        save_file({name: torch.zeros(9)}, model / f"{name}.safetensors")
    write_json(model / "config.json", {})
    write_json(model / "model.safetensors.index.json",
               {"weight_map": {"one": "one.safetensors", "two": "two.safetensors"}})
    assert runs.read_result(path, trained=True)["train_seconds"] == 0
    (model / "two.safetensors").unlink()
    with refused("has lost what was trained", "delete"):
        runs.read_result(path, trained=True)


def test_reference_log_probs_of_another_number_of_sequences_are_made_again(tmp_path):
    path = tmp_path / "key.safetensors"
    runs.save_reference(path, [torch.zeros(2), torch.zeros(1)])
    assert [len(part) for part in runs.load_reference(path, [2, 1])] == [2, 1]
    assert runs.load_reference(path, [2, 2]) is None and runs.load_reference(path, [1]) is None


def test_a_reference_is_kept_and_a_damaged_one_computed_again(tmp_path):
    sums, computed = [torch.tensor([-1.0, -2.0]), torch.tensor([-3.0])], []

    def reference():
        return runs.cached_reference(tmp_path, "key", [2, 1], lambda: computed.append(1) or sums)
    for expected in (1, 1):
        assert all(map(torch.equal, reference(), sums)) and len(computed) == expected
    (tmp_path / "reference" / "key.safetensors").write_bytes(b"cut short")
    for expected in (2, 2):
        assert all(map(torch.equal, reference(), sums)) and len(computed) == expected
