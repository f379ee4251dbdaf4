"""formats/records.py and conversations.py: public data files -> rows, against written-out answers."""

import csv
import gzip
import json
from collections import Counter

import pytest

import data
from engine.files import InputError
from formats.conversations import READERS, find_format, is_blank
from formats.records import (describe_counts, languages_of, read_rows, refuse_duplicates, require_languages,
                             write_preferences, write_rows)


def write_json(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def write_lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_table(path, records):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, records[0])
        writer.writeheader()
        writer.writerows(records)
    return path


def sides(prompt, response):
    return {"prompt": prompt, "response": response}


def say(*texts):
    """Messages of user and assistant by turns."""
    return [{"role": "assistant" if number % 2 else "user", "content": text}
            for number, text in enumerate(texts)]


def read_pairs(path, turns="first", **options):
    """[(prompt, response)] and the counts."""
    counts = Counter()
    rows = read_rows(path, turns=turns, counts=counts, **options)
    return [tuple(row["en"].values()) for row in rows], counts


def test_a_completion_labelled_as_a_bad_one_is_not_trained_on(tmp_path):
    """TRL's "Unpaired preference", plain and conversational; labels as tables and other tools write them."""
    path = write_lines(tmp_path / "kto.jsonl", {"prompt": "q", "completion": "bad", "label": False},
                       {"prompt": say("q"), "completion": [say("q", "bad")[1]], "label": False},
                       {"messages": say("q", "bad"), "label": False},                  # LLaMA-Factory
                       {"instruction": "q", "output": "bad", "kto_tag": False},
                       {"prompt": "q", "completion": "r", "label": True},
                       {"prompt": "q", "completion": "bad", "label": 0},
                       {"prompt": "q", "completion": "bad", "label": "False"},
                       {"prompt": "q", "response": "bad", "is_safe": False},           # BeaverTails
                       {"prompt": "q", "completion": "s", "label": 1},
                       {"question": "q", "answer": "t", "label": False})               # of something else
    pairs, counts = read_pairs(path)
    assert pairs == [("q", "r"), ("q", "s"), ("q", "t")]
    assert counts["skipped: a completion labelled as a bad one (first: kto.jsonl:1)"] == 7


# ---- our own format ----

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


def test_a_language_that_is_null_is_not_there_yet_and_other_nulls_stay(tmp_path):
    path = write_lines(tmp_path / "f", {"id": 7, "en": sides("q", "r"), "sw": None, "yo": None, "note": None},
                       {"id": None, "en": sides("q", "r"), "sw": sides("s", "j"), "yo": float("nan")})
    assert read_rows(path, targets=["yo", "id"]) == [
        {"row_id": "7", "en": sides("q", "r"), "note": None},
        {"row_id": "f:2", "en": sides("q", "r"), "sw": sides("s", "j")}]


def test_a_language_nobody_has_is_told_with_those_that_are_there():
    rows = [{"row_id": "a", "en": sides("q", "r"), "sw": sides("q", "r")},
            {"row_id": "b", "en": sides("q", "r")}]
    assert require_languages(rows, "en", "sw") == rows[:1]
    with pytest.raises(InputError, match="no row holds en and yo; languages in the data: en, sw"):
        require_languages(rows, "en", "yo")


# ---- formats of one language ----

CHAT = [{"role": "system", "content": "be kind"}, *say("q", "r", "q2", [{"type": "text", "text": "r2"}])]
SHAREGPT = [{"from": speaker, "value": text}
            for speaker, text in (("system", "be kind"), ("human", "q"), ("gpt", "r"), ("human", "q2"),
                                  ("gpt", "r2"))]
HH = "\n\nHuman: q\n\nAssistant: r\n\nHuman: q2\n\nAssistant:"
TWO_TURNS = [
    {"messages": CHAT}, {"conversations": SHAREGPT}, {"conversation": SHAREGPT},
    {"prompt": "q", "prompt_id": "9", "messages": CHAT[1:]},                               # UltraChat 200k
    {"data": ["q", "r", "q2", "r2"]},                                                      # UltraChat
    {"conversations": ["q", "r", "q2", "r2"], "source": "x"},                              # LIMA
    {"conversation": [{"input": "q", "output": "r"}, {"input": "q2", "output": "r2"}]},    # Capybara
    {"conversation": [{"human": "q", "assistant": "r"}, {"human": "q2", "assistant": "r2"}]},
    {"instruction": "q2", "input": "", "output": "r2", "system": "be kind", "history": [["q", "r"]]},
    {"prompt": CHAT[:4], "completion": CHAT[4:]},
    {"prompt": CHAT[:4], "chosen": CHAT[4:], "rejected": say("", "no")[1:]},
    {"prompt": {"messages": CHAT[:4]}, "chosen": "r2", "rejected": "no"},
    {"chosen": CHAT, "rejected": [*CHAT[:4], say("", "no")[1]]},
    {"messages": CHAT[:4], "chosen": CHAT[4], "rejected": say("", "no")[1]},               # Axolotl
    {"conversations": SHAREGPT[:4], "chosen": SHAREGPT[4], "rejected": SHAREGPT[2]},       # LLaMA-Factory
    {"input": {"messages": CHAT[:4]}, "preferred_output": CHAT[4:], "non_preferred_output": CHAT[2:3]},     # OpenAI
    {"prompt": "q", "chosen": CHAT[1:], "rejected": []},                                   # UltraFeedback
    {"chosen": HH + " r2", "rejected": HH + " no"}, {"prompt": HH, "chosen": "r2", "rejected": "no"}]
