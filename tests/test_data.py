"""data.py: readers, forks and packing, against other libraries or written-out answers."""

import gzip
import json
import random
from collections import Counter
from pathlib import Path

import pytest

import data
from engine.files import InputError, run
from formats.records import (describe_counts, languages_of, read_rows, require_languages, write_preferences,
                             write_rows)
from test_chat import CHATML, make_tokenizer

REAL = Path(__file__).parents[2] / "shared" / "data"
real = pytest.mark.skipif(not REAL.exists(), reason="the public data are not in this checkout")


def write_json(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def write_lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def sides(prompt, response):
    return {"prompt": prompt, "response": response}


@pytest.fixture(scope="module")
def chatml(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("chatml"), CHATML, None, "<|endoftext|>",
                          ["<|im_start|>", "<|im_end|>", "<tool_call>"])


# ---- reading ----

def test_an_object_under_id_is_indonesian_and_a_string_is_the_identifier(tmp_path):
    path = write_lines(tmp_path / "p.jsonl", {"id": "a", "en": sides("q", "r")},
                       {"id": sides("t", "j"), "en": sides("q", "r"), "row_id": "b"},
                       {"id": sides("t", "j"), "en": sides("q", "r"), "split": "test"})
    rows = read_rows(path)
    assert [row["row_id"] for row in rows] == ["a", "b", "p.jsonl:3"]
    assert [languages_of(row) for row in rows] == [["en"], ["id", "en"], ["id", "en"]]
    assert rows[2]["split"] == "test" and "id" not in rows[0]


def test_rows_come_back_from_their_file_as_they_were(tmp_path):
    rows = [{"row_id": "a", "split": "train", "en": sides("q\u2028", "ẹ\nr"), "sw": sides("s", "j")},
            {"row_id": "b", "id": sides("t", "j"), "en": sides("q", "r")}]
    write_rows(tmp_path / "out" / "rows.jsonl", rows)
    assert read_rows(tmp_path / "out" / "rows.jsonl") == rows
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["rows.jsonl"]
    assert '"id": "a"' in (tmp_path / "out" / "rows.jsonl").read_text(encoding="utf-8")


CHAT = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "q"},
        {"role": "assistant", "content": "r"}, {"role": "user", "content": "q2"},
        {"role": "assistant", "content": [{"type": "text", "text": "r2"}]}]
SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt"}


@pytest.mark.parametrize("record", [
    {"instruction": "q", "input": "", "output": "r"},
    {"instruction": "q2", "input": "", "output": "r2", "system": "be kind", "history": [["q", "r"]]},
    {"prompt": "q", "response": "r"}, {"prompt": "q", "completion": "r"}, {"messages": CHAT},
    {"conversations": [{"from": SPEAKERS[turn["role"]], "value": turn["content"]} for turn in CHAT]}])
@pytest.mark.parametrize("shape", ["jsonl", "list", "gzip"])
def test_every_one_language_format_is_told_by_its_first_record(tmp_path, record, shape):
    path = tmp_path / "file"
    text = json.dumps([record], indent=1) if shape == "list" else json.dumps(record) + "\n\n"
    path.write_bytes(gzip.compress(text.encode()) if shape == "gzip" else b"\xef\xbb\xbf" + text.encode())
    row, = read_rows(path, language="de")
    assert row == {"row_id": "file[0]" if shape == "list" else "file:1", "de": sides("q", "r")}
    every = read_rows(path, turns="all")
    assert [row["en"]["prompt"] for row in every] == (["q", "q2"] if "q2" in text else ["q"])


def test_alpaca_input_follows_its_instruction_on_a_new_line(tmp_path):
    path = write_json(tmp_path / "a.json", [{"instruction": "Add.", "input": "1, 2", "output": "3"}])
    assert read_rows(path)[0]["en"] == sides("Add.\n1, 2", "3")


