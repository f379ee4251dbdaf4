"""data.py: readers, forks and packing, against other libraries or written-out answers."""

import json
import random
from pathlib import Path

import pytest

import clo
import data
from engine.files import InputError, run
from formats.records import write_rows
from test_chat import CHATML, make_tokenizer

REAL = Path(__file__).parents[2] / "shared" / "data"
real = pytest.mark.skipif(not REAL.exists(), reason="the public data are not in this checkout")


def write_json(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def sides(prompt, response):
    return {"prompt": prompt, "response": response}


@pytest.fixture(scope="module")
def chatml(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("chatml"), CHATML, None, "<|endoftext|>",
                          ["<|im_start|>", "<|im_end|>", "<tool_call>"])


# ---- command line ----

def test_the_command_line_says_bad_input_in_one_line_and_exits_with_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(lambda: data.main([str(tmp_path / "absent.jsonl")]))
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/absent.jsonl: no such file\n"


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ValueError, match="invalid literal"):
        run(lambda: int("x"))


# ---- forks and packing ----

ROWS = [{"row_id": "a", "en": sides("What?", "It is Paris."), "sw": sides("Nini?", "Ni Paris."),
         "de": sides("Was?", "Ja.")},
        {"row_id": "b", "en": sides("Number?", "7"), "sw": sides("Namba?", "7"), "de": sides("Zahl?", "7")},
        {"row_id": "c", "en": sides("Alone?", "Yes.")}]


def test_each_row_gives_one_fork_a_language_with_its_own_response_first(chatml):
    groups, counts = data.make_forks(ROWS, chatml, "en", "sw")
    (en, sw), (same, _) = groups
    assert (en.prompt, sw.prompt) == (chatml.prompt_ids("What?"), chatml.prompt_ids("Nini?"))
    assert en.continuations == [chatml.response_ids("It is Paris."), chatml.response_ids("Ni Paris.")]
    assert sw.continuations == en.continuations[::-1]
    assert (en.language, sw.language, en.row, same.row) == ("en", "sw", "a", "b")
    assert same.equal and not en.equal
    assert counts == {"rows": 3, "without en and sw": 1, "forks": 4, "forks cut to 1024 tokens": 0,
                      "forks with equal continuations (no preference to learn)": 2}


def test_a_fork_of_which_one_wrong_continuation_differs_still_has_a_preference(chatml):
    row = {"row_id": "a", "en": sides("What?", "Paris"), "de": sides("Was?", "Paris"), "sw": sides("Nini?", "Ni Paris.")}
    (forks,), counts = data.make_forks([row], chatml, "en", ["de", "sw"])
    assert not any(fork.equal for fork in forks)
    assert counts["forks with equal continuations (no preference to learn)"] == 0
    (alone,), _ = data.make_forks([row], chatml, "en", [])
    assert not alone[0].equal                                                    # it has no other at all


def test_more_targets_mean_more_continuations(chatml):
    groups, _ = data.make_forks(ROWS, chatml, "en", ["sw", "de"])
    texts = [[chatml.decode(ids) for ids in fork.continuations] for fork in groups[0]]
    assert texts == [["It is Paris.", "Ni Paris.", "Ja."], ["Ni Paris.", "It is Paris.", "Ja."],
                     ["Ja.", "It is Paris.", "Ni Paris."]]


def test_a_fork_too_long_keeps_its_prompt_and_loses_the_ends_of_its_responses(chatml):
    long = [{"row_id": "a", "en": sides("What?", "word " * 50), "sw": sides("Nini?", "No.")}, ROWS[0]]
    size = len(chatml.prompt_ids("What?")) + 40
    groups, counts = data.make_forks(long, chatml, "en", "sw", row_tokens=size)
    whole, short = chatml.response_ids("word " * 50), chatml.response_ids("No.")
    en = groups[0][0]
    assert en.prompt == chatml.prompt_ids("What?") and en.length == size
    assert en.continuations == [whole[:40 - len(short)], short]
    assert counts[f"forks cut to {size} tokens"] == 2
    long[0]["en"] = sides("word " * 300, "Yes.")
    groups, counts = data.make_forks(long, chatml, "en", "sw", size)
    assert [group[0].row for group in groups] == ["a"]
    assert counts[f"rows dropped: a prompt fills {size} tokens"] == 1
    with pytest.raises(InputError, match="no row fits into 3 tokens"):
        data.make_forks(ROWS, chatml, "en", "sw", row_tokens=3)