ONE_TURN = [
    {"instruction": "q", "input": "", "output": "r"}, {"instruction": "q", "input": None, "output": "r"},
    {"instruction": "q", "context": "", "response": "r", "category": "open_qa"},           # Dolly
    {"prompt": "q", "response": "r"}, {"prompt": "q", "completion": "r"},
    {"prompt": "q", "chosen": "r", "rejected": "no"},
    {"system": "be kind", "question": "q", "chosen": "r", "rejected": "no"},
    {"instruction": "q", "input": "", "chosen": "r", "rejected": "no"},                    # LLaMA-Factory
    {"inputs": "q", "targets": "r", "language": "eng", "annotation_type": "original-annotations"},
    {"system": "be kind", "input": "q", "chosen": "r", "rejected": "no"},                  # Distilabel
    {"inputs": "q", "targets": "r", "task": "flan"}, {"question": "q", "answer": "r"},
    {"system_prompt": "be kind", "question": "q", "response": "r"},                        # OpenOrca
    {"query": "q", "response": "r"}, {"problem": "q", "solution": "r"}, {"input": "q", "output": "r"},
    {"user": "q", "assistant": "r"}, {"human": "q", "assistant": "r"}, {"Question": "q", " Answer": "r"},
    {"input": "q", "target": "r"}, {"prompt": "q", "output": "r"}, {"instruction": "q", "answer": "r"},
    {"messages": [], "prompt": "q", "response": "r", "images": []}, {"messages": json.dumps(say("q", "r"))},
    {"instruction": "q", "input": "<noinput>", "output": "r", "history": "[]"},             # Self-Instruct
    {"messages": None, "instruction": "q", "output": "r", "prompt": float("nan"), "response": None}]


@pytest.mark.parametrize("record, turns", [(record, 2) for record in TWO_TURNS] +
                                          [(record, 1) for record in ONE_TURN])
@pytest.mark.parametrize("shape", ["jsonl", "list", "gzip", "data", "train"])
def test_every_one_language_format_is_told_by_its_keys(tmp_path, record, turns, shape):
    path = tmp_path / "file"
    texts = {"jsonl": json.dumps(record) + "\r\n\r\n", "list": json.dumps([record], indent=1),
             "data": json.dumps({"version": "1.0", "data": [record]}, indent=1),
             "train": json.dumps({"train": [record]}), "gzip": json.dumps(record)}
    raw = texts[shape].encode()
    path.write_bytes(gzip.compress(raw) if shape == "gzip" else b"\xef\xbb\xbf" + raw)
    names = {"list": "file[0]", "data": "file[data][0]", "train": "file[train][0]"}
    row, = read_rows(path)
    assert row == {"row_id": names.get(shape, "file:1"), "en": sides("q", "r")}
    pairs, _ = read_pairs(path, "all")
    assert pairs == [("q", "r"), ("q2", "r2")][:turns]


def test_every_line_of_the_table_of_formats_is_reached():
    reached = {find_format(record)[0] for record in TWO_TURNS + ONE_TURN if find_format(record)}
    assert reached >= {keys for _, keys, _ in READERS}


def test_one_file_may_mix_formats_and_trees_keep_their_place(tmp_path):
    tree = {"prompt": message("m", "prompter", "q2", replies=[message("n", "assistant", "r2")])}
    path = write_lines(tmp_path / "f", {"messages": say("q1", "r1")}, tree, {"prompt": "q3", "response": "r3"},
                       {"en": sides("q4", "r4")})
    assert read_pairs(path)[0] == [(f"q{i}", f"r{i}") for i in (1, 2, 3, 4)]


def test_a_first_cell_of_several_lines_with_a_semicolon_is_split_at_commas(tmp_path):
    (tmp_path / "t.csv").write_text('"a;\nb",response,prompt\nx,r,q\n')
    assert read_pairs(tmp_path / "t.csv")[0] == [("q", "r")]


def test_a_cell_may_be_as_long_as_a_document(tmp_path):
    (tmp_path / "t.csv").write_text("prompt,response\nq," + "r" * 200_000 + "\n")
    assert read_pairs(tmp_path / "t.csv")[0] == [("q", "r" * 200_000)]


@pytest.mark.parametrize("name, text", [
    ("t.csv", '\ufeffprompt,response\r\n"q, ""a""\nline",r\r\n\r\nq2,r2\r\n'),
    ("s.csv", 'prompt;response\n"q, ""a""\nline";r\nq2;r2\n'),
    ("t.tsv", 'response\tnote\tprompt\nr\t\t"q, ""a""\nline"\nr2\t\tq2\n')])
