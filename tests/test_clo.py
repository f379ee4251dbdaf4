"""clo.py: the equations, what is frozen and what learns, and that nothing but the data decides the result."""

import json
import math
import os
import signal
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import clo
import data
import model as llama
from conftest import Recorder, write_checkpoint
from engine import job, runs, scale
from engine.files import InputError, fill_directory, run
from evals import heldout
from formats.chat import load_tokenizer
from formats.checkpoints import save, save_adapter
from formats.configs import Config
from formats.records import write_rows

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]
WORDS = {"en": ["the", "lion", "eats", "meat", "bird", "flies", "where", "river", "small", "old"],
         "sw": ["simba", "anakula", "nyama", "ndege", "wapi", "mto", "mdogo", "mzee", "mji", "ni"]}


def sentence(language: str, i: int, length: int) -> str:
    return " ".join(WORDS[language][(i * (k + 3) + k) % 10] for k in range(length))


def parallel_rows(n: int) -> list[dict]:
    return [{"row_id": str(i)} | {language: {"prompt": sentence(language, i, 3) + "?",
                                             "response": sentence(language, i + 1, 2 + i % 4)}
                                  for language in WORDS} for i in range(n)]


CLO, DPO = clo.Objective(0.5, ("tgt",)), clo.Objective(0.0, ())
SMALL = data.Packing(batch_size=4, row_tokens=96)


def objective(method: str) -> clo.Objective:
    return clo.Objective(*clo.METHODS[method][0])


def groups_of(checkpoint, rows: int = 10) -> list[list[data.Fork]]:
    return data.make_forks(parallel_rows(rows), load_tokenizer(checkpoint), "en", "sw", 96)[0]


def add_reference_(model, batches: list[data.Batch]) -> None:
    """The reference pass: every batch gets the summed log-probs of its continuations under the model."""
    for batch, logp in zip(batches, heldout.summed_logps(model, batches, "reference")):
        batch.ref_logp = logp


def prepared(checkpoint, packing=SMALL):
    """Model in float64, groups of forks, steps with their reference."""
    model = llama.load(checkpoint, dtype=torch.float64)
    groups = groups_of(checkpoint)
    steps = data.make_steps(groups, CLO, packing, seed=0)
    add_reference_(model, [batch for step in steps for batch in step])
    return model, groups, steps


def logp_of(model, prompt: list[int], continuation: list[int]) -> torch.Tensor:
    """The definition: one sequence by itself, log_softmax over full logits."""
    hidden = model(torch.tensor([prompt + continuation]))[0]
    logp = F.log_softmax(hidden @ model.head.T, -1)
    return sum(logp[len(prompt) - 1 + i, token] for i, token in enumerate(continuation))


# ---- the equations

def test_loss_is_the_equation_written_out():
    generator = torch.Generator().manual_seed(0)
    pc, pr, rc, rr = (torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(4))
    expected = 0.0
    for a, b, c, d in zip(pc.tolist(), pr.tolist(), rc.tolist(), rr.tolist()):
        expected -= math.log(1 / (1 + math.exp(-0.3 * ((a - c) - (b - d))))) / 5
    loss = clo.clo_loss(pc, pr, rc, rr, torch.tensor([-7.0, -2.0]), 12, beta=0.3, lam=0.25)
    assert loss.item() == pytest.approx(0.25 * 9 / 12 + 0.75 * expected, abs=1e-12)


def test_swapping_the_pair_negates_the_margin():
    pc, pr, rc, rr = torch.randn(4, 7, dtype=torch.float64)
    torch.testing.assert_close(clo.margins(pc, pr, rc, rr), -clo.margins(pr, pc, rr, rc), rtol=0, atol=0)


def test_the_loss_is_finite_for_margins_no_float_can_exponentiate():
    big = torch.tensor([1e6, -1e6])
    zero = torch.zeros(2)
    assert torch.isfinite(clo.clo_loss(big, zero, zero, zero, zero, 1, beta=1.0))


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_ipo_is_least_at_half_the_inverse_of_beta_and_simpo_shifts_dpo_by_gamma(beta):
    margin = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    best = margin[clo.preference_losses(margin, "ipo", beta).argmin()]
    assert best.item() == pytest.approx(1 / (2 * beta), abs=0.005)
    torch.testing.assert_close(clo.preference_losses(margin + clo.SIMPO_GAMMA, "simpo", beta),
                               clo.preference_losses(margin, "sigmoid", beta))


def test_anchor_counts_only_what_fell_per_token():
    policy, ref = torch.tensor([-5.0, -9.0, -2.0]), torch.tensor([-6.0, -7.0, -1.5])
    assert clo.anchor_loss(policy, ref, 10).item() == pytest.approx((2.0 + 0.5) / 10)