def random_forks(count, seed=0):
    draw = random.Random(seed)

    def ids():
        return [draw.randrange(1, 99) for _ in range(draw.randint(1, 6))]
    return [data.Fork(ids(), [ids() for _ in range(draw.randint(1, 4))], "en", str(i)) for i in range(count)]


def visible(batch, b, q):
    """Tokens that position q of row b sees, by the predicate, in the order of their positions."""
    fork, branch = batch.fork[b].tolist(), batch.branch[b].tolist()
    seen = [k for k in range(q + 1) if fork[k] == fork[q] and branch[k] in (0, branch[q])]
    assert batch.positions[b, seen].tolist() == list(range(len(seen)))
    return batch.tokens[b, seen].tolist()


@pytest.mark.parametrize("trim", [True, False])
def test_packed_predictions_are_those_of_separate_sequences(trim):
    forks = random_forks(23)
    batch, = data.micro_batches(forks, 40, 23, trim)
    expected = [(number, fork.prompt + ids[:at], ids[at])
                for number, (fork, ids) in enumerate((fork, ids) for fork in batch.forks
                                                     for ids in fork.continuations)
                for at in range(len(ids))]
    width = batch.tokens.shape[1]
    found = [(sequence, visible(batch, *divmod(index, width)), target) for sequence, index, target in
             zip(batch.sequence.tolist(), batch.row_index.tolist(), batch.targets.tolist())]
    assert found == expected


def test_spans_say_where_every_fork_lies():
    """The last token of a continuation is not laid."""
    for batch in data.micro_batches(random_forks(23), 40, 3):
        flat, covered = batch.tokens.flatten(), []
        for fork, (start, prompt, lengths) in zip(batch.forks, batch.spans, strict=True):
            laid = [ids[:-1] for ids in fork.continuations]
            assert prompt == len(fork.prompt) and list(lengths) == [len(ids) for ids in laid]
            end = start + prompt + sum(lengths)
            assert flat[start:end].tolist() == sum(laid, fork.prompt)
            covered += range(start, end)
        assert covered == (batch.fork.flatten() >= 0).nonzero()[:, 0].tolist()