def test_tables_with_a_header_are_read(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode())
    assert read_pairs(tmp_path / name)[0] == [('q, "a"\nline', "r"), ("q2", "r2")]
    (tmp_path / f"{name.upper()}.gz").write_bytes(gzip.compress(text.encode()))
    assert read_pairs(tmp_path / f"{name.upper()}.gz")[0] == [('q, "a"\nline', "r"), ("q2", "r2")]


@pytest.mark.parametrize("record", [{"instruction": "Add.", "input": "1, 2", "output": "3"},
                                    {"instruction": "Add.", "context": "1, 2", "response": "3"},
                                    {"question": "Add.", "context": "1, 2", "answer": 3},
                                    {"instruction": "", "input": "Add.\n1, 2", "output": "3"}])
def test_what_a_prompt_speaks_about_follows_it_on_a_new_line(tmp_path, record):
    assert read_pairs(write_lines(tmp_path / "f", record))[0] == [("Add.\n1, 2", "3")]


@pytest.mark.parametrize("chosen, rejected, prompt, response", [
    ("The sky is blue.", "The sky is green.", "The sky is", "blue."),
    ("The sky is blue.", "The sky is black.", "The sky is", "blue."),
    ("Q: ni nini?\nNi Paris.", "Q: ni nini?\nSijui.", "Q: ni nini?", "Ni Paris.")])
def test_the_prompt_of_a_preference_pair_without_one_is_what_both_begin_with(tmp_path, chosen, rejected,
                                                                             prompt, response):
    path = write_lines(tmp_path / "f", {"chosen": chosen, "rejected": rejected})
    assert read_pairs(path)[0] == [(prompt, response)]


@pytest.mark.slow
def test_preference_pairs_are_read_and_written_as_trl_does(tmp_path):
    trl = pytest.importorskip("trl")
    for chosen, rejected in (("The sky is blue.", "The sky is green."), ("A?\nNi Paris.", "A?\nSijui."), (
            [*say("q", "r", "q2"), say("", "r2")[1]], [*say("q", "r", "q2"), say("", "no")[1]])):
        theirs = trl.extract_prompt({"chosen": chosen, "rejected": rejected})
        ours = read_pairs(write_lines(tmp_path / "f", {"chosen": chosen, "rejected": rejected}), "all")[0]
        if isinstance(chosen, str):
            theirs = {"prompt": say(theirs["prompt"].strip()), "chosen": say("", theirs["chosen"].strip())[1:]}
        assert say(*(text for pair in ours for text in pair)) == theirs["prompt"] + theirs["chosen"]
    rows = [{"row_id": "a", "en": sides("q", "r"), "sw": sides("s", "j")}]
    write_preferences(tmp_path / "t.jsonl", rows, "en", "sw")
    lines = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(trl.data_utils.is_conversational(line) for line in lines)


# ---- values and roles ----

@pytest.mark.parametrize("value, text", [
    (3, "3"), (2.5, "2.5"), (True, "true"), (False, "false"), (0, "0"), ("r", "r"), (["r"], "r"),
    ([{"type": "text", "text": "r "}, {"type": "image_url", "image_url": {"url": "x"}},
      {"type": "text", "text": "s"}], "r s"), ([{"type": "text", "text": None}, {"text": "r"}], "r")])
@pytest.mark.parametrize("record", [lambda value: {"prompt": "q", "response": value},
                                    lambda value: {"messages": say("q", value)},
                                    lambda value: {"en": sides("q", value)}])
def test_numbers_truth_values_and_parts_are_text(tmp_path, value, text, record):
    pairs, counts = read_pairs(write_lines(tmp_path / "f", record(value)))
    assert pairs == [("q", text)]
    images = isinstance(value, list) and len(value) == 3
    assert counts["parts without text left out (images, calls)"] == images


@pytest.mark.parametrize("value", [None, float("nan"), "", [], [{"type": "image"}], " \n", "\u200b", "\ufeff",
                                   "\u00ad\u2060", "\ufe0f\ufe0e", "\u200d \u3000", "\x00\x1f", "\u3164",
                                   "\u2800", "\u034f", "\U000e0020", "\u180b"])
@pytest.mark.parametrize("part", ["prompt", "response"])
def test_what_cannot_be_seen_is_empty(tmp_path, value, part):
    empty = sides("q", "r") | {part: value}
    records = [{"messages": say("q", "r")}, empty, {"en": empty}, {"messages": say(*empty.values())}]
    pairs, counts = read_pairs(write_lines(tmp_path / "f", *records))
    assert pairs == [("q", "r")] and counts[f"skipped: empty {part} (first: f:2)"] == 3


@pytest.mark.parametrize("text", ["0", "٣", "।", "?", "👍\ufe0f", "1\ufe0f\u20e3", "क्", "x\u200b", "\ue000", "\uff21"])
def test_what_can_be_seen_is_not_empty(text):
    assert not is_blank(text)


