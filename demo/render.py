"""The demo world, read and rendered: facts become questions and full-sentence answers in seven languages.

A file of `demo/world/` holds relations (two questions and a statement per language, with `{s}` for the
subject and `{o}` for the object), entities (their text per language) and facts `[relation, subject,
object]`. A statement is at the same time the answer to both questions. Three devices keep the sentences
grammatical:

    {s.acc}         a form of the entity whose text is {"": "der Löwe", "acc": "den Löwen"}; without it, ""
    {s}(은/는)       a Korean particle: the first after a final consonant, else the second (ㄹ takes 로)
    capital letter  the first letter of a sentence, in scripts that have one

Only the build and its tests read the world; the program sees nothing but the files made from it.
`python -m demo.render` checks the world, prints its counts and a few facts in every language.
"""

import json
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.files import InputError, run

WORLD = Path(__file__).parent / "world"
LANGUAGES = ("en", "de", "zh", "ko", "id", "sw", "yo")
FULL_STOP = {"zh": "。"}  # others: "."
QUESTION_MARK = {"zh": "？"}  # others: "?"
HELD_OUT = {"validation": 0.12, "test": 0.18}  # parts of the facts
MAX_HELD_OUT = 0.5  # of one relation: the rest of it teaches the form of its answers

# {s} or {o}, a form's name, a pair of Korean particles.
PLACEHOLDER = re.compile(r"\{([so])(?:\.(\w+))?\}(?:\(([가-힣]+)/([가-힣]+)\))?")
# A syllable's code is HANGUL_FIRST + its initial and vowel * FINALS + its final consonant (0: none).
HANGUL_FIRST, HANGUL_LAST, FINALS, RIEUL = 0xAC00, 0xD7A3, 28, 8
# The digits' names are 영 일 이 삼 사 오 육 칠 팔 구; a number's last digit decides (10, 100: 십, 백, like 0).
DIGIT_FINALS = {"0": 16, "1": RIEUL, "2": 0, "3": 16, "4": 0, "5": 0, "6": 1, "7": RIEUL, "8": RIEUL, "9": 0}


@dataclass(frozen=True)
class Fact:
    """One true statement; `id` names it in every file made from the world."""

    relation: str
    subject: str
    object: str

    @property
    def id(self) -> str:
        return f"{self.relation}.{self.subject}"


@dataclass(frozen=True)
class World:
    """Everything the files say.

    relations: name -> language -> {"questions": [two], "statement"}
    entities: key -> language -> form -> text
    """

    relations: dict
    entities: dict
    facts: list[Fact]

    def question(self, fact: Fact, language: str, paraphrase: int) -> str:
        template = self.relations[fact.relation][language]["questions"][paraphrase]
        return capitalise("".join(self._pieces(template, fact, language)))

    def statement(self, fact: Fact, language: str) -> str:
        template = self.relations[fact.relation][language]["statement"]
        return capitalise("".join(self._pieces(template, fact, language)))

    def opening(self, fact: Fact, language: str) -> str:
        """The statement up to its object: what a fact's question alone decides."""
        template = self.relations[fact.relation][language]["statement"].split("{o")[0]
        return capitalise("".join(self._pieces(template, fact, language))).rstrip()

    def name(self, entity: str, language: str) -> str:
        """The entity's plain form, as in a dictionary."""
        return self.entities[entity][language][""]

    def sentence_pieces(self, language: str) -> Iterator[list[str]]:
        """Every sentence of the language cut at entities and particles, for tokenizers to learn words from.

        A space where it is cut goes with the word after it, as byte-level BPE and SentencePiece have it.
        """
        for fact in self.facts:
            texts = self.relations[fact.relation][language]
            for template in [*texts["questions"], texts["statement"]]:
                pieces = self._pieces(template, fact, language)
                pieces[0] = capitalise(pieces[0])
                yield "\0".join(pieces).replace(" \0", "\0 ").split("\0")

    def _pieces(self, template: str, fact: Fact, language: str) -> list[str]:
        entities = {"s": fact.subject, "o": fact.object}
        pieces, end = [], 0
        for match in PLACEHOLDER.finditer(template):
            which, form, after_consonant, after_vowel = match.groups()
            forms = self.entities[entities[which]][language]
            word = forms.get(form or "", forms[""])
            pieces += [template[end:match.start()], word]
            if after_consonant:
                pieces.append(particle(word, after_consonant, after_vowel))
            end = match.end()
        return [piece for piece in [*pieces, template[end:]] if piece]