def test_what_is_left_out_is_counted_by_reason(tmp_path):
    path = write_lines(tmp_path / "m.jsonl", {"messages": CHAT}, {"messages": CHAT[2:]}, {"messages": []},
                       {"messages": [CHAT[1], {"role": "assistant", "content": " \n"}]},
                       {"messages": [CHAT[1], {"role": "assistant", "content": "\ud83d"}]})
    counts = Counter()
    assert len(read_rows(path, counts=counts)) == 1
    assert counts == {"read": 5, "kept": 1, "system prompts left out": 1, "later turns left out": 2,
                      "skipped: no user message followed by a reply": 2, "skipped: empty response": 1,
                      "skipped: broken Unicode (half of a character)": 1}
    assert describe_counts(counts).startswith("5 read, 1 kept, ")


def message(name, role, text, rank=None, replies=(), **more):
    return {"message_id": name, "role": role, "text": text, "rank": rank, "lang": "en", "deleted": False,
            "synthetic": False, "review_result": True, "replies": list(replies)} | more


def small_trees():
    later = message("p2", "prompter", "q2", replies=[message("a4", "assistant", "r4")])
    yield message("p1", "prompter", "q1", replies=[message("a1", "assistant", "worse", 1),
                                                   message("a2", "assistant", "best", 0, [later])])
    yield message("p3", "prompter", "single", replies=[message("a5", "assistant", "only reply")])
    yield message("p4", "prompter", "no ranks", replies=[message("a6", "assistant", "x"),
                                                         message("a7", "assistant", "y")])
    yield message("p5", "prompter", "by a model", synthetic=True, replies=[message("a8", "assistant", "x")])
    yield message("p6", "prompter", "hallo", lang="de", replies=[message("a9", "assistant", "x", lang="de")])
    yield message("p7", "prompter", "bad", review_result=False, replies=[message("b1", "assistant", "x")])
    yield message("p8", "prompter", "gone", replies=[message("b2", "assistant", "x", deleted=True)])


def flat(node, parent=None):
    yield {key: value for key, value in node.items() if key != "replies"} | {"parent_id": parent}
    for reply in node["replies"]:
        yield from flat(reply, node["message_id"])


@pytest.mark.parametrize("form", ["trees", "nested messages", "flat messages"])
def test_openassistant_rows_follow_the_top_1_rule(tmp_path, form):
    if form == "trees":
        records = [{"message_tree_id": root["message_id"], "tree_state": "ready_for_export", "prompt": root}
                   for root in small_trees()]
        records.append(records[1] | {"tree_state": "aborted_low_grade"})
    else:
        records = [record for root in small_trees() for record in ([root] if form[0] == "n" else flat(root))]
    path, counts = write_lines(tmp_path / "oasst.jsonl", *records), Counter()
    first = read_rows(path, counts=counts)
    assert [row["row_id"] for row in first] == ["a2", "a5"]
    assert first[0]["en"] == sides("q1", "best")
    assert counts["later turns left out"] == 1 and counts["skipped: tree not in en"] == 1
    assert counts["skipped: tree not reviewed"] == 1 + (form == "trees")
    assert counts["skipped: tree without a best reply"] == 2
    assert counts["skipped: tree deleted or synthetic"] == 1
    assert [row["row_id"] for row in read_rows(path, turns="all")] == ["a2", "a4", "a5"]
    assert [row["row_id"] for row in read_rows(path, "de")] == ["a9"]


PARALLEL = b'{"en": {"prompt": "q", "response": "r"}}\n'