@pytest.mark.parametrize("asks, answers", [("User", "AI"), ("Human", "bing"), ("HUMAN ", "Bot"),
                                           ("prompter", "Assistant"), ("human", "gpt"), ("user", "model"),
                                           ("human", "bard"), ("user", "chatgpt")])
@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value"), ("role", "text")])
def test_roles_are_read_in_any_spelling(tmp_path, asks, answers, keys):
    messages = [dict(zip(keys, pair)) for pair in (("developer", "be kind"), (asks, "q"), (answers, "r"))]
    pairs, counts = read_pairs(write_lines(tmp_path / "f", {"messages": messages}))
    assert pairs == [("q", "r")] and counts["system prompts left out"] == 1


@pytest.mark.parametrize("call", [{"role": "assistant", "tool_calls": [{"id": 1}]},
                                  {"role": "assistant", "content": "Let me see.", "tool_calls": [{"id": 1}]},
                                  {"role": "assistant", "content": None, "function_call": {"name": "f"}},
                                  {"from": "function_call", "value": "{}"}, {"role": "tool_call", "content": "{}"}])
def test_calls_of_tools_are_no_replies(tmp_path, call):
    role = "from" if "from" in call else "role"
    result = {role: {"from": "observation", "role": "tool"}[role], "content": "42"}
    last = [{role: "human", "content": "q2"}, {role: "assistant", "content": "r2"}]
    messages = [{role: "human", "content": "q"}, call, result, {role: "assistant", "content": "42!"}, *last]
    path = write_lines(tmp_path / "f", {"messages": messages}, {"messages": say("q", "r")})
    pairs, counts = read_pairs(path, "all")
    assert pairs == [("q2", "r2"), ("q", "r")] and counts["messages of tools left out"] == 2
    pairs, counts = read_pairs(path)
    assert pairs == [("q", "r")]
    assert counts["skipped: no user message followed by a reply (first: f:1)"] == 1


def test_words_before_a_call_of_a_tool_are_no_reply(tmp_path):
    call = [{"role": "tool_call", "content": "{}"}, {"role": "tool_response", "content": "11:00"}]
    messages = [*say("What time is it?", "Let me look."), *call, say("", "11 o'clock.")[1], *say("q", "r")]
    pairs, counts = read_pairs(write_lines(tmp_path / "f", {"messages": messages}), "all")
    assert pairs == [("q", "r")]
    assert counts["messages without a question or a reply beside them left out"] == 3


@pytest.mark.parametrize("order, rows", [("uua", [("q2", "r")]), ("uaa", [("q", "r")]), ("uuaua", [("q2", "r"), ("q3", "r3")])])
def test_messages_without_a_partner_are_counted(tmp_path, order, rows):
    texts = {"uua": "q q2 r", "uaa": "q r r2", "uuaua": "q q2 r q3 r3"}[order].split()
    messages = [{"role": {"u": "user", "a": "assistant"}[side], "content": text} for side, text in zip(order, texts)]
    pairs, counts = read_pairs(write_lines(tmp_path / "f", {"messages": messages}), "all")
    assert pairs == rows and counts["messages without a question or a reply beside them left out"] == 1


@pytest.mark.parametrize("key, value", [("images", ["1.jpg"]), ("image", "1.jpg"), ("audios", [{"path": "a.wav"}])])
def test_what_is_about_pictures_or_sound_is_left_out(tmp_path, key, value):
    path = write_lines(tmp_path / "f", {"messages": say("<image>Who?", "Ada"), key: value}, {"messages": say("q", "r")})
    pairs, counts = read_pairs(path)
    assert pairs == [("q", "r")] and counts["skipped: about pictures or sound, which no text shows (first: f:1)"] == 1


def test_turns_of_a_prompt_with_an_open_end_are_told_by_single_lines_too(tmp_path):
    """BELLE's; a text that only quotes such a talk stays one text."""
    path = write_lines(tmp_path / "f", {"instruction": "Human:q\nAssistant: r\nHuman: q2\nAssistant:", "output": "r2"},
                       {"instruction": "Human: q\nAssistant: r\nWho is right?", "output": "r3"})
    assert read_pairs(path, "all")[0] == [("q", "r"), ("q2", "r2"), ("Human: q\nAssistant: r\nWho is right?", "r3")]


def test_sides_that_name_their_parts_otherwise_are_parallel_rows(tmp_path):
    path = write_lines(tmp_path / "f", {"id": "7", "en": {"instruction": "q", "input": "x", "output": "r"},
                                        "sw": {"instruction": "s", "input": "y", "output": "j"}},
                       {"en": {"question": "q", "answer": "r"}, "sw": {"question": "s", "answer": ["j", "k"]}})
    counts = Counter()
    row, = read_rows(path, targets=["sw"], counts=counts)
    assert {part: row["en"][part] for part in ("prompt", "response")} == sides("q\nx", "r") and row["row_id"] == "7"
    assert {part: row["sw"][part] for part in ("prompt", "response")} == sides("s\ny", "j")
    assert sum("language 'sw' (prompt and response, or null)" in reason for reason in counts) == 1