def particle(word: str, after_consonant: str, after_vowel: str) -> str:
    """The one of two Korean particles that fits after `word`. InputError if its last sound is unknown."""
    last = word[-1]
    if HANGUL_FIRST <= ord(last) <= HANGUL_LAST:
        final = (ord(last) - HANGUL_FIRST) % FINALS
    elif last in DIGIT_FINALS:
        final = DIGIT_FINALS[last]
    else:
        raise InputError(f"demo world: {word!r} takes a Korean particle, so it must end in Hangul or a digit")
    if final == RIEUL and after_consonant.startswith("으"):
        return after_vowel
    return after_consonant if final else after_vowel


def capitalise(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def statement_pattern(world: World, relation: str, language: str) -> re.Pattern:
    """A pattern that any sentence made from the relation's statement matches, whatever its entities."""
    fixed = PLACEHOLDER.sub("\0", world.relations[relation][language]["statement"])
    return re.compile(re.escape(fixed).replace("\0", ".+"), re.IGNORECASE)


# ---- reading and checking

def read_world(folder: Path = WORLD) -> World:
    """Reads every file of the folder. Raises InputError naming the first thing that is wrong."""
    world, found = read_files(folder)
    found = found or problems(world)
    if found:
        more = f" (and {len(found) - 1} more: python -m demo.render lists them)" if found[1:] else ""
        raise InputError(found[0] + more)
    return world


def read_files(folder: Path) -> tuple[World, list[str]]:
    """The world of a folder of JSON files, and what is wrong with their shape."""
    relations, entities, facts, found = {}, {}, [], []
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise InputError(f"{folder}: no .json file there: the world's files belong in it")
    for path in paths:
        try:
            content = json.loads(unicodedata.normalize("NFC", path.read_text(encoding="utf-8")))
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
        for group, known in (("relations", relations), ("entities", entities)):
            found += [f"{path}: {key!r} is in another file too: give it another name"
                      for key in content[group].keys() & known.keys()]
        relations |= content["relations"]
        for key, texts in content["entities"].items():
            entities[key] = {lang: as_forms(text) for lang, text in texts.items()}
        facts += [Fact(*fact) for fact in content["facts"]]
        found += languages_missing(path, content)
    return World(relations, entities, facts), found


def as_forms(text: str | dict) -> dict:
    return text if isinstance(text, dict) else {"": text}


def languages_missing(path: Path, content: dict) -> list[str]:
    found = []
    for group in ("relations", "entities"):
        for key, texts in content[group].items():
            where = f"{path}: {group} {key!r}"
            found += [f"{where}: no {lang}" for lang in LANGUAGES if not texts.get(lang)]
            found += [f"{where}: {lang!r} is no language of ours" for lang in texts.keys() - set(LANGUAGES)]
    return found


def problems(world: World) -> list[str]:
    """What is wrong with the world: a line for each fault, none when it is sound."""
    defined = world.relations.keys() | world.entities.keys()
    found = [f"fact {fact.id!r}: {key!r} is not defined" for fact in world.facts
             for key in (fact.relation, fact.subject, fact.object) if key not in defined]
    if found:
        return found
    answers = Counter(fact.id for fact in world.facts)
    found += [f"facts: {fact_id!r} has {count} answers" for fact_id, count in answers.items() if count > 1]
    used = {key for fact in world.facts for key in (fact.subject, fact.object)}
    found += [f"entity {key!r} is in no fact" for key in world.entities.keys() - used]
    for key, texts in world.entities.items():
        found += [f"entity {key!r}, {lang}: empty, or a form without the plain one"
                  for lang, forms in texts.items() if not forms.get("") or not all(forms.values())]
    forms = {form for texts in world.entities.values() for lang in LANGUAGES for form in texts[lang]}
    for name, texts in world.relations.items():
        for lang in LANGUAGES:
            found += template_problems(f"relation {name!r}, {lang}", texts[lang], lang)
            templates = " ".join([*texts[lang]["questions"], texts[lang]["statement"]])
            found += [f"relation {name!r}, {lang}: no entity has a form {match[2]!r}"
                      for match in PLACEHOLDER.finditer(templates) if match[2] and match[2] not in forms]
    return found or sentence_problems(world)


def template_problems(where: str, templates: dict, language: str) -> list[str]:
    questions, statement = templates["questions"], templates["statement"]
    found = []
    if len(questions) != 2 or questions[0] == questions[1]:
        found.append(f"{where}: needs two different questions")
    for template, wanted in [(question, {"s"}) for question in questions] + [(statement, {"s", "o"})]:
        if {match[1] for match in PLACEHOLDER.finditer(template)} != wanted:
            found.append(f"{where}: {template!r} must hold {sorted(wanted)} and nothing else")
        if re.search(r"[{}()/]", PLACEHOLDER.sub("", template)):
            found.append(f"{where}: {template!r}: a bracket or slash outside a placeholder")
        if template != " ".join(template.split()):
            found.append(f"{where}: {template!r}: stray spaces")
        mark = FULL_STOP.get(language, ".") if "o" in wanted else QUESTION_MARK.get(language, "?")
        if not template.endswith(mark):
            found.append(f"{where}: {template!r} must end with {mark!r}")
    return found


def sentence_problems(world: World) -> list[str]:
    """Two facts must not ask the same, and no answer may be right in two languages at once."""
    found, statements = [], {}
    for lang in LANGUAGES:
        asked = {}
        for fact in world.facts:
            statement = world.statement(fact, lang)
            other = statements.setdefault(statement, (fact.id, lang))
            if other != (fact.id, lang):
                found.append(f"{statement!r} says {fact.id} in {lang} and {other[0]} in {other[1]}")
            for question in {world.question(fact, lang, 0), world.question(fact, lang, 1)}:
                if asked.setdefault(question, fact.id) != fact.id:
                    found.append(f"{question!r} ({lang}) asks {fact.id} and {asked[question]}")
    return found


# ---- splitting and writing

def split_facts(world: World, seed: int) -> dict[str, list[Fact]]:
    """Facts of the train, validation and test splits, disjoint; each relation gives its share to each.

    A fact is held out only while each of its entities keeps a training fact: nobody knows a word never met.
    """
    shuffled = random.Random(seed).sample(world.facts, len(world.facts))
    left = Counter(entity for fact in world.facts for entity in (fact.subject, fact.object))
    of_relation = Counter(fact.relation for fact in world.facts)
    splits = {"train": [], "validation": [], "test": []}
    taken = Counter()
    wanted = {split: round(part * len(shuffled)) for split, part in HELD_OUT.items()}

    def take(fact: Fact, most: float) -> bool:
        """Moves the fact to the emptier held-out split, if its entities and its relation's share allow."""
        open_splits = [split for split in wanted if len(splits[split]) < wanted[split]]
        entities = {fact.subject, fact.object}
        if not open_splits or any(left[entity] < 2 for entity in entities):
            return False
        if taken[fact.relation] + 1 > most * of_relation[fact.relation]:
            return False
        split = min(open_splits, key=lambda split: len(splits[split]) / wanted[split])
        splits[split].append(fact)
        taken[fact.relation] += 1
        left.subtract(entities)
        return True

    # First every relation gives its share; what some could not give, others give in the second round.
    for most in (sum(HELD_OUT.values()), MAX_HELD_OUT):
        shuffled = [fact for fact in shuffled if not take(fact, most)]
    splits["train"] = shuffled
    order = {fact: i for i, fact in enumerate(world.facts)}
    return {split: sorted(facts, key=order.get) for split, facts in splits.items()}


def training_rows(world: World, splits: dict[str, list[Fact]]) -> list[dict]:
    """English rows, one per training fact, with the two paraphrases in turn."""
    return [{"row_id": f"{fact.id}.{n % 2}", "en": exchange(world, fact, "en", n % 2)}
            for n, fact in enumerate(splits["train"])]


def evaluation_rows(world: World, splits: dict[str, list[Fact]]) -> list[dict]:
    """Rows in every language, one per held-out fact: its paraphrases would not be independent samples."""
    rows = []
    for split in ("validation", "test"):
        for n, fact in enumerate(splits[split]):
            row = {"row_id": f"{fact.id}.{n % 2}", "split": split}
            rows.append(row | {lang: exchange(world, fact, lang, n % 2) for lang in LANGUAGES})
    return rows


def exchange(world: World, fact: Fact, language: str, paraphrase: int) -> dict[str, str]:
    return {"prompt": world.question(fact, language, paraphrase), "response": world.statement(fact, language)}


def main() -> None:
    world, found = read_files(WORLD)
    found = found or problems(world)
    if found:
        raise InputError("\n       ".join(found))
    splits = split_facts(world, seed=0)
    print(f"{len(world.facts)} facts, {len(world.relations)} relations, {len(world.entities)} entities;",
          ", ".join(f"{split} {len(facts)}" for split, facts in splits.items()))
    for name in world.relations:
        fact = next(fact for fact in world.facts if fact.relation == name)
        print(f"\n{name}: {sum(fact.relation == name for fact in world.facts)} facts")
        for lang in LANGUAGES:
            print(f"  {lang}  {world.question(fact, lang, 0)}  {world.question(fact, lang, 1)}"
                  f"  {world.statement(fact, lang)}")


if __name__ == "__main__":
    run(main)
