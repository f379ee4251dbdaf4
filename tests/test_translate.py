"""translate.py and its promises: layout, checks, resuming, files that are never lost."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

import translate
from engine.files import InputError, locked
from formats import markup, translated
from formats.records import languages_of, read_rows, write_rows
from m2m100.checks import loops
from test_m2m100 import END, checkpoint, make_checkpoint, translator, write_nllb_tokenizer  # fixtures too

ROOT = Path(__file__).parents[1]
SHARED, DEMO = ROOT.parent / "shared" / "data", ROOT / "demo"


@pytest.fixture
def echo(monkeypatch):
    """A translator that repeats what it is given; the list fills with the texts it saw."""
    seen = []

    def translate_sentences(texts, direction, beams, no_repeat=0):
        seen.extend(texts)
        return [(text, None) for text in texts]

    monkeypatch.setattr(translate, "translate_sentences", translate_sentences)
    return seen


@pytest.mark.parametrize("source, target, complaint", [
    ("en", "xx", "'xx'; it knows de, id, sw, zh"), ("xx", "sw", "'xx'; it knows .*af"),
    ("en", "fr", "'fr'; it knows de, id, sw, zh"), ("en", "en", "'en' is to be translated into itself"),
    ("sw", "sw", "'sw' is to be translated into itself")])
def test_a_language_the_translator_does_not_know_is_refused_everywhere(
        translator, tmp_path, source, target, complaint):
    with pytest.raises(InputError, match=complaint):
        translate.translate(["a"], source, target, translator)
    row = {"row_id": "1", source: {"prompt": "a", "response": "b"}}
    with pytest.raises(InputError, match=complaint):
        translate.translate_rows([row], translator, source, target, tmp_path / "out.jsonl")
    assert not list(tmp_path.iterdir())


def test_a_translation_is_a_text_that_knows_its_faults(translator, shout):
    first, second = translate.translate(["One 5.\nTwo 5.", "Three."], "en", "sw", translator)
    assert first == "sw ONE 5.\nsw TWO 5." and first.faults == {"length": 2}
    assert second == "sw THREE." and not second.faults
    copy = pickle.loads(pickle.dumps(first))
    assert copy == first and copy.faults == first.faults, "ranks send them to each other"


def test_nllb_s_sources_equal_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    make_checkpoint(tmp_path, tokenizer=write_nllb_tokenizer)
    theirs = transformers.NllbTokenizer(tokenizer_file=str(tmp_path / "tokenizer.json"), src_lang="eng_Latn")
    direction = translate.Direction(translate.load(tmp_path), "en", "sw")
    for text in ("the lion", "a [0] b, c?", "inner", ""):
        assert direction.source_ids(text) == theirs(text).input_ids


# ---- documents ----

DOCUMENT = """# A heading

First sentence. Second one!  Third, by Dr. Smith, costs 3.14 dollars?
  - a list item with `code. Inside` and https://a.example/x?y=z.
> 1) quoted, nested
```python
print("do. Not. Touch")

```
| Name | Value |
|:---|---|
| lion | $x^2$ here |\r
\t$$ E = mc^2. A $$
Emoji 😀 and {placeholder} stay. 12345