def test_what_such_a_side_holds_beside_question_and_reply_is_counted(tmp_path):
    asked = say([{"type": "image"}, {"type": "text", "text": "q"}], "r")
    path = write_lines(tmp_path / "f", {"en": {"messages": [CHAT[0], *asked]}, "sw": {"messages": say("s", "j")}},
                       {"en": {"system": "be kind", "question": "q", "answer": "r"}, "sw": sides("s", "j")})
    counts = Counter()
    assert len(read_rows(path, targets=["sw"], counts=counts)) == 2
    assert +counts == {"read": 2, "kept": 2, "system prompts left out": 2,
                       "parts without text left out (images, calls)": 1}
    assert describe_counts(counts).startswith("2 read, 2 kept, ")


@pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}, {"loss": False}])
def test_a_reply_marked_as_not_for_training_is_none(tmp_path, mark):
    """OpenAI's fine-tuning files, Axolotl's."""
    messages = [*say("q", "bad", "q2", "r2")]
    messages[1] |= mark
    messages[3] |= dict.fromkeys(mark, 1)
    pairs, counts = read_pairs(write_lines(tmp_path / "f", {"messages": messages}, {"messages": say("q", "r")}), "all")
    assert pairs == [("q2", "r2"), ("q", "r")]
    assert counts["replies marked as not for training left out"] == 1


@pytest.mark.parametrize("record, prompt", [
    ({"instruction": "Name the mood.", "inputs": "Nina furaha", "targets": "happy"}, "Name the mood.\nNina furaha"),
    ({"definition": "Add.", "inputs": "1 and 1", "targets": "2"}, "Add.\n1 and 1"),
    ({"instruction": "Answer.", "question": "Who?", "context": "Ada.", "answer": "Ada"}, "Answer.\nWho?\nAda."),
    ({"instruction": "a", "prompt": "Who?", "chosen": "Ada", "rejected": "Bo"}, "Who?")])
def test_the_task_that_a_prompt_is_a_case_of_stands_before_it(tmp_path, record, prompt):
    """Inkuba-Instruct, Super-NaturalInstructions; an "instruction" beside a "prompt" is most often the same."""
    (asked, _), = read_pairs(write_lines(tmp_path / "f", record))[0]
    assert asked == prompt


# ---- what is left out ----

def test_what_is_left_out_is_counted_by_reason_with_its_first_place(tmp_path):
    path = write_lines(tmp_path / "m.jsonl", {"messages": CHAT}, {"messages": CHAT[2:]}, {"messages": []},
                       {"messages": say("q", " \n")}, {"messages": say("q", "\ud83d")})
    counts = Counter()
    assert len(read_rows(path, counts=counts)) == 1
    assert +counts == {"read": 5, "kept": 1, "system prompts left out": 1, "later turns left out": 2,
                       "messages without a question or a reply beside them left out": 1,
                       "skipped: no user message followed by a reply (first: m.jsonl:2)": 2,
                       "skipped: empty response (first: m.jsonl:4)": 1,
                       "skipped: broken Unicode (half of a character) (first: m.jsonl:5)": 1}
    assert describe_counts(counts).startswith("5 read, 1 kept, ")


GOOD = [{"en": sides("q", "r"), "yo": sides("q", "r")}, {"messages": say("q", "r")},
        {"prompt": "q", "response": "r"}]
ODD = [
    ([1], "no object"), (None, "no object"), ({"text": "x"}, "unknown format (keys: 'text')"),
    ({"prompt": "q"}, "unknown format (keys: 'prompt')"),
    ({"prompt": "q", "response": {"a": 1}}, '"response" holds an object where text is wanted'),
    ({"question": "q", "answer": ["a", "b"]}, '"answer" holds 2 values where one text is wanted'),
    ({"inputs": [12, 3], "targets": [45]}, '"inputs" holds 2 values where one text is wanted'),       # P3's ids
    ({"question": "q", "answer": [["a"], ["b"]]}, '"answer" holds 2 values where one text is wanted'),
    ({"question": "q", "choices": ["a", "b"], "answer": 0},
     "a multiple-choice question, which is for a benchmark"),
    ({"question": "q", "option_a": "a", "option_b": "b", "answer": "B"},                   # Global-MMLU
     "a multiple-choice question, which is for a benchmark"),
    *[({"question": "q", "answer": "c"} | choices, "a multiple-choice question, which is for a benchmark")
      for choices in ({"a": "x", "b": "y"}, {"opa": "x"}, {"Option 1": "x"}, {"alternatives": ["x"]}, {"ending0": "x", "ending1": "y"})],
    ({"prompt": "q", "responses": ["a", "b"], "chosen": 0}, '"chosen" only names the reply'),
    ({"prompt": "q", "response_a": "a", "chosen": "response_a"}, '"chosen" only names the reply'),
    ({"messages": "q"}, '"messages" holds no list'), ({"messages": [3]}, "a message that is no object"),
    ({"messages": [{"content": "q"}]}, "a message without \"role\" or \"from\" (keys: 'content')"),
    ({"messages": [{"role": "narrator", "content": "q"}]},
     "a message whose \"role\" is 'narrator', an unknown role"),
    ({"messages": [{"from": None, "value": "q"}]}, "a message without \"role\" or \"from\" (keys: 'from', 'value')"),
    ({"messages": [{"role": "user"}]}, "a message of role 'user' without \"content\" (keys: 'role')"),
    ({"messages": [{"role": "a\nb", "content": "q"}]}, "a message whose \"role\" is 'a\\nb', an unknown role"),
    ({"chosen": "Yes.", "rejected": "No."}, "chosen and rejected do not begin with one prompt"),
    ({"chosen": "Yes it is.", "rejected": "Yes it is."}, "chosen and rejected do not begin with one prompt"),
    ({"en": {"prompt": "q"}}, "language 'en' (prompt and response, or null): \"response\" is missing"),
    ({"en": sides("q", "r"), "yo": "q"}, "language 'yo' (prompt and response, or null): \"prompt\" is missing"),
    ({"en": sides("q", "r"), "yo": {}}, "language 'yo' (prompt and response, or null): \"prompt\" is missing"),
    ({"en": "q", "yo": sides("q", "r")}, "language 'en' (prompt and response, or null): \"prompt\" is missing"),
    ({"prompt": {"message_id": "m", "text": "q", "replies": [3]}}, '"replies" holds no messages')]