@pytest.mark.parametrize("flags, anchors", [
    ([], [clo.CLO_ANCHOR]), (["--anchor", "0"], [0]), (["--anchor", "2"], [2]), (["--method", "sft+dpo"], [0, 0]),
    (["--method", "dpo", "--anchor", "3"], [3])])
def test_clo_has_an_anchor_unless_another_is_asked_for_and_dpo_has_none(world, monkeypatch, flags, anchors):
    seen = {}

    class Seen(Exception):
        pass

    def stop(args, device, plan, methods):
        seen.update(methods)
        raise Seen
    monkeypatch.setattr(clo, "make_job", stop)
    with pytest.raises(Seen):
        clo.main([*world[1], *flags])
    *_, stages = seen.values()
    assert [stage.objective.anchor for stage in stages] == anchors


def test_the_anchor_pulls_the_right_english_response_up_and_nothing_else(checkpoint):
    model, groups, steps = prepared(checkpoint)
    parameters = clo.make_trainable(model, "attention", 4, 8, seed=0)
    for batch in steps[0]:
        batch.ref_logp = batch.ref_logp + 3                              # the policy lies below this reference
    recorder = Recorder(parameters)
    clo.train_step(model, steps[0], replace(DPO, anchor=1e6), recorder, math.inf)
    with torch.no_grad():
        for name, gradient in recorder.gradients.items():
            parameters[name] -= 1e-9 * gradient
    for batch in steps[0]:
        gain = (llama.continuation_logps(model, batch) - (batch.ref_logp - 3))[batch.english]
        assert (gain > 0).all()


def test_continuation_logps_are_those_of_separate_sequences(checkpoint):
    model, groups, steps = prepared(checkpoint)
    for batch in steps[0]:
        found = llama.continuation_logps(model, batch).tolist()
        expected = [logp_of(model, fork.prompt, ids).item()
                    for fork in batch.forks for ids in fork.continuations]
        assert found == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_before_training_every_reward_is_exactly_0_and_the_preference_term_is_ln_2(checkpoint, dtype):
    steps = data.make_steps(groups_of(checkpoint), DPO, SMALL, seed=0)
    model = llama.load(checkpoint, dtype=dtype)
    parameters = clo.make_trainable(model, "lora", 4, 8, seed=0)
    for step in steps:
        add_reference_(model, step)
        result = clo.train_step(model, step, DPO, Recorder(parameters), math.inf)
        assert result["rewards"].abs().max() == 0
        assert result["loss"].item() == pytest.approx(math.log(2), abs=1e-6)


# ---- pairs and stages

def test_both_directions_prefer_the_response_in_the_language_of_the_question(checkpoint):
    rows, tokenizer = parallel_rows(3), load_tokenizer(checkpoint)
    [[batch]] = data.make_steps(groups_of(checkpoint, 3), CLO, data.Packing(row_tokens=512, micro_rows=9), None)
    continuations = [(fork, ids) for fork in batch.forks for ids in fork.continuations]
    assert len(batch.chosen) == 2 * 3 and len(batch.nll) == 3
    for chosen, rejected in zip(batch.chosen, batch.rejected):
        fork, right = continuations[chosen]
        own, other = ("sw", "en") if batch.side[chosen] else ("en", "sw")
        row = rows[int(fork.row)]
        assert continuations[rejected][0] is fork
        assert tokenizer.decode(fork.prompt).endswith(row[own]["prompt"] + "\n\n### Response:\n")
        assert tokenizer.decode(right) == row[own]["response"]
        assert tokenizer.decode(continuations[rejected][1]) == row[other]["response"]
    assert all(continuations[i][0].language == "sw" for i in batch.nll)


def test_a_pair_with_equal_responses_leaves_the_preference_and_stays_in_the_nll(checkpoint):
    rows, packing = parallel_rows(2), data.Packing(row_tokens=512)
    rows[0]["sw"]["response"] = rows[0]["en"]["response"]
    groups, _ = data.make_forks(rows, load_tokenizer(checkpoint), "en", "sw", 512)
    [[batch]] = data.make_steps(groups, CLO, packing, None)
    assert len(batch.chosen) == 2 and len(batch.nll) == 2
    [[batch]] = data.make_steps(groups, DPO, packing, None)
    assert len(batch.chosen) == 2 and {fork.row for fork in batch.forks} == {"1"}


@pytest.mark.parametrize("method, languages",
                         [("sft", {"en", "sw"}), ("sft-en", {"en"}), ("sft-tgt", {"sw"})])
def test_plain_fine_tuning_reads_the_right_responses_of_its_languages_only(checkpoint, method, languages):
    groups = groups_of(checkpoint)
    batches = [batch for step in data.make_steps(groups, objective(method), SMALL, 0) for batch in step]
    assert {fork.language for batch in batches for fork in batch.forks} == languages
    assert all(len(fork.continuations) == 1 for batch in batches for fork in batch.forks)
    assert clo.Counts.of(batches).nll_tokens == sum(
        len(fork.continuations[0]) for group in groups for fork in group if fork.language in languages)