Trailing spaces   \nno end"""


def test_a_document_comes_back_byte_for_byte_from_a_translator_that_echoes(translator, echo):
    texts = [DOCUMENT, "", "\n\n", "```\nopen fence. To the end", "one", " \t "]
    assert translate.translate(texts, "en", "sw", translator) == texts
    assert not any("Touch" in text or "https" in text or "\n" in text or "^2" in text for text in echo)


def kept(text, translation):
    """Whether line breaks, what lines begin with, code, links, formulas and other spans are
    in the translation."""
    lost = Counter(markup.split_spans(text)[1::2]) - Counter(markup.split_spans(translation)[1::2])
    lines = zip(text.split("\n"), translation.split("\n"))
    return (text.count("\n") == translation.count("\n") and not lost
            and all(b.startswith(markup.MARKER.match(a)[0].rstrip()) for a, b in lines))


@pytest.mark.slow
def test_real_conversations_go_through_the_demo_translator(tmp_path, capsys):
    file = SHARED / "oasst" / "en_100_tree.jsonl.gz"
    if not file.exists():
        pytest.skip("no shared data")
    rows, translator = read_rows(file, "en", "all"), translate.load(DEMO / "m2m100")
    done = translate.translate_rows(rows, translator, "en", "sw", tmp_path / "sw.jsonl", beams=1,
                                    keep_failed=True)
    assert len(done) == len(rows)
    wrong = [row["sw"][part] for row in done for part in ("prompt", "response")
             if not kept(row["en"][part], row["sw"][part])]
    assert not wrong, wrong[:1]
    assert "segments: unknown words" in capsys.readouterr().out, "failures are counted by reason"


def test_protected_spans_survive_a_translator_that_changes_everything(translator, monkeypatch):
    monkeypatch.setattr(translate, "translate_sentences",
                        lambda texts, direction, beams, no_repeat=0: [(text.upper(), None) for text in texts])
    out = translate.translate([DOCUMENT], "en", "sw", translator)[0]
    for kept in ("`code. Inside`", "https://a.example/x?y=z", 'print("do. Not. Touch")', "$x^2$",
                 "{placeholder}", "😀", "|:---|---|", "$$ E = mc^2. A $$"):
        assert kept in out
    assert "LIST ITEM WITH" in out and out.count("\n") == DOCUMENT.count("\n")


def test_a_lost_mark_sends_the_texts_around_it_on_their_own(translator, monkeypatch):
    calls = []

    def forgetful(texts, direction, beams, no_repeat=0):
        calls.append(list(texts))
        return [(text.replace("[0]", "").upper(), None) for text in texts]

    monkeypatch.setattr(translate, "translate_sentences", forgetful)
    assert translate.translate(["use `ls -l` to list"], "en", "sw", translator) == ["USE `ls -l` TO LIST"]
    assert ["to list", "use"] in calls
    assert translate.translate(["See (the page [https://a.example], *or* not)!"], "en", "sw", translator) == [
        "SEE (THE PAGE [https://a.example], *OR* NOT)!"]


def test_long_paragraphs_reach_the_model_in_parts_that_fit(translator, echo):
    text = "the inner heat in a `long. span` there, then " * 30 + "end. " + "antheninanther" * 20 + "."
    assert translate.translate([text], "en", "sw", translator) == [text]
    direction = translate.Direction(translator, "en", "sw")
    assert len(echo) > 4 and all(direction.fits(markup.hide(segment)[0]) for segment in echo)
    assert all(segment.count("[") == segment.count("]") for segment in echo)


def test_languages_without_spaces_get_none_between_sentences(translator, echo):
    assert translate.translate(["One. Two.\nThree. Four."], "en", "zh", translator) == [
        "One.Two.\nThree.Four."]
    assert translate.translate(["一。二。\n三。"], "zh", "de", translator) == ["一。 二。\n三。"]
    kept = "Run these. `ls`. `cd`! https://a.example. https://b.example! Then go."
    assert translate.translate([kept], "en", "zh", translator) == [kept], "two links would be one"


# ---- checks ----

def judge(translator, source, text, target="sw", ids=None):
    direction = translate.Direction(translator, "en", target)
    ids = list(range(10, 10 + len(text.split()))) + [END] if ids is None else ids
    return direction.fault(source, [5, 6, 7], text, ids)


LONG = "the quick brown fox jumps over the lazy dog and then it sleeps for a while"


@pytest.mark.parametrize("source, text, target, ids, reason", [
    (LONG, "Mbweha mwepesi wa kahawia anaruka juu ya mbwa mvivu kisha analala kidogo", "sw", None, None),
    (LONG, "敏捷的棕色狐狸跳过懒狗，然后睡了一会儿", "zh", None, None),
    ("Yes.", "Ndiyo.", "sw", None, None),
    ("The lion is a mammal.", "狮子是哺乳动物。", "zh", None, None),
    ("What is it?", "그것은 무엇인가요?", "ko", None, None),
    ("Paris", "Paris", "sw", None, None),
    (LONG, "Mbweha mwepesi", "sw", [10, 11], "cut at the limit"),
    (LONG, "", "sw", None, "empty"), ("Open the door.", "-", "sw", None, "empty"),
    ("THE LION IS ONE BIG MAMMAL", "THE LION IS ONE BIG MAMMAL", "sw", None, "copied"),
    (LONG, "samahani " * 12, "sw", [9, 10] * 12 + [END], "repetition"),
    (LONG, "Der schnelle braune Fuchs springt", "zh", None, "wrong script"),
    (LONG, "敏捷的棕色狐狸跳过懒狗，然后睡了一会儿", "sw", None, "wrong script"),
    (LONG, LONG + ".", "sw", None, "copied"),
    (LONG, "Mbweha.", "sw", None, "length"),
    (LONG, "敏捷的棕色狐狸跳过懒狗，然后睡了一会儿" * 6, "zh", None, "length"),
])
def test_every_fault_has_its_name_and_good_translations_none(translator, source, text, target, ids, reason):
    assert judge(translator, source, text, target, ids) == reason


def test_bold_that_came_back_by_halves_is_left_out():
    assert translate.without_half_marks("**Go** home", "**Nenda nyumbani") == "Nenda nyumbani"
    assert translate.without_half_marks("**Go** home", "**Nenda** ~~nyumbani") == "**Nenda** nyumbani"
    assert translate.without_half_marks("2**3 is 8", "2**3 ni 8") == "2**3 ni 8"
    # a span's own marks are hidden while it is translated
    assert translate.without_half_marks("[0] is **bold**", "[0] ni **nzito") == "[0] ni nzito"


def test_quoted_english_in_another_script_is_not_copied_and_chinese_is_not_japanese():
    source = "将以下句子更改为主动语态：The presentation was given by our manager."
    assert not translate.copied(source, "Make it active: The presentation was given by our manager.", "zh")
    assert translate.copied("نهر طويل جدا", "نهر طويل جدا", "ar")
    chinese = "敏捷的棕色狐狸跳过懒狗然后睡了一会儿又醒来看见了河流"
    assert translate.wrong_script(chinese, "ja") and not translate.wrong_script(chinese + "です", "ja")
    assert not translate.wrong_script("東京都知事選挙", "ja")


def test_people_s_translations_raise_no_alarm(translator):
    file = SHARED / "parallel" / "ntrex_1000.jsonl"
    if not file.exists():
        pytest.skip("no shared data")
    alarms = {}
    for line in file.read_text("utf-8").splitlines():
        row = json.loads(line)
        for code in ("de", "zh", "ko", "id", "sw", "yo"):
            reason = judge(translator, row["en"], row[code], code) if code in row else None
            alarms[reason] = alarms.get(reason, 0) + 1
    assert sum(n for reason, n in alarms.items() if reason) <= 5, alarms


def test_loops_are_seen_at_any_period_and_plain_text_is_not_one():
    assert loops([7] * 9 + [1, 2]) and loops([1, 2, 3] * 4)
    assert loops(list(range(20)) * 3)
    assert not loops([5, 5, 5, 5, 1, 2, 3, 1, 2, 3, 4]) and not loops([])


def test_a_failed_segment_is_tried_again_and_then_marked(translator, monkeypatch):
    def stubborn(texts, direction, beams, no_repeat=0):
        return [("good" if no_repeat and "mend" in text else text,
                 None if no_repeat and "mend" in text else "length") for text in texts]

    monkeypatch.setattr(translate, "translate_sentences", stubborn)
    known = translate.translate_segments(["mend me", "hopeless"], translate.Direction(translator, "en", "sw"))
    assert known == {"mend me": ("good", None), "hopeless": ("hopeless", "length")}


# ---- rows ----

def make_rows(count):
    return [{"row_id": f"r{i}", "split": "train",
             "en": {"prompt": f"what is {i}?", "response": f"it is\n{i} things."}} for i in range(count)]


@pytest.fixture
def shout(monkeypatch):
    """A quick translator: upper case, "length" for what holds a 5. The list fills with what it translated."""
    seen = []

    def translate_sentences(texts, direction, beams, no_repeat=0):
        seen.extend(texts)
        return [(f"{direction.target} {text.upper()}", "length" if "5" in text else None) for text in texts]

    monkeypatch.setattr(translate, "translate_sentences", translate_sentences)
    return seen


def test_a_run_killed_after_any_byte_ends_with_the_same_file(translator, tmp_path, shout, monkeypatch):
    monkeypatch.setattr(translate, "CHUNK", 2)
    rows, whole = make_rows(7), tmp_path / "whole.jsonl"
    expected = translate.translate_rows(rows, translator, "en", "sw", whole)
    raw = whole.read_bytes()
    for size in [*range(0, len(raw), 97), len(raw) - 1, len(raw)]:
        path = tmp_path / "cut.jsonl"
        path.write_bytes(raw[:size])
        shout.clear()
        assert translate.translate_rows(rows, translator, "en", "sw", path) == expected
        assert path.read_bytes() == raw
        assert bool(shout) == (size < len(raw))


def test_a_failed_row_is_left_out_until_it_is_asked_for(translator, tmp_path, shout):
    rows, path = make_rows(7), tmp_path / "out.jsonl"
    kept = translate.translate_rows(rows, translator, "en", "sw", path)
    assert [row["row_id"] for row in kept] == ["r0", "r1", "r2", "r3", "r4", "r6"]
    assert kept[0] == rows[0] | {"sw": {"prompt": "sw WHAT IS 0?", "response": "sw IT IS\nsw 0 THINGS."}}
    readable = [row for row in read_rows(path) if "sw" in languages_of(row)]
    assert [row["row_id"] for row in readable] == [row["row_id"] for row in kept]
    failed = json.loads(path.read_text().splitlines()[5])
    assert failed["clo"]["failed"] == {"sw": {"length": 2}} and "sw" not in failed
    shout.clear()
    assert len(translate.translate_rows(rows, translator, "en", "sw", path, keep_failed=True)) == 7
    assert not shout and "sw" in json.loads(path.read_text().splitlines()[5])


def test_changed_rows_are_translated_again_and_the_old_file_is_kept(translator, tmp_path, shout, capsys):
    rows, path = make_rows(4), tmp_path / "out.jsonl"
    translate.translate_rows(rows, translator, "en", "sw", path)
    before = path.read_bytes()
    shout.clear()
    rows[2]["en"]["prompt"] = "another question?"
    translate.translate_rows(rows[1:], translator, "en", "sw", path)
    assert "another question?" in shout and "what is 1?" not in shout
    assert ids_in(path) == ["r0", "r1", "r2", "r3"]
    said = capsys.readouterr().out
    assert "1 of 4 lines" in said and "out.jsonl.old-1" in said and "holds 1 rows that this command" in said
    assert (tmp_path / "out.jsonl.old-1").read_bytes() == before
    translate.translate_rows(rows, translator, "en", "sw", path, beams=3)
    assert "4 of 4 lines" in capsys.readouterr().out
    assert ids_in(tmp_path / "out.jsonl.old-2") == ids_in(path)


def ids_in(path):
    return sorted(json.loads(line)["id"] for line in path.read_text().splitlines())


def test_a_kill_while_the_file_is_made_anew_loses_nothing(translator, tmp_path, shout, monkeypatch):
    rows, path = make_rows(4), tmp_path / "out.jsonl"
    expected = translate.translate_rows(rows, translator, "en", "sw", path)
    before = path.read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(translated, "write_jsonl", killed)
        translate.translate_rows(rows, translator, "en", "sw", path, beams=2)
    assert path.read_bytes() == before
    shout.clear()
    assert translate.translate_rows(rows, translator, "en", "sw", path) == expected and not shout


def test_a_link_stays_a_link_and_people_s_translation_takes_the_place_of_ours(translator, tmp_path, shout):
    rows, path, link = make_rows(2), tmp_path / "disk" / "real.jsonl", tmp_path / "out.jsonl"
    path.parent.mkdir()
    link.symlink_to(path)
    translate.translate_rows(rows, translator, "en", "sw", link)
    rows[1]["sw"] = {"prompt": "swali", "response": "jibu"}
    again = translate.translate_rows(rows, translator, "en", "sw", link)
    assert again[1]["sw"] == rows[1]["sw"] and again[0]["sw"]["prompt"] == "sw WHAT IS 0?"
    assert link.is_symlink() and ids_in(path) == ["r0", "r1"]


@pytest.mark.parametrize("first, second", [("sw", "de"), ("sw", ["sw", "de"]), (["de", "sw"], "sw")])
def test_a_file_of_other_languages_is_refused_and_left_alone(translator, tmp_path, shout, first, second):
    path = tmp_path / "out.jsonl"
    translate.translate_rows(make_rows(3), translator, "en", first, path)
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"out.jsonl:1 is a translation into .*give another file name"):
        translate.translate_rows(make_rows(3), translator, "en", second, path)
    assert [path.read_bytes(), *tmp_path.iterdir()] == [before, path]


def test_the_order_of_the_languages_is_no_other_translation_to_the_reader(translator, tmp_path, shout):
    path = tmp_path / "out.jsonl"
    translate.translate_rows(make_rows(2), translator, "en", ["de", "sw"], path)
    shout.clear()
    assert len(translate.translate_rows(make_rows(2), translator, "en", ["sw", "de"], path)) == 2
    assert not shout


def test_two_languages_share_a_line_and_indonesian_keeps_its_key(translator, tmp_path, shout):
    path = tmp_path / "out.jsonl"
    rows = translate.translate_rows(make_rows(2), translator, "en", ["id", "de"], path)
    assert rows[0]["id"]["prompt"] == "id WHAT IS 0?" and rows[0]["de"]["prompt"] == "de WHAT IS 0?"
    again = read_rows(path)
    assert again[1]["row_id"] == "r1" and set(languages_of(again[1])) == {"en", "id", "de"}


def test_a_language_that_is_there_is_not_translated(translator, tmp_path, shout):
    rows = [row | {"sw": {"prompt": "swali", "response": "jibu"}} for row in make_rows(1)]
    assert translate.translate_rows(rows, translator, "en", "sw", tmp_path / "o.jsonl") == rows and not shout


@pytest.mark.parametrize("damage", [
    lambda record: record.update(sw=5), lambda record: record.update(sw={"prompt": "x", "response": 5}),
    lambda record: record.update(sw=None), lambda record: record.pop("sw"),
    lambda record: record.update(id="\ud800"), lambda record: record["clo"].update(failed={"sw": 5}),
    lambda record: record["clo"].update(failed=5), lambda record: record["clo"].update(hash=[]),
    lambda record: record["clo"].update(into=[5]), lambda record: record["clo"].pop("into")])
def test_a_damaged_line_is_named_and_the_file_left_alone(translator, tmp_path, shout, damage):
    path = tmp_path / "out.jsonl"
    translate.translate_rows(make_rows(2), translator, "en", "sw", path)
    first, second = map(json.loads, path.read_text().splitlines())
    damage(second)
    path.write_text(f"{json.dumps(first)}\n{json.dumps(second)}\n")
    before = path.read_bytes()
    with pytest.raises(InputError, match="out.jsonl:2: not written by translate.py, or damaged: .*the line"):
        translate.translate_rows(make_rows(2), translator, "en", "sw", path)
    assert path.read_bytes() == before


def test_a_file_of_someone_else_is_left_alone(translator, tmp_path, shout):
    path = tmp_path / "english.jsonl"
    write_rows(path, make_rows(2))
    before = path.read_bytes()
    with pytest.raises(InputError, match="english.jsonl:1: not written by translate.py"):
        translate.translate_rows(make_rows(2), translator, "en", "sw", path)
    assert path.read_bytes() == before


def test_the_real_model_runs_through_rows(translator, tmp_path):
    rows = translate.translate_rows(make_rows(3), translator, "en", "de", tmp_path / "o.jsonl", 2,
                                    keep_failed=True)
    assert len(rows) == 3 and all(row["de"]["response"].count("\n") == 1 for row in rows)


def test_a_file_that_another_process_writes_is_refused(translator, tmp_path, shout):
    path = tmp_path / "out.jsonl"
    told = f"out.jsonl is being written by process {os.getpid()} on .* since "
    with locked(path), pytest.raises(InputError, match=told):
        translate.translate_rows(make_rows(2), translator, "en", "sw", path)
    assert not path.exists() and not shout


# ---- command line ----

@pytest.mark.parametrize("other_name", [
    lambda data: data, lambda data: data.parent / "." / data.name, lambda data: data.parent / "symlink",
    lambda data: data.parent / "hard link", lambda data: data.parent / "sub" / ".." / data.name,
    lambda data: data.parent / "linked" / data.name, lambda data: data.with_suffix("")])
def test_out_never_overwrites_the_data_whatever_its_name(checkpoint, tmp_path, other_name, monkeypatch):
    data = tmp_path / "rows.jsonl.tmp"
    write_rows(data, make_rows(3))
    before = data.read_bytes()
    (tmp_path / "symlink").symlink_to(data)
    (tmp_path / "hard link").hardlink_to(data)
    (tmp_path / "sub").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path)
    monkeypatch.setattr(sys, "argv", command(checkpoint, data, other_name(data))[1:])
    with pytest.raises(InputError, match="--out .* would overwrite .*, which is read"):
        translate.main()
    assert data.read_bytes() == before


def test_out_is_a_file(checkpoint, tmp_path, monkeypatch):
    data = tmp_path / "rows.jsonl"
    write_rows(data, make_rows(3))
    for out in (tmp_path, Path("/dev/zero")):
        monkeypatch.setattr(sys, "argv", command(checkpoint, data, out)[1:])
        with pytest.raises(InputError, match=f"--out {out} is no file: give the name of one"):
            translate.main()


def test_what_is_left_out_of_the_data_is_said_and_a_language_named_twice_is_one(
        checkpoint, tmp_path, monkeypatch, capsys, shout):
    data, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    write_rows(data, [*make_rows(3), {"row_id": "empty", "en": {"prompt": "", "response": "a"}}])
    monkeypatch.setattr(sys, "argv", command(checkpoint, data, out, lang="sw,swh_Latn")[1:])
    translate.main()
    said = capsys.readouterr().out
    assert "4 read, 3 kept, 1 skipped: empty prompt (first: rows.jsonl:4)" in said
    assert said.count("rows translated") == 1
    assert {*map(str, (json.loads(line)["clo"]["into"] for line in open(out)))} == {"['sw']"}


def test_a_full_disk_is_one_line_that_names_the_file(translator, tmp_path, full_disk, shout):
    with full_disk(300), pytest.raises(InputError, match="out.jsonl cannot be written .*: make room"):
        translate.translate_rows(make_rows(3), translator, "en", "sw", tmp_path / "out.jsonl")


def test_a_text_is_printed_and_the_checks_complain_on_stderr(checkpoint, monkeypatch, capsys, shout):
    argv = ["translate.py", "--lang", "sw,de", "--translator", str(checkpoint), "--device", "cpu", "--text"]
    monkeypatch.setattr(sys, "argv", [*argv, "Five. 5 lions."])
    translate.main()
    said = capsys.readouterr()
    assert said.out == "sw FIVE. sw 5 LIONS.\nde FIVE. de 5 LIONS.\n"
    assert "sw: 1 of the text's segments failed a check: length" in said.err
    for lang, unknown in (("fr", "fr"), ("sw,xx", "xx")):
        argv[2] = lang
        monkeypatch.setattr(sys, "argv", [*argv, "Five."])
        with pytest.raises(InputError, match=f"does not know the language '{unknown}'"):
            translate.main()
        assert capsys.readouterr().out == "", "nothing is printed before all languages are known"

def command(checkpoint, rows, out, *launcher, lang="sw,de"):
    """translate.py in a process of its own; a random translator's work fails its checks and is filed
    all the same."""
    return [sys.executable, *launcher, "translate.py", "--lang", lang, "--data", str(rows), "--out", str(out),
            "--translator", str(checkpoint), "--beams", "2", "--device", "cpu"]


def run(*words):
    """One thread each: sums of a different number of threads are rounded differently."""
    done = subprocess.run(words, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_two_processes_write_the_file_of_one(checkpoint, tmp_path):
    one, two, rows = tmp_path / "one.jsonl", tmp_path / "two.jsonl", tmp_path / "rows.jsonl"
    write_rows(rows, make_rows(32 + 5))
    alone = run(*command(checkpoint, rows, one))
    torchrun = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"
    together = run(*command(checkpoint, rows, two, *torchrun))
    assert one.read_bytes() == two.read_bytes() and one.read_bytes().count(b"\n") == 37
    assert together.stdout.replace(str(two), str(one)) == alone.stdout, (
        "one process prints, and counts the same faults")
    whole = two.read_bytes()
    two.write_bytes(whole[:len(whole) // 2])
    run(*command(checkpoint, rows, two, *torchrun))
    assert sorted(two.read_bytes().split(b"\n")) == sorted(whole.split(b"\n"))


@pytest.mark.slow
def test_a_process_killed_without_warning_goes_on_where_it_was(checkpoint, tmp_path):
    rows, whole, out = tmp_path / "rows.jsonl", tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    write_rows(rows, make_rows(128))
    run(*command(checkpoint, rows, whole, lang="sw"))
    out.touch()
    for _ in range(3):
        size = out.stat().st_size
        process = subprocess.Popen(command(checkpoint, rows, out, lang="sw"), cwd=ROOT, stderr=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
        while process.poll() is None and out.stat().st_size == size:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert size < out.stat().st_size <= whole.stat().st_size, "the kill was to come in the middle"
        assert whole.read_bytes().startswith(out.read_bytes()[:size]), "what was finished stays"
    run(*command(checkpoint, rows, out, lang="sw"))
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(tmp_path.iterdir()) == [out, rows, whole], "the killed one's lock is gone"
