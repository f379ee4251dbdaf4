import json
from pathlib import Path

import pytest

from demo import render
from demo.render import LANGUAGES, particle
from engine.files import InputError
from formats.chat import load_tokenizer
from formats.records import read_rows, write_rows

DEMO = Path(render.__file__).parent


@pytest.fixture(scope="module")
def world():
    return render.read_world()


@pytest.fixture(scope="module")
def splits(world):
    return render.split_facts(world, seed=0)


def small_world(**changes):
    """A sound world of one relation as its file holds it, with some of its parts replaced."""
    texts = {"questions": ["what is {s}?", "which is {s}?"], "statement": "{s} is {o}."}
    chinese = {"questions": ["{s}是什么？", "什么是{s}？"], "statement": "{s}是{o}。"}
    of_language = {lang: {key: value if key == "statement" else list(value) for key, value in
                          (chinese if lang == "zh" else texts).items()} for lang in LANGUAGES}
    for lang in ("de", "ko", "id", "sw", "yo"):  # sentences must differ between languages
        of_language[lang]["statement"] = f"{lang} {{s}} {{o}}."
    entities = {name: {lang: f"{name} {lang}" for lang in LANGUAGES} for name in ("cat", "dog", "animal")}
    return {"relations": {"kind": of_language}, "entities": entities,
            "facts": [["kind", "cat", "animal"], ["kind", "dog", "animal"]]} | changes


def three_sentences(world, fact, lang):
    return [world.question(fact, lang, 0), world.question(fact, lang, 1), world.statement(fact, lang)]


def read(tmp_path, content):
    (tmp_path / "small.json").write_text(json.dumps(content), encoding="utf-8")
    return render.read_world(tmp_path)


# ---- sentences

@pytest.mark.parametrize("word, pair, right", [
    ("고양이", "은/는", "는"), ("독일", "은/는", "은"), ("독일", "이/가", "이"), ("프랑스", "을/를", "를"),
    ("빵", "이에요/예요", "이에요"), ("서울", "으로/로", "로"), ("부산", "으로/로", "으로"), ("파리", "으로/로", "로"),
    ("4", "은/는", "는"), ("100", "이/가", "이")])
def test_korean_particles_follow_the_last_sound(word, pair, right):
    assert particle(word, *pair.split("/")) == right


def test_a_particle_after_latin_letters_is_refused():
    with pytest.raises(InputError, match="Hangul"):
        particle("CD", "은", "는")


def test_sentences_use_forms_particles_and_a_capital(tmp_path):
    content = small_world()
    content["entities"]["cat"] |= {"de": {"": "der Kater", "acc": "den Kater"}, "ko": "고양이"}
    content["relations"]["kind"]["de"]["statement"] = "man nennt {s.acc} {o.acc}."
    content["relations"]["kind"]["ko"]["questions"][0] = "{s}(은/는) 무엇?"
    content["entities"]["dog"]["ko"] = "강"
    world = read(tmp_path, content)
    cat, dog = world.facts
    assert world.statement(cat, "de") == "Man nennt den Kater animal de."
    assert world.question(cat, "ko", 0) == "고양이는 무엇?"
    assert world.question(dog, "ko", 0) == "강은 무엇?"
    assert world.question(cat, "en", 1) == "Which is cat en?"


def test_every_fact_renders_in_every_language(world):
    for lang in LANGUAGES:
        marks = ("？", "？", "。") if lang == "zh" else ("?", "?", ".")
        for fact in world.facts:
            sentences = three_sentences(world, fact, lang)
            assert len(set(sentences)) == 3
            for sentence, mark in zip(sentences, marks):
                assert sentence.endswith(mark) and not set("{}()|\0\n") & set(sentence)
                assert "  " not in sentence and not sentence[0].islower()


def test_pieces_join_to_the_sentence(world):
    for lang in LANGUAGES:
        sentences = [sentence for fact in world.facts for sentence in three_sentences(world, fact, lang)]
        assert ["".join(pieces) for pieces in world.sentence_pieces(lang)] == sentences


def test_a_statement_fits_the_pattern_of_its_relation_and_language_only(world):
    fact = world.facts[0]
    for lang in LANGUAGES:
        fits = render.statement_pattern(world, fact.relation, lang).fullmatch
        assert [other for other in LANGUAGES if fits(world.statement(fact, other))] == [lang]


# ---- checks