def test_with_several_targets_an_english_fork_rejects_every_translation_and_metrics_are_split_by_language(
        checkpoint):
    rows = [row | {"yo": {"prompt": row["sw"]["prompt"] + " o", "response": row["sw"]["response"] + " e"}}
            for row in parallel_rows(4)]
    tokenizer, model = load_tokenizer(checkpoint), llama.load(checkpoint, dtype=torch.float64)
    groups, _ = data.make_forks(rows, tokenizer, "en", ["sw", "yo"], 512)
    [[batch]] = data.make_steps(groups, CLO, data.Packing(row_tokens=512, micro_rows=9), None)
    assert len(batch.chosen) == 4 * 3 * 2 and len(batch.nll) == 4 * 2
    continuations = [(fork, ids) for fork in batch.forks for ids in fork.continuations]
    for fork in batch.forks:
        wrong = [continuations[j][1] for i, j in zip(batch.chosen, batch.rejected)
                 if continuations[i][0] is fork]
        others = [language for language in ("en", "sw", "yo") if language != fork.language]
        assert wrong == [tokenizer.response_ids(rows[int(fork.row)][language]["response"])
                         for language in others]
    sums = heldout.summed_logps(model, [batch], "pairs")
    found = heldout.pair_figures([batch], sums, sums, 0.5, ["sw", "yo"])
    for number, side in enumerate(["en", "tgt_sw", "tgt_yo"]):
        right = batch.right[batch.side[batch.right] == number]
        expected = -sums[0][right].sum() / batch.length[right].sum()
        assert found[f"nll_{side}"] == pytest.approx(expected.item(), rel=1e-12)
    assert found["rewards/margins_tgt"] == 0 and "rewards/margins_tgt_yo" in found


# ---- nothing but the data decides the gradient

def gradients(checkpoint, packing):
    model = llama.load(checkpoint, dtype=torch.float64)
    parameters = clo.make_trainable(model, "lora", 4, 8, seed=0)
    with torch.no_grad():
        for i, parameter in enumerate(parameters.values()):
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i),
                                            dtype=torch.float64)
    step = data.make_steps(groups_of(checkpoint), CLO, packing, None)[0]
    noise = {}
    for batch in step:                # the same made-up reference for a continuation wherever it was packed
        sums = []
        for fork in batch.forks:
            for number in range(len(fork.continuations)):
                key = (fork.row, fork.language, number)
                noise.setdefault(key, -10 - (sum(map(ord, "".join(map(str, key)))) % 17) / 4)
                sums.append(noise[key])
        batch.ref_logp = torch.tensor(sums, dtype=torch.float64)
    recorder = Recorder(parameters)
    result = clo.train_step(model, step, CLO, recorder, math.inf)
    return len(step), result["loss"].item(), list(recorder.gradients.values())


def test_micro_batching_and_row_length_change_nothing(checkpoint):
    parts, loss, whole = gradients(checkpoint, data.Packing(10, 512, 99))
    assert parts == 1
    for packing in (data.Packing(10, 96, 1), data.Packing(10, 96, 3), data.Packing(10, 200, 2)):
        parts, other_loss, other = gradients(checkpoint, packing)
        assert parts > 1 and other_loss == pytest.approx(loss, abs=1e-12)
        for one, two in zip(whole, other):
            torch.testing.assert_close(two, one, rtol=0, atol=1e-10)


def test_order_is_a_pure_function_of_the_seed_and_every_epoch_sees_every_step():
    order = clo.step_order(7, 21, seed=5)
    assert order == clo.step_order(7, 21, seed=5) != clo.step_order(7, 21, seed=6)
    assert all(sorted(order[i:i + 7]) == list(range(7)) for i in (0, 7, 14))
    assert clo.step_order(7, 10, seed=5) == order[:10]                 # a fraction of an epoch is its beginning


def test_learning_rate_rises_then_falls_to_nearly_0():
    rates = [clo.rate_factor(i, 50, 0.1) for i in range(50)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]) and rates[5] == 1.0
    assert all(a > b > 0 for a, b in zip(rates[5:], rates[6:])) and rates[-1] < 0.03


# ---- what learns

def test_lora_changes_nothing_at_first_and_merged_equals_unmerged(checkpoint):
    model = llama.load(checkpoint, dtype=torch.float64)
    tokens = torch.randint(300, (2, 9))
    before = model(tokens)
    clo.add_lora(model, rank=3, alpha=6, seed=1)
    assert torch.equal(model(tokens), before)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = torch.randn(parameter.shape, dtype=torch.float64)
    after = model(tokens)
    assert not torch.allclose(after, before)
    names = {name for name, _ in clo.merge_lora(model).named_parameters()}
    assert names == {name for name, _ in llama.load(checkpoint).named_parameters()}
    torch.testing.assert_close(model(tokens), after, rtol=0, atol=1e-10)