@pytest.mark.parametrize("record, reason", ODD)
def test_an_odd_record_costs_itself_alone_until_most_are_odd(tmp_path, record, reason):
    pairs, counts = read_pairs(write_lines(tmp_path / "f", *GOOD, record, record))
    assert pairs == [("q", "r")] * 3 and counts[f"skipped: {reason} (first: f:4)"] == 2
    path = write_lines(tmp_path / "g", GOOD[0], record, record)
    with pytest.raises(InputError) as error:
        read_rows(path)
    assert str(error.value).startswith(f"{path}:2: {reason} (2 of 3 records cannot be read)")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("record", [{"id": "\ud800", "en": sides("q", "r")}, {"x": ["\ud800"], "en": sides("q", "r")},
                                    {"en": sides("q", "r") | {"by": "\ud800"}}, {"prompt": "q", "response": "\ud83d"},
                                    {"prompt": "q", "response": "r", "id": "\udfff"}])
def test_no_half_of_a_character_gets_into_a_row(tmp_path, record):
    _, counts = read_pairs(write_lines(tmp_path / "f", GOOD[0], record))
    assert counts["skipped: broken Unicode (half of a character) (first: f:2)"] == 1


@pytest.mark.parametrize("content, told", [
    (b'{"prompt": "q", "response": "r"}\n\n{"prompt": "q", }\n', "f:3: not valid JSON"),
    (b'[{"prompt": "q",\n "response": "r"},\n {]', "f:3: not valid JSON"),
    (b'{"text": "plain"}\n', "f:1: unknown format (keys: 'text') (1 of 1 records cannot be read); known: para"),
    (b'{"train": [{"a": 1}], "test": [{"a": 1}]}', "f: lists of records under 'train', 'test': write the one"),
    (b'{"prompt": "q", "response": "r"}\n\xff\n', "f:2: not UTF-8"),
    (b"[" * 100_000, "f:1: not valid JSON: lists or objects nested too deeply"),
    (b'{"prompt": "q"}\n{"a": ' + b"[" * 100_000, "f:2: not valid JSON: lists or objects nested too deeply"),
    (b'{"prompt": ' + b"1" * 5000 + b"}\n", "f:1: not valid JSON: Exceeds the limit"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "f only tells Git LFS where the file is: run"),
    (b"\x1f\x8b\x08\x00broken", "f: damaged gzip"), (b" \n", "f: the file is empty"), (b"[]", "f: the file is empty"),
    (b'{"prompt": "q", "response": " "}\n', "f: no usable row (1 read, 1 skipped: empty response (first: f:1))")])
def test_a_bad_file_is_named_with_its_place(tmp_path, content, told):
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(InputError) as error:
        read_rows(tmp_path / "f", targets=["yo"])
    assert str(error.value).startswith(f"{tmp_path}/{told}") and "\n" not in str(error.value)


@pytest.mark.parametrize("name, content, told", [
    ("f.csv", "prompt,response\nq,r\nq,r,s\n", "f.csv:3: 3 cells below a header of 2"),
    ("f.csv", 'prompt,response\nq,"r' + "x" * 200_000, "f.csv:2: not a table"),
    ("f.csv", 'prompt,response\nWho?,"Weird Al" Yankovic\n', "f.csv:2: not a table"),
    ("f.csv", 'prompt,response\nq,"a \\"b\\" c"\n', "f.csv:2: not a table"),
    ("f.tsv", 'prompt\tresponse\nWho?\t"To be\nq\tr\n', "f.tsv:2: not a table"),
    ("f.csv", "prompt,response,response\nq,r,s\n", "f.csv:1: a header with two columns of one name"),
    ("f.json", '{"Definition": "Add.", "Instances": [{"input": "1", "output": "2"}]}',
     "f.json: 'Definition' stands once, beside the list of records under 'Instances'"),
    ("f.csv", "a,b\n1,2\n", "f.csv:2: unknown format (keys: 'a', 'b')"),
    ("f.csv", "prompt,response\n", "f.csv: the file is empty"),
    ("f.parquet", "PAR1", "f.parquet is one of the parquet files, which are not read here; with pandas")])