@pytest.mark.parametrize("content, told", [
    (b'{"prompt": "q", "response": "r"}\n\n{"prompt": "q", }\n', "f:3: not valid JSON"),
    (b'{"prompt": "q", "response": "r"}\n{"prompt": "q"}\n', 'f:2: "response" is missing'),
    (b'{"en": {"prompt": "q", "response": "r"}}\n{"en": {"prompt": "q"}}\n',
     'f:2: language "en" (prompt and response, or null): "response" is missing'),
    (b'{"en": {"prompt": "q", "response": 3}}\n', "f:1: str expected, found int"),
    (b'{"prompt": "q", "response": "r"}\n[1]\n', "f:2: dict expected, found list"),
    (b'[{"prompt": "q",\n "response": "r"},\n {]', "f:3: not valid JSON"),
    (b'{"messages": [{"role": "user"}]}\n', 'f:1: "content" is missing'),
    (b'{"text": "plain"}\n', "f:1: unknown format (keys: text); known: parallel"),
    (b'{"prompt": "q", "response": "r"}\n\xff\n', "f:2: not UTF-8"),
    (b"[" * 100_000, "f:1: not valid JSON: lists or objects nested too deeply"),
    (b'{"prompt": "q"}\n{"a": ' + b"[" * 100_000, "f:2: not valid JSON: lists or objects nested too deeply"),
    (b'{"prompt": ' + b"1" * 5000 + b"}\n", "f:1: not valid JSON: Exceeds the limit"),
    (PARALLEL + b'{"id": "\\ud800", "en": {"prompt": "q", "response": "r"}}\n', "f:2: broken Unicode"),
    (PARALLEL + b'{"x": ["\\ud800"], "en": {"prompt": "q", "response": "r"}}\n', "f:2: broken Unicode"),
    (PARALLEL + b'{"en": {"prompt": "q", "response": "r", "by": "\\ud800"}}\n', "f:2: broken Unicode"),
    (b'{"prompt": "q", "response": "r", "id": "\\udfff"}\n', "f:1: broken Unicode"),
    (PARALLEL + b'{"en": "q", "sw": {"prompt": "q", "response": "r"}}\n', 'f:2: language "en" (prompt and'),
    (PARALLEL + b'{"en": {"prompt": "q", "response": "r"}, "yo": "q"}\n', 'f:2: language "yo" (prompt and'),
    (PARALLEL + b'{"en": {"prompt": "q", "response": "r"}, "yo": {}}\n', 'f:2: language "yo" (prompt and'),
    (b"\x1f\x8b\x08\x00broken", "f: damaged gzip"), (b" \n", "f: the file is empty"),
    (b'{"prompt": "q", "response": " "}\n', "f: no usable row (1 read, 1 skipped: empty response)")])
def test_bad_input_is_named_with_its_place(tmp_path, content, told):
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(InputError) as error:
        read_rows(tmp_path / "f", targets=["yo"])
    assert str(error.value).startswith(f"{tmp_path}/{told}") and "\n" not in str(error.value)


def test_a_language_that_is_null_is_not_there_yet_and_other_nulls_stay(tmp_path):
    path = write_lines(tmp_path / "f", {"id": 7, "en": sides("q", "r"), "sw": None, "yo": None, "note": None},
                       {"id": None, "en": sides("q", "r"), "sw": sides("s", "j")})
    assert read_rows(path, targets=["yo", "id"]) == [
        {"row_id": "7", "en": sides("q", "r"), "note": None},
        {"row_id": "f:2", "en": sides("q", "r"), "sw": sides("s", "j")}]


@pytest.mark.parametrize("depth", range(100, 500, 20))
def test_text_nested_to_any_depth_is_read_or_refused(tmp_path, depth):
    path = tmp_path / "f"
    path.write_text('{"prompt": ' + '[{"text": ' * depth + '"q"' + "}]" * depth + ', "response": "r"}')
    try:
        assert read_rows(path)[0]["en"]["prompt"] == "q"
    except InputError as error:
        assert "nested too deeply" in str(error)


def test_a_language_nobody_has_is_told_with_those_that_are_there():
    rows = [{"row_id": "a", "en": sides("q", "r"), "sw": sides("q", "r")},
            {"row_id": "b", "en": sides("q", "r")}]
    assert require_languages(rows, "en", "sw") == rows[:1]
    with pytest.raises(InputError, match="no row holds en and yo; languages in the data: en, sw"):
        require_languages(rows, "en", "yo")


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