@pytest.mark.parametrize("mode, part", [("lora", ".lora_"), ("attention", ".self_attn."), ("full", "")])
def test_only_the_chosen_weights_learn_and_the_frozen_stay_bit_equal(tmp_path, mode, part):
    path = write_checkpoint(tmp_path, model_type="qwen2", qkv_bias=True)
    model, groups, steps = prepared(path)
    before = {name: parameter.clone()
              for name, parameter in llama.load(path, dtype=torch.float64).named_parameters()}
    parameters = clo.make_trainable(model, mode, 4, 8, seed=0)
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    for step in steps:
        clo.train_step(model, step, CLO, optimizer, math.inf)
    assert parameters and all(part in name for name in parameters)
    for name, parameter in model.named_parameters():
        if name in parameters:
            assert not torch.equal(parameter, start[name]), name
        else:
            assert torch.equal(parameter, before[name]) and parameter.grad is None, name


def test_trainables_are_fp32_under_bf16_compute(checkpoint):
    model = llama.load(checkpoint, dtype=torch.bfloat16)
    parameters = clo.make_trainable(model, "attention", 4, 8, seed=0)
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if n not in parameters} == {torch.bfloat16}
    assert model(torch.tensor([[1, 2, 3]])).dtype == torch.bfloat16


def test_the_adapter_gives_peft_and_our_loader_the_same_logits(checkpoint, tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    model = clo.add_lora(llama.load(checkpoint), rank=4, alpha=12, seed=2)
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            parameter.data = torch.randn(parameter.shape)
    fill_directory(tmp_path / "adapter", lambda path: save_adapter(
        model, path, str(checkpoint), clo.ATTENTION, 4, 12, ""))
    tokens = torch.randint(300, (2, 12))
    ours = model(tokens) @ model.head.T
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(checkpoint), tmp_path / "adapter")
    torch.testing.assert_close(theirs(tokens).logits, ours, rtol=0, atol=1e-4)
    loaded = llama.load(checkpoint, adapter=tmp_path / "adapter")
    torch.testing.assert_close(loaded(tokens) @ loaded.head.T, ours, rtol=0, atol=1e-4)


# ---- the whole command on a tiny world

@pytest.fixture
def world(tmp_path):
    """A checkpoint, parallel training rows, and evaluation rows with splits; no translator needed."""
    checkpoint = write_checkpoint(tmp_path / "base")
    rows = parallel_rows(24)
    write_rows(tmp_path / "rows.jsonl", rows[:16])
    write_rows(tmp_path / "eval.jsonl", [row | {"split": "validation" if i % 2 else "test"}
                                              for i, row in enumerate(rows[16:])])
    return tmp_path, ["--model", str(checkpoint), "--data", str(tmp_path / "rows.jsonl"),
                      "--out", str(tmp_path / "run"), "--lang", "sw", "--row-tokens", "200",
                      "--max-new-tokens", "6", "--lr", "1e-2", "--device", "cpu"]


def command(flags, **keywords):
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    return subprocess.run([sys.executable, "clo.py", *flags], cwd=ROOT, env=environment,
                          capture_output=True, text=True, **keywords)


def without_times(path: Path) -> list[dict]:
    drop = {"seconds", "tokens_per_second", "peak_memory_gb"}
    return [{key: value for key, value in json.loads(line).items() if key not in drop}
            for line in path.read_text().splitlines()]


def test_a_run_leaves_the_report_the_adapters_and_the_metrics(world, capsys):
    path, flags = world
    clo.main(flags)
    report = json.loads((path / "run" / "report.json").read_text())
    assert (report["lang"], report["samples"], report["seed"]) == ("sw", 16, 0)
    assert list(report["methods"]) == ["base", "sft", "clo"]
    for scores in report["methods"].values():
        assert scores["en"]["n"] == scores["sw"]["n"] == 4 and scores["train_seconds"] >= 0
    assert report["methods"]["base"]["heldout"]["rewards/margins_en"] == 0
    lines = without_times(path / "run" / "clo" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(5))
    assert lines[1]["rewards/margins_tgt"] == 0 and lines[-1]["rewards/margins_tgt"] > 0
    assert {"nll_en", "nll_tgt", "rewards/accuracies_en", "logps/chosen_tgt"} <= lines[-1].keys()
    held_out = report["methods"]["clo"]["heldout"]["rewards/margins_tgt"]                  # and the last step's own
    assert lines[-1]["eval_rewards/margins_tgt"] == pytest.approx(held_out) != lines[-1]["rewards/margins_tgt"]
    assert load_file(path / "run" / "clo" / "adapter" / "adapter_model.safetensors")
    out = capsys.readouterr().out
    assert "python eval.py ask --adapter" in out and "±" in out
    clo.main(flags)                                           # a finished run is read back, not trained again
    assert "done before" in capsys.readouterr().out
    assert json.loads((path / "run" / "report.json").read_text()) == report