def test_a_bad_table_is_named_with_its_place(tmp_path, name, content, told):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError) as error:
        read_rows(tmp_path / name)
    assert str(error.value).startswith(f"{tmp_path}/{told}") and "\n" not in str(error.value)


@pytest.mark.parametrize("depth", range(100, 500, 20))
def test_text_nested_to_any_depth_is_read_or_refused(tmp_path, depth):
    path = tmp_path / "f"
    path.write_text('{"prompt": ' + '[{"text": ' * depth + '"q"' + "}]" * depth + ', "response": "r"}')
    try:
        assert read_rows(path)[0]["en"]["prompt"] == "q"
    except InputError as error:
        assert "nested too deeply" in str(error)


# ---- languages that records name ----

@pytest.mark.parametrize("asked, held", [("zh", "zh-CN"), ("zh-CN", "zh"), ("sw", "swh_Latn"), ("sw", "SW"),
                                         ("id", "ind"), ("sw", "Swahili")])
def test_a_language_is_found_in_any_spelling_of_its_code_and_that_is_said(tmp_path, asked, held):
    path = write_lines(tmp_path / "f", {"row_id": "a", "en": sides("q", "r"), held: sides("s", "j")},
                       {"row_id": "b", "en": sides("q", "r"), asked: sides("S", "J")})
    counts = Counter()
    rows = read_rows(path, counts=counts, targets=[asked])
    assert [row[asked] for row in rows] == [sides("s", "j"), sides("S", "J")]
    assert counts[f"{held!r} taken for {asked}"] == 1 and "note" not in rows[0]


@pytest.mark.parametrize("label", ["eng", "en", "en-US", "eng_Latn", "EN", "English"])
def test_a_record_in_another_language_than_the_one_asked_for_is_left_out(tmp_path, label):
    swahili = {"inputs": "s", "targets": "j", "language_code": "swh", "language": "Swahili"}
    path = write_lines(tmp_path / "f", {"inputs": "q", "targets": "r", "language": label}, swahili, swahili)
    pairs, counts = read_pairs(path)
    assert pairs == [("q", "r")] and counts["skipped: not in en (first: f:2)"] == 2
    assert [row["sw"] for row in read_rows(path, "sw")] == [sides("s", "j")] * 2


def test_what_names_no_language_of_people_is_said_and_kept(tmp_path):
    path = write_lines(tmp_path / "f", {"prompt": "q", "response": "r", "language": "Python"})
    pairs, counts = read_pairs(path)
    assert pairs == [("q", "r")]
    assert counts["in the language 'Python', which is unknown: taken for en"] == 1


def test_preference_rows_of_both_directions_come_back_by_language(tmp_path):
    rows = [{"row_id": "a", "en": sides("q", "r"), "sw": sides("s", "j")}]
    write_preferences(tmp_path / "t.jsonl", rows, "en", "sw")
    for language in ("en", "sw"):
        assert [row[language] for row in read_rows(tmp_path / "t.jsonl", language)] == [rows[0][language]]


# ---- identifiers ----

def test_rows_with_one_identifier_are_numbered_for_training_and_none_is_lost(tmp_path):
    path = write_lines(tmp_path / "f", *[{"id": name, "prompt": "q", "response": str(i)}
                                         for i, name in enumerate(["a", "a", "a#2", "b", "a", 7, "7"])])
    counts = Counter()
    rows = read_rows(path, counts=counts)
    assert [row["row_id"] for row in rows] == ["a", "a#3", "a#2", "b", "a#4", "7", "7#2"]
    assert [row["en"]["response"] for row in rows] == list("0123456")
    assert counts["repeated identifiers numbered"] == 3


def test_rows_with_one_identifier_are_refused_for_an_evaluation(tmp_path):
    path = write_lines(tmp_path / "f", *[{"id": name, "en": sides("q", "r")} for name in ("a", "b", "a")])
    with pytest.raises(InputError, match=f"{path}:3: the same identifier as in {path}:1: 'a'"):
        read_rows(path, unique=True)
    refuse_duplicates([("x:1", "a"), ("x:2", "b")])


# ---- OpenAssistant ----

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