def test_more_targets_mean_more_continuations_and_chosen_means_one(chatml):
    groups, _ = data.make_forks(ROWS, chatml, "en", ["sw", "de"])
    texts = [[chatml.decode(ids) for ids in fork.continuations] for fork in groups[0]]
    assert texts == [["It is Paris.", "Ni Paris.", "Ja."], ["Ni Paris.", "It is Paris.", "Ja."],
                     ["Ja.", "It is Paris.", "Ni Paris."]]
    groups, _ = data.make_forks(ROWS, chatml, "en", "sw", continuations="chosen")
    assert [len(fork.continuations) for group in groups for fork in group] == [1] * 4


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
    batch = data.pack(forks, 40, trim)
    expected = [(number, fork.prompt + ids[:at], ids[at])
                for number, (fork, ids) in enumerate((fork, ids) for fork in batch.forks
                                                     for ids in fork.continuations)
                for at in range(len(ids))]
    width = batch.tokens.shape[1]
    found = [(sequence, visible(batch, *divmod(index, width)), target) for sequence, index, target in
             zip(batch.sequence.tolist(), batch.row_index.tolist(), batch.targets.tolist())]
    assert found == expected


def test_packing_loses_no_fork_and_is_the_same_every_time():
    forks = random_forks(40, seed=1)
    batch, again = data.pack(forks, 50), data.pack(forks, 50)
    assert sorted(batch.order) == list(range(40)) and batch.forks == [forks[i] for i in batch.order]
    assert batch.order == again.order and batch.tokens.equal(again.tokens)
    used = sum(fork.length for fork in forks)
    assert (batch.fork >= 0).sum() == used
    assert batch.padding == pytest.approx(1 - used / batch.tokens.numel())
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
    assert data.pack([fork], 16).tokens.tolist() == [[5, 6, 7, 8, 9]]
    assert data.pack([fork], 16).positions.tolist() == [[0, 1, 2, 2, 3]]
    full = data.pack([fork], 8, trim=False)
    assert full.fork.tolist() == [[0, 0, 0, 0, 0, -1, -1, -1]]
    assert full.branch.tolist() == [[0, 0, 1, 2, 2, 0, 0, 0]]
    assert full.row_index.tolist() == [1, 1, 3] and full.targets.tolist() == [7, 8, 9]
    assert full.sequence.tolist() == [0, 1, 1]


def test_micro_batches_hold_the_rows_of_the_one_batch():
    forks = random_forks(30, seed=2)
    whole, parts = data.pack(forks, 40), data.micro_batches(forks, 40, 3)
    assert [i for part in parts for i in part.order] == whole.order
    assert [len(part.tokens) for part in parts[:-1]] == [3] * (len(parts) - 1)
    assert sum(len(part.targets) for part in parts) == len(whole.targets)


def test_preference_rows_are_what_trl_reads(tmp_path):
    assert write_preferences(tmp_path / "t.jsonl", ROWS, "en", "sw") == 2
    lines = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert lines[1] == {"prompt": [{"role": "user", "content": "Nini?"}],
                        "chosen": [{"role": "assistant", "content": "Ni Paris."}],
                        "rejected": [{"role": "assistant", "content": "It is Paris."}], "language": "sw"}
    trl = pytest.importorskip("trl")
    assert all(trl.data_utils.is_conversational(line) for line in lines)


def test_the_command_line_marks_what_the_loss_reads(tmp_path, chatml, capsys):
    write_rows(tmp_path / "rows.jsonl", ROWS)
    data.main([str(tmp_path / "rows.jsonl"), "--model", str(chatml.directory), "--lang", "sw", "--show", "1"])
    out = capsys.readouterr().out
    assert "3 read, 3 kept" in out and "% padding" in out
    assert "[[It is Paris.<|im_end|>]]" in out and "[[Ni Paris.<|im_end|>]]" in out and "[[7" not in out


@real
def test_the_public_files_are_read_and_explained():
    counts = Counter()
    rows = read_rows(REAL / "pairs" / "alpaca_en_zh.jsonl", counts=counts)
    assert counts == {"read": 3000, "kept": 2996, "skipped: empty response": 4} and len(rows) == 2996
    assert languages_of(read_rows(REAL / "pairs" / "ntrex_500.jsonl")[0])[0] == "id"
    tree, flat_ = (read_rows(REAL / "oasst" / f"en_100_{name}", turns="all")
                   for name in ("tree.jsonl.gz", "message.jsonl"))
    assert tree == flat_ and len(tree) == 140