@pytest.mark.parametrize("flags", [
    ["--method", "sft+dpo", "--baseline", "none"], ["--method", "dpo", "--baseline", "sft-tgt"],
    ["--train", "attention", "--baseline", "none"], ["--train", "full", "--baseline", "sft-en"],
    ["--preference", "ipo", "--baseline", "none", "--anchor", "1"],
    ["--preference", "simpo", "--beta", "2", "--baseline", "none"]])
def test_every_method_and_mode_runs_to_its_report(world, flags):
    path, common = world
    clo.main(common + flags)
    method = flags[flags.index("--method") + 1] if "--method" in flags else "clo"
    assert method in json.loads((path / "run" / "report.json").read_text())["methods"]
    if "--train" in flags:
        trained, base = (llama.load(p) for p in (path / "run" / "clo" / "model", path / "base"))
        assert (torch.equal(trained.model["norm"].weight, base.model["norm"].weight)
                == (flags[1] == "attention"))
        assert load_tokenizer(path / "run" / "clo" / "model").stop_ids


@pytest.mark.slow
def test_one_adapter_learns_several_languages(world, capsys):
    path, flags = world
    rows, out = parallel_rows(20), path / "several"
    for i, row in enumerate(rows):
        row["yo"] = {part: " ".join(reversed(text.split())) for part, text in row["sw"].items()}
        row["split"] = "validation" if i % 2 else "test"
    write_rows(path / "three.jsonl", rows[:12])
    write_rows(path / "asked.jsonl", rows[12:])
    flags = changed(changed(flags, "--lang", "yo,sw"), "--out", out)
    clo.main(changed(flags, "--data", path / "three.jsonl")
             + ["--eval-data", str(path / "asked.jsonl"), "--baseline", "none"])
    report = json.loads((out / "report.json").read_text())
    assert report["lang"] == "yo,sw" and set(report["methods"]["clo"]) >= {"en", "sw", "yo", "heldout"}
    line = json.loads((out / "clo" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"nll_en", "nll_tgt", "nll_tgt_yo", "nll_tgt_sw", "rewards/margins_tgt_yo"} <= line.keys()
    assert {answer["language"] for answer in line["answers"]} == {"en", "yo", "sw"}
    assert "held-out, step 0: nll" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_leaves_with_its_code(world, number, code):
    path, flags = world
    process = subprocess.Popen([sys.executable, "clo.py", *flags, "--baseline", "none", "--epochs", "200"],
                               cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = path / "run" / "clo" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 3):
        time.sleep(0.01)
    process.send_signal(number)
    out, said = process.communicate(timeout=60)
    assert process.returncode == code and "saved" in out
    assert f"signal {int(number)}: stopping after the running step" in said
    assert list((path / "run" / "clo" / "checkpoint").glob("step-*"))


@pytest.mark.slow
def test_two_ranks_give_what_one_gives(world):
    path, flags = world
    flags = flags + ["--dtype", "fp64", "--row-tokens", "200", "--epochs", "1"]
    assert command(flags).returncode == 0
    two = changed(flags, "--out", path / "two")
    run = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                          "--nproc-per-node", "2", "clo.py", *two], cwd=ROOT,
                         env=dict(os.environ, OMP_NUM_THREADS="1"), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count("Talk to it") == 1                        # the first rank alone speaks
    for method in ("sft", "clo"):
        one, other = (load_file(path / name / method / "adapter" / "adapter_model.safetensors")
                      for name in ("run", "two"))
        for key in one:
            torch.testing.assert_close(other[key], one[key], rtol=0, atol=1e-7)       # written as fp32
        for a, b in zip(*(without_times(path / name / method / "metrics.jsonl") for name in ("run", "two"))):
            assert a.keys() == b.keys()
            assert a.pop("answers", None) == b.pop("answers", None)
            assert all(b[key] == pytest.approx(a[key], abs=1e-10) for key in a)


# ---- bad input: one line, exit code 2, nothing half-written

def fails(capsys, flags, *wanted):
    with pytest.raises(SystemExit) as error:
        run(lambda: clo.main(flags))
    assert error.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ") and all(part in line for part in wanted), line


def changed(flags, name, value):
    flags = list(flags)
    flags[flags.index(name) + 1] = str(value)
    return flags