def test_packing_loses_no_fork_and_is_the_same_every_time():
    forks = random_forks(40, seed=1)
    batch, again = data.pack(forks, 50), data.pack(forks, 50)
    assert sorted(batch.order) == list(range(40)) and batch.forks == [forks[i] for i in batch.order]
    assert batch.order == again.order and batch.tokens.equal(again.tokens)
    used = sum(fork.length - len(fork.continuations) for fork in forks)
    assert (batch.fork >= 0).sum() == batch.used == used
    assert len(batch.tokens) == -(-used // 50)  # no packing needs fewer rows than this


def test_untrimmed_batches_have_one_shape_whatever_they_hold():
    for number in (1, 3, 40):
        forks = random_forks(number, seed=2)
        batches = data.micro_batches(forks, 40, 4, trim=False)
        assert {tuple(batch.tokens.shape) for batch in batches} == {(4, 40)}
        assert [fork.row for batch in batches for fork in batch.forks] == [
            fork.row for batch in data.micro_batches(forks, 40, 4) for fork in batch.forks]
        assert len(batches) == -(-len(data.pack(forks, 40).tokens) // 4)


def test_trimmed_rows_are_as_long_as_the_longest_used():
    fork = data.Fork([5, 6], [[7], [8, 9]], "en", "a")
    assert data.pack([fork], 16).tokens.tolist() == [[5, 6, 8]]
    assert data.pack([fork], 16).positions.tolist() == [[0, 1, 2]]
    full, = data.micro_batches([fork], 8, 1, trim=False)
    assert full.fork.tolist() == [[0, 0, 0, -1, -1, -1, -1, -1]]
    assert full.branch.tolist() == [[0, 0, 2, 0, 0, 0, 0, 0]]
    assert full.row_index.tolist() == [1, 1, 2] and full.targets.tolist() == [7, 8, 9]
    assert full.sequence.tolist() == [0, 1, 1]


def test_on_a_cpu_the_rows_of_a_micro_batch_are_one_and_elsewhere_each_keeps_its_own():
    forks, shapes = random_forks(30), {}
    for device in ("cpu", "mps", "cuda"):
        how = data.packing_for(device, batch_size=30, row_tokens=40, micro_rows=4)
        batch = data.micro_batches(forks, how.row_tokens, how.micro_rows, how.trim)[0]
        shapes[device] = tuple(batch.tokens.shape)
    assert shapes["cuda"] == (4, 40) and shapes["mps"][0] == 4
    assert shapes["cpu"][0] == 1 and 3 * 40 < shapes["cpu"][1] <= 4 * 40


@pytest.mark.parametrize("ranks, micro_batches", [(1, 1), (2, 2), (3, 3), (4, 4), (5, 4), (99, 8)])
def test_a_step_is_cut_so_that_the_busiest_rank_computes_the_least(ranks, micro_batches):
    forks = [data.Fork([5] * 30, [[7] * 10], "en", i) for i in range(16)]           # two of them fill a row
    packing = data.packing_for("cuda", batch_size=16, row_tokens=80, micro_rows=64, ranks=ranks)
    steps = data.make_steps([[fork] for fork in forks], clo.Objective(1.0, ("en",)), packing, None)
    assert [len(step) for step in steps] == [micro_batches]
    assert packing.rows_for([8, 8, 9]) * packing.ranks < 2 * 9 + packing.ranks       # little of it is padding


def test_micro_batches_hold_the_rows_of_the_one_batch():
    forks = random_forks(30, seed=2)
    whole, parts = data.pack(forks, 40), data.micro_batches(forks, 40, 3)
    assert [i for part in parts for i in part.order] == whole.order
    assert [len(part.tokens) for part in parts[:-1]] == [3] * (len(parts) - 1)
    assert sum(len(part.targets) for part in parts) == len(whole.targets)


def test_the_command_line_marks_what_the_loss_reads(tmp_path, chatml, capsys):
    write_rows(tmp_path / "rows.jsonl", ROWS)
    data.main([str(tmp_path / "rows.jsonl"), "--model", str(chatml.directory), "--lang", "sw", "--show", "1"])
    out = capsys.readouterr().out
    assert "3 read, 3 kept" in out and "% padding" in out
    assert "[[It is Paris.<|im_end|>]]" in out and "[[Ni Paris.<|im_end|>]]" in out and "[[7" not in out


# ---- which rows are evaluated ----

def test_an_evaluation_with_the_questions_of_the_training_rows_is_refused_and_some_of_them_are_counted(
        tmp_path, capsys):
    rows = [{"row_id": str(i), "en": sides(f"q{i}", "r"), "sw": sides("s", "j")} for i in range(4)]
    path = tmp_path / "eval.jsonl"
    write_rows(path, rows[::-1])
    with pytest.raises(InputError, match="eval.jsonl asks the same questions as the training rows"):
        data.evaluation_rows(path, "en", ["sw"], rows)
    assert len(data.evaluation_rows(path, "en", ["sw"], rows[:1])) == 4
    assert "1 of its 4 questions are among the training rows, too" in capsys.readouterr().out


def test_preference_rows_never_overwrite_the_data_they_come_from(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"id": "1", "en": {"prompt": "a", "response": "b"},
                                "sw": {"prompt": "c", "response": "d"}}) + "\n")
    before = path.read_bytes()
    with pytest.raises(InputError, match="--trl .* would overwrite .*rows.jsonl"):
        data.main([str(path), "--lang", "sw", "--trl", str(tmp_path / "." / "rows.jsonl")])
    assert path.read_bytes() == before


def test_the_command_takes_several_languages_in_any_spelling(tmp_path, capsys):
    rows = [{"row_id": "1", "en": sides("q", "r"), "zh-CN": sides("问", "答"), "swh_Latn": sides("s", "j")}]
    write_rows(tmp_path / "rows.jsonl", rows)
    data.main([str(tmp_path / "rows.jsonl"), "--lang", "zh, SW", "--trl", str(tmp_path / "trl.jsonl")])
    assert "trl.jsonl: 6 preference rows" in capsys.readouterr().out
    pairs = [json.loads(line) for line in open(tmp_path / "trl.jsonl", encoding="utf-8")]
    told = [tuple(pair[part][0]["content"] for part in ("prompt", "chosen", "rejected")) for pair in pairs]
    assert told == [("q", "r", "答"), ("q", "r", "j"), ("问", "答", "r"), ("问", "答", "j"), ("s", "j", "r"),
                    ("s", "j", "答")]