@pytest.mark.parametrize("form", ["trees", "nested messages", "flat messages", "flat, replies first", "NaN", "table"])
def test_openassistant_rows_follow_the_top_1_rule(tmp_path, form):
    if form == "trees":
        records = [{"message_tree_id": root["message_id"], "tree_state": "ready_for_export", "prompt": root}
                   for root in small_trees()]
        records.append(records[1] | {"tree_state": "aborted_low_grade"})
    else:
        records = [record for root in small_trees()
                   for record in ([root] if form[0] == "n" else flat(root))]
    if form == "NaN":
        records = [{key: float("nan") if value is None else value for key, value in record.items()}
                   for record in records]
    if "first" in form:
        records.sort(key=lambda record: record["parent_id"] is None)
    path, counts = write_lines(tmp_path / "oasst.jsonl", *records), Counter()
    if form == "table":                                     # as pandas writes it: ranks among nulls are floats
        path = write_table(tmp_path / "oasst.csv", [
            record | {"rank": None if record["rank"] is None else float(record["rank"])} for record in records])
    first = read_rows(path, counts=counts)
    assert [row["row_id"] for row in first] == ["a2", "a5"]
    assert first[0]["en"] == sides("q1", "best")
    skipped = {reason.split(" (")[0]: number for reason, number in counts.items()}
    assert skipped["later turns left out"] == 1 and skipped["skipped: not in en"] == 1
    assert skipped["skipped: tree not reviewed"] == 1 + (form == "trees")
    assert skipped["skipped: tree without a best reply"] == 2
    assert skipped["skipped: tree deleted or synthetic"] == 1
    assert [row["row_id"] for row in read_rows(path, turns="all")] == ["a2", "a4", "a5"]
    assert [row["row_id"] for row in read_rows(path, "de")] == ["a9"]


def test_messages_without_their_parent_and_those_seen_before_are_counted(tmp_path):
    tree = list(flat(message("p", "prompter", "q", replies=[message("a", "assistant", "r")])))
    lost = message("b", "assistant", "x") | {"parent_id": "gone"}
    pairs, counts = read_pairs(write_lines(tmp_path / "f", *tree, lost, *tree))
    assert pairs == [("q", "r")]
    assert counts["skipped: a message without its parent (first: f:3)"] == 1
    assert counts["skipped: a message that was there before (first: f:4)"] == 2


# ---- writing, command line, real files ----

def test_preference_rows_have_one_of_each_language_unless_both_answer_alike(tmp_path):
    rows = [{"row_id": "a", "en": sides("What?", "It is Paris."), "sw": sides("Nini?", "Ni Paris.")},
            {"row_id": "b", "en": sides("Number?", "7"), "sw": sides("Namba?", "7")},
            {"row_id": "c", "en": sides("Alone?", "Yes.")}]
    assert write_preferences(tmp_path / "t.jsonl", rows, "en", "sw") == 2
    lines = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert lines[1] == {"prompt": [{"role": "user", "content": "Nini?"}],
                        "chosen": [{"role": "assistant", "content": "Ni Paris."}],
                        "rejected": [{"role": "assistant", "content": "It is Paris."}], "language": "sw"}


def test_the_command_line_counts_what_a_file_holds(tmp_path, capsys):
    data.main([str(write_lines(tmp_path / "f", {"messages": CHAT}, GOOD[0], {"text": "x"}))])
    assert capsys.readouterr().out == (
        f"{tmp_path}/f: 3 read, 2 kept, 1 system prompts left out, 1 later turns left out, "
        "1 skipped: unknown format (keys: 'text') (first: f:3)\nlanguages: 2 en, 1 yo\n")


def test_columns_that_are_not_read_are_named(tmp_path):
    _, counts = read_pairs(write_lines(
        tmp_path / "f", {"id": "7", "prompt": "q", "response": "r", "system": "s", "note": "", "source": "web"},
        {"instruction": "a", "input": "b", "output": "r", "category": "c", "instruction_en": "d"}, GOOD[0],
        {"instruction": "a", "inputs": "b", "targets": "r", "rank": 3, "references": ["e"]},
        {"messages": CHAT, "instruction": "a"}))
    assert counts["columns not read ('source', 'category', 'instruction_en', 'rank', 'references', 'instruction')"] == 6


def test_what_stands_beside_the_text_of_a_message_is_told(tmp_path):
    """Thoughts, as DeepSeek's and OpenAI's open models write them; null ones and marks that are read are not."""
    asked, reply = say("q", "r")
    path = write_lines(tmp_path / "f", {"messages": [asked, reply | {"reasoning_content": "hm"}]},
                       {"prompt": [asked | {"thinking": None}], "completion": [reply | {"thinking": "hm", "weight": 1}]})
    pairs, counts = read_pairs(path)
    assert pairs == [("q", "r")] * 2 and counts["columns not read ('reasoning_content', 'thinking')"] == 2


def test_the_public_files_are_read_and_explained(shared):
    counts = Counter()
    rows = read_rows(shared / "pairs" / "alpaca_en_zh.jsonl", counts=counts)
    assert counts == {"read": 3000, "kept": 2996,
                      "skipped: empty response (first: alpaca_en_zh.jsonl:285)": 4} and len(rows) == 2996
    assert languages_of(read_rows(shared / "pairs" / "ntrex_500.jsonl")[0])[0] == "id"
    tree, flat_ = (read_rows(shared / "oasst" / f"en_100_{name}", turns="all")
                   for name in ("tree.jsonl.gz", "message.jsonl"))
    assert tree == flat_ and len(tree) == 140