def test_bad_input_is_one_line_and_exit_code_2(world, capsys):
    path, flags = world
    (path / "bad.jsonl").write_text('{"en": {"prompt": "a", "response": "b"}}\n{"en": {"prompt"\n')
    fails(capsys, changed(flags, "--data", path / "bad.jsonl"), "bad.jsonl:2")
    fails(capsys, changed(flags, "--data", path / "none.jsonl"), "none.jsonl")
    fails(capsys, changed(flags, "--model", path / "nowhere"), "nowhere")
    fails(capsys, changed(flags, "--device", "abacus"), "abacus")
    (path / "locked").write_text("a file")
    fails(capsys, changed(flags, "--out", path / "locked" / "run"), "locked")
    (path / "full").mkdir()
    (path / "full" / "thesis.txt").write_text("mine")
    fails(capsys, changed(flags, "--out", path / "full"), "not empty")
    assert (path / "full" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("flag, value", [("--out", "/"), ("--out", "/proc/nowhere/run"), ("--data", ""),
                                         ("--data", "/"), ("--eval-data", "nowhere.jsonl")])
def test_a_path_that_cannot_be_used_is_one_line(world, capsys, flag, value):
    _, flags = world
    fails(capsys, [*flags, flag, value], value)


def test_an_eval_file_that_nobody_named_and_that_lacks_the_language_is_said_and_not_used(world, capsys):
    path, flags = world
    write_rows(path / "eval.jsonl", [{"row_id": row["row_id"], "en": row["en"], "yo": row["sw"]}
                                     for row in parallel_rows(4)])
    clo.main([*flags, "--baseline", "none"])
    out = capsys.readouterr().out
    assert "no row of it holds en and sw: it is not used" in out and "it is used" not in out
    assert json.loads((path / "run" / "config.json").read_text())["flags"]["eval_data"] is None


def test_a_data_set_known_by_name_takes_no_eval_file_of_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "eval.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)
    assert clo.parse_args(["--lang", "sw", "--data", "oasst1"]).eval_data is None


def test_more_rates_than_a_method_has_stages_are_refused(capsys):
    assert clo.parse_args(["--lang", "sw", "--method", "sft+dpo", "--lr", "1e-3,1e-5"]).lr == "0.001,1e-05"
    with pytest.raises(SystemExit):
        clo.parse_args(["--lang", "sw", "--lr", "1e-3,1e-5"])
    assert "--lr 0.001,1e-05: one rate, or one for each stage, was" in capsys.readouterr().err


@pytest.mark.parametrize("question", ["--help", "\n\n- What `pwd` is"])
def test_the_line_that_talks_to_the_result_runs_where_the_run_was_started(world, monkeypatch, capsys, question):
    path, flags = world
    rows = parallel_rows(4)
    rows[0]["sw"]["prompt"] = question
    write_rows(path / "eval.jsonl", rows)
    monkeypatch.chdir(path)
    clo.main([*flags, "--baseline", "none", "--system-prompt", "Be `brief`"])
    line = capsys.readouterr().out.rstrip().splitlines()[-1]
    asked = subprocess.run(line.replace("python", sys.executable, 1), shell=True, cwd=path,
                           capture_output=True, text=True)
    assert asked.returncode == 0 and "usage" not in asked.stdout and asked.stdout.strip()
    assert shlex.split(line)[-1] == question.strip() and "Be `brief`" in shlex.split(line)


def test_a_run_goes_on_from_another_directory(monkeypatch, tmp_path, capsys):
    flags = ["--lang", "sw", "--samples", "2", "--answers", "1", "--holdout", "1", "--baseline", "none",
             "--max-new-tokens", "2", "--out", str(tmp_path / "run")]
    clo.main(flags)
    monkeypatch.chdir(tmp_path)
    clo.main(flags)
    assert "going on where it stopped" in capsys.readouterr().out


def test_a_language_nobody_has_is_refused_with_those_there_are(world, capsys):
    path, flags = world
    write_rows(path / "english.jsonl",
                    [{"row_id": row["row_id"], "en": row["en"]} for row in parallel_rows(6)])
    flags = changed(changed(flags, "--data", path / "english.jsonl"), "--lang", "xx")
    (path / "eval.jsonl").unlink()
    fails(capsys, flags + ["--translator", str(path / "nowhere")], "nowhere")
    fails(capsys, flags + ["--translator", str(ROOT / "demo" / "m2m100")],
          "xx", "hold en", "de, id, ko, sw, yo, zh")
    assert not (path / "run").exists()


def test_a_tokenizer_of_another_model_is_refused(world, capsys):
    path, flags = world
    config = json.loads((path / "base" / "config.json").read_text())
    small = llama.initialise_(llama.Llama(Config(200, 16, 24, 2, 4, 2, 6, tie_word_embeddings=True)))
    save(small, path / "base")
    assert config["vocab_size"] > 200
    fails(capsys, flags, "do not belong together")


def test_fewer_rows_than_were_asked_for_are_told(world, capsys):
    clo.main([*world[1], "--samples", "99", "--dry-run"])
    assert "--samples 99: there are 16 rows to train on, all of them are taken" in capsys.readouterr().out
    clo.main([*world[1], "--samples", "16", "--dry-run"])
    assert "--samples" not in capsys.readouterr().out


def test_a_beta_too_weak_for_simpo_is_told(world, capsys):
    flags = [*world[1], "--preference", "simpo", "--baseline", "none", "--dry-run"]
    clo.main(flags)
    assert f"clo: --beta {clo.BETA:g} hardly makes simpo prefer anything" in capsys.readouterr().out
    for quiet in (["--beta", "2"], ["--method", "sft"]):
        clo.main([*flags, *quiet])
        assert "makes simpo" not in capsys.readouterr().out


def test_a_dry_run_whose_first_rows_have_no_pair_ends_with_a_guess(world, capsys, monkeypatch):
    path, flags = world
    rows = [row | {"sw": row["sw"] | {"response": row["en"]["response"]}} for row in parallel_rows(3)]
    write_rows(path / "rows.jsonl", [{key: row[key] for key in ("row_id", "en")} for row in rows])
    monkeypatch.setattr(job.translate, "translator_for", lambda *_: None)
    monkeypatch.setattr(job.translate, "translate_rows", lambda *_, **__: rows)
    clo.main([*flags, "--method", "dpo", "--baseline", "none", "--dry-run"])
    assert "dpo, stage dpo: 3 rows" in capsys.readouterr().out


def test_a_run_directory_of_another_run_is_refused_by_its_first_difference(world, capsys):
    path, flags = world
    clo.main(flags + ["--baseline", "none"])
    report = (path / "run" / "report.json").read_bytes()
    fails(capsys, flags + ["--baseline", "none", "--beta", "0.25"], "beta", str(clo.BETA), "0.25", "--fresh")
    write_rows(path / "rows.jsonl", parallel_rows(12))
    fails(capsys, flags + ["--baseline", "none"], "data", "--fresh")
    assert (path / "run" / "report.json").read_bytes() == report


def test_translations_that_change_before_a_run_goes_on_are_refused_once_something_rests_on_them(
        world, capsys, monkeypatch):
    path, flags = world
    flags, reply, run = [*flags, "--baseline", "none", "--epochs", "1"], ["ndiyo"], path / "run"
    write_rows(path / "rows.jsonl", [{key: row[key] for key in ("row_id", "en")} for row in parallel_rows(8)])

    def translate_rows(rows, *_, **__):
        return [{"sw": {"prompt": "nini?", "response": reply[0]}} | row for row in rows]
    monkeypatch.setattr(job.translate, "translator_for", lambda *_: None)
    monkeypatch.setattr(job.translate, "translate_rows", translate_rows)
    clo.main(flags)
    (run / "clo" / "result.json").unlink()
    clo.main(flags)
    reply[0] = "hapana"
    (run / "clo" / "result.json").unlink()
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    fails(capsys, flags, "translated-sw.jsonl has changed", f"--data {run}/translated-sw.jsonl", "--out")
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before
    (run / "base" / "answers.jsonl").unlink()
    (run / "clo" / "answers.jsonl").unlink()
    runs.hold_translation(run, path, "others")                     # nothing has been done with the old ones
    assert json.loads((run / "config.json").read_text())["translation"] == "others"


def test_a_loss_that_is_not_a_number_stops_and_names_the_step(world, capsys):
    path, flags = world
    fails(capsys, changed(flags, "--lr", "1e30") + ["--baseline", "none", "--epochs", "30"],
          "at step", "--lr")
    assert not (path / "run" / "clo" / "adapter").exists()


def test_a_first_step_without_numbers_is_no_rate_s_fault():
    metrics = {"step": 1, "loss": math.nan, "grad_norm": 1.0}
    with pytest.raises(InputError, match="at step 1: stopped; .*--dtype"):
        runs.stop_unless_finite(metrics, "clo", 1e-3)
    with pytest.raises(InputError, match="at step 2: stopped; the last checkpoint is kept; .*--lr"):
        runs.stop_unless_finite(metrics | {"step": 2}, "clo", 1e-3)
    runs.stop_unless_finite(metrics | {"loss": 0.5}, "clo", 1e-3)


# ---- real data

@pytest.mark.slow
def test_clo_moves_a_real_checkpoint_into_swahili(shared, tmp_path, capsys):
    clo.main(["--lang", "sw", "--model", str(shared / "models" / "story_llama"),
              "--data", str(shared / "pairs" / "ntrex_500.jsonl"), "--samples", "400", "--baseline", "none",
              "--out", str(tmp_path / "run"), "--max-new-tokens", "4"])
    report = json.loads((tmp_path / "run" / "report.json").read_text())["methods"]
    before, after = report["base"]["heldout"], report["clo"]["heldout"]
    assert after["nll_tgt"] < before["nll_tgt"] - 0.5
    for direction in ("en", "tgt"):
        assert after[f"rewards/margins_{direction}"] > 1 and after[f"rewards/accuracies_{direction}"] > 0.8


@pytest.mark.parametrize("flags, wanted", [
    (["--row-tokens", "9"], r"rows.jsonl: no row fits into 9 tokens"),
    (["--data", "two.jsonl", "--eval-data", "test.jsonl"], "2 rows are left to train on and 0 to hold out"),
    (["--eval-data", "null.jsonl"], "null.jsonl: no row holds en and sw")])
def test_refused_input_leaves_no_run_directory(world, flags, wanted):
    path, usual = world
    rows = parallel_rows(5)
    write_rows(path / "two.jsonl", rows[:2])
    write_rows(path / "test.jsonl", [row | {"split": "test"} for row in rows[2:]])
    (path / "null.jsonl").write_text(json.dumps(rows[0] | {"sw": None}) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=wanted):
        clo.main(usual + [str(path / flag) if flag.endswith(".jsonl") else flag for flag in flags])
    assert not (path / "run").exists()


# ---- look before you train

def test_a_dry_run_tells_steps_and_samples_and_writes_nothing(world, capsys):
    path, flags = world
    before = sorted(path.rglob("*"))
    clo.main(flags + ["--dry-run", "--epochs", "3"])
    out = capsys.readouterr().out
    model = llama.load(path / "base")
    assert (f"parameters {sum(p.numel() for p in model.parameters()):,}" in out
            and "clo, stage clo: 16 rows, 6 steps" in out)
    learned = clo.make_trainable(model, "lora", 16, 32, 0)
    assert f"trainable (lora) {sum(p.numel() for p in learned.values()):,}" in out
    assert out.count("continuation 0, right") == 4 and "GB" in out
    assert sorted(path.rglob("*")) == before


def test_a_dry_run_for_other_devices_needs_a_config_alone(world, capsys):
    path, _ = world
    (path / "alone").mkdir()
    (path / "alone" / "config.json").write_bytes((path / "base" / "config.json").read_bytes())
    clo.main(["--dry-run", "--model", str(path / "alone"), "--gpus", "8", "--shard"])
    assert "each of 8 devices, sharded" in capsys.readouterr().out


# ---- what is known is not computed again, and time is read when the work is done

def test_the_untrained_model_is_scored_and_asked_once_for_all_methods(world, monkeypatch):
    passes, asked = [], []
    summed_logps, sample_answers = heldout.summed_logps, heldout.sample_answers
    monkeypatch.setattr(heldout, "summed_logps", lambda model, batches, label: (
        passes.append(label), summed_logps(model, batches, label))[1])
    monkeypatch.setattr(heldout, "sample_answers", lambda *given: (
        asked.append(1), sample_answers(*given))[1])
    clo.main([*world[1], "--epochs", "1"])
    assert passes.count("reference held-out") == 1
    assert passes.count("validate sft") == passes.count("validate clo") == 1       # after the epoch, not before
    assert len(asked) == 3                                           # untrained, after sft, after clo


def test_the_time_of_a_step_ends_after_the_wait_for_its_numbers(checkpoint):
    class Late:
        def item(self):
            time.sleep(0.05)
            return 1.0
    batches = data.make_steps(groups_of(checkpoint), CLO, SMALL, None)[0]
    pairs = sum(len(batch.chosen) for batch in batches)
    result = {"loss": Late(), "nll": Late(), "grad_norm": Late(), "rewards": torch.zeros(2, pairs),
              "logps": torch.zeros(2, pairs)}
    metrics = heldout.step_metrics(result, batches, ["sw"], time.perf_counter())
    assert metrics["seconds"] >= 0.15


# ---- a machine too small

def test_running_out_of_memory_names_the_flags_that_help():
    with pytest.raises(InputError, match="out of memory on cpu .*--micro-rows 1.*--dry-run"), \
            scale.memory_advice("cpu"):
        torch.empty(1 << 50)
    with pytest.raises(RuntimeError, match="shape"), scale.memory_advice("cpu"):
        torch.ones(2, 3) @ torch.ones(2, 3)


def test_every_flag_decides_the_result_or_is_known_not_to():
    args = clo.parse_args(["--lang", "sw"])
    free = {"out", "dry_run", "gpus", "fresh", "tensorboard", "recompute", "targets", "merge", "save_every"}
    assert set(vars(args)) == {*job.IDENTITY} | free