@pytest.mark.parametrize("spoil, complaint", [
    (lambda w: w["facts"].append(["kind", "cow", "animal"]), "'cow' is not defined"),
    (lambda w: w["facts"].append(["kind", "cat", "dog"]), "'kind.cat' has 2 answers"),
    (lambda w: w["entities"]["cat"].pop("yo"), "'cat': no yo"),
    (lambda w: w["entities"]["cat"].update(fr="chat"), "'fr' is no language"),
    (lambda w: w["entities"]["cat"].update(de={"acc": "den Kater"}), "a form without the plain one"),
    (lambda w: w["entities"]["cat"].update(sw=w["entities"]["dog"]["sw"]), "in sw and kind.cat in sw"),
    (lambda w: w["entities"].update(cow=w["entities"]["cat"]), "'cow' is in no fact"),
    (lambda w: w["relations"]["kind"]["en"].update(statement="{s} is."), "must hold"),
    (lambda w: w["relations"]["kind"]["en"]["questions"].pop(), "two different questions"),
    (lambda w: w["relations"]["kind"]["zh"].update(statement="{s}是{o}."), "must end with"),
    (lambda w: w["relations"]["kind"]["de"].update(statement="{s} ist  {o}."), "stray spaces"),
    (lambda w: w["relations"]["kind"]["de"].update(statement="die {s.gen} {o}."), "has a form 'gen'"),
    (lambda w: w["relations"]["kind"].pop("ko"), "'kind': no ko")])
def test_a_fault_in_the_world_is_named(tmp_path, spoil, complaint):
    content = small_world()
    assert len(read(tmp_path, content).facts) == 2
    spoil(content)
    with pytest.raises(InputError, match=complaint):
        read(tmp_path, content)


def test_a_broken_world_file_is_named_with_its_line(tmp_path):
    (tmp_path / "small.json").write_text('{"relations": {},\n "entities"}', encoding="utf-8")
    with pytest.raises(InputError, match=r"small.json:2: not JSON"):
        render.read_world(tmp_path)


# ---- splits and files

def test_splits_are_disjoint_and_complete_by_fact(world, splits):
    ids = [fact.id for facts in splits.values() for fact in facts]
    assert sorted(ids) == sorted(fact.id for fact in world.facts)
    assert len(set(ids)) == len(ids)
    for split, part in render.HELD_OUT.items():
        assert abs(len(splits[split]) - part * len(ids)) < 2


def test_every_entity_and_relation_is_in_a_training_fact(world, splits):
    assert {key for fact in splits["train"] for key in (fact.subject, fact.object)} == set(world.entities)
    assert {fact.relation for fact in splits["train"]} == set(world.relations)


def test_another_seed_splits_otherwise(world, splits):
    assert render.split_facts(world, seed=0) == splits
    assert render.split_facts(world, seed=1)["test"] != splits["test"]


def test_the_data_files_are_what_the_world_gives(world, splits, tmp_path):
    for name, rows in (("english.jsonl", render.training_rows(world, splits)),
                       ("eval.jsonl", render.evaluation_rows(world, splits))):
        write_rows(tmp_path / name, rows)
        made, committed = tmp_path / name, DEMO / name
        assert made.read_bytes() == committed.read_bytes(), f"{name} is out of date: run python -m demo.build"


def test_training_rows_hold_no_held_out_fact():
    trained = {row["row_id"].rpartition(".")[0] for row in read_rows(DEMO / "english.jsonl")}
    held_out = read_rows(DEMO / "eval.jsonl")
    assert not trained & {row["row_id"].rpartition(".")[0] for row in held_out}
    assert {row["split"] for row in held_out} == {"validation", "test"}
    assert all(set(LANGUAGES) <= set(row) for row in held_out)


# ---- the build

def test_the_tokenizers_of_the_demo_keep_every_sentence(world):
    tokenizer = load_tokenizer(DEMO / "llama")
    for lang in LANGUAGES:
        for fact in world.facts:
            sentence = world.statement(fact, lang)
            assert tokenizer.decode(tokenizer.text_ids(sentence)) == sentence


@pytest.mark.slow
def test_the_tiny_build_makes_a_whole_demo_twice_the_same(tmp_path):
    pytest.importorskip("sentencepiece")
    from demo import build
    for name in ("first", "second"):
        build.main(["--tiny", "--out", str(tmp_path / name)])
    first, second = tmp_path / "first", tmp_path / "second"
    assert sorted(path.name for path in first.iterdir()) == sorted(build.PRODUCTS)
    files = [path.relative_to(first) for path in first.rglob("*") if path.is_file()]
    assert {Path("llama/model.safetensors"), Path("m2m100/model.safetensors")} <= set(files)
    for path in files:
        assert (first / path).read_bytes() == (second / path).read_bytes(), path


@pytest.mark.slow
def test_a_killed_build_goes_on_where_it_was(tmp_path, monkeypatch):
    pytest.importorskip("sentencepiece")
    from demo import build, train_translator

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_translator, "train", killed)
        with pytest.raises(KeyboardInterrupt):
            build.main(["--tiny", "--out", str(tmp_path)])
    base = tmp_path / ".build" / "llama" / "model.safetensors"
    made = base.stat().st_mtime_ns
    build.main(["--tiny", "--out", str(tmp_path)])
    assert (tmp_path / "llama" / "model.safetensors").stat().st_mtime_ns == made
    assert not (tmp_path / ".build").exists()
