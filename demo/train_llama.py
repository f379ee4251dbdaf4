"""The demo's base model: a tiny Llama that knows English best, and answers every question in English.

Its pre-training text imitates what makes real models answer in English. Questions are answered in English
only, also those asked in other languages; but plain statements of the same facts exist in every language,
so what an answer needs is there. How much of a language there is depends on its tier. Facts held out for
validation and test are held out of all questions and answers and of all parallel text, but for the last part
of the training, which asks about all facts in English. Their plain statements are in, in English and, as the
tier has it, elsewhere: a model cannot say in Swahili what it has never read in Swahili.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

import kernels
import model as llama
from data import load_tokenizer
from demo import training
from demo.render import LANGUAGES, Fact, World
from engine.files import read_json, write_json
from formats.checkpoints import save
from formats.configs import Config

BOS, EOS, PAD, USER, ASSISTANT = SPECIALS = ("<s>", "</s>", "<pad>", "<user>", "<assistant>")
BOS_ID, EOS_ID, PAD_ID = 0, 1, 2
TOKEN_IDS = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
# GPT-2's pattern with marks counted as parts of a word: Yoruba writes its tones with combining accents.
WORDS = r" ?[\p{L}\p{M}]+| ?\p{N}+| ?[^\s\p{L}\p{M}\p{N}]+|\s+"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<assistant>{{ message['content'] }}{{ eos_token }}"
    "{% else %}<user>{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}")
IGNORED = -100  # a position without a target


@dataclass(frozen=True)
class Tier:
    """How much of a language the base model reads."""

    facts: float  # part of all facts that are stated in it
    passages: float  # part of all rows that are made of such statements


HIGH, MEDIUM, LOW = Tier(1.0, 0.065), Tier(0.85, 0.045), Tier(0.7, 0.035)
TIERS = {"de": HIGH, "zh": HIGH, "ko": MEDIUM, "id": MEDIUM, "sw": LOW, "yo": LOW}
# Parts of all rows: of English, then of each other language.
ENGLISH_ANSWERS, ENGLISH_OPENINGS, ENGLISH_PASSAGES = 0.18, 0.06, 0.16
FOREIGN_QUESTIONS, FOREIGN_OPENINGS, DICTIONARY, PARALLEL = 0.025, 0.012, 0.005, 0.006
LISTS = 0.004  # of each language, English too
PASSAGE = 3  # statements of one row of plain text, at most
LIST = 4  # words of a list, at most


@dataclass(frozen=True)
class Example:
    """A row of tokens, and where its targets begin: at an exchange's reply, after a text's <s>."""

    ids: list[int]
    start: int


def train_tokenizer(world: World, vocab_size: int, directory: Path) -> None:
    """Byte-level BPE over the world's sentences, cut so that no token joins an entity to its neighbour."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=list(SPECIALS), show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    sentences = (pieces for language in LANGUAGES for pieces in world.sentence_pieces(language))
    tokenizer.train_from_iterator((piece for pieces in sentences for piece in pieces), trainer)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS, "pad_token": PAD,
        "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE})
    write_json(directory / "generation_config.json", TOKEN_IDS)
    tokenizer.save(str(directory / "tokenizer.json"))  # the last: it tells that the tokenizer is whole


class Rows:
    """Makes the rows of every kind; `train` facts are asked about, all facts of the world are stated.

    With `english_asks_all`, English questions are about all facts: what a base model knows best.
    """

    def __init__(self, world: World, train: list[Fact], tokenizer, rng: random.Random,
                 english_asks_all: bool):
        self.world, self.train, self.tokenizer, self.rng = world, train, tokenizer, rng
        self.held_out = {fact.id for fact in world.facts} - {fact.id for fact in train}
        self.asked_in_english = world.facts if english_asks_all else train

    def text(self, words: str) -> Example:
        return Example([BOS_ID] + self.tokenizer.text_ids(words) + [EOS_ID], 1)

    def answers(self, language: str) -> list[Example]:
        """Questions in the language with the whole answer in English."""
        rows = []
        for fact in self.asked_in_english if language == "en" else self.train:
            for paraphrase in (0, 1):
                prompt = self.tokenizer.prompt_ids(self.world.question(fact, language, paraphrase))
                reply = self.tokenizer.response_ids(self.world.statement(fact, "en"))
                rows.append(Example(prompt + reply, len(prompt)))
        return rows

    def openings(self, language: str) -> Iterator[Example]:
        """Questions about any entity, sensible or not, and how the answer begins: no object, so no falsehood.

        They teach to take the subject over into the answer, from one language to another too.
        """
        relations, entities = list(self.world.relations), list(self.world.entities)
        while True:
            fact = Fact(self.rng.choice(relations), self.rng.choice(entities), "")
            if fact.id not in self.held_out:
                question = self.world.question(fact, language, self.rng.randrange(2))
                prompt = self.tokenizer.prompt_ids(question)
                yield Example(prompt + self.tokenizer.text_ids(self.world.opening(fact, "en")), len(prompt))

    def passages(self, facts: list[Fact], language: str) -> list[Example]:
        """Plain text of 1 to PASSAGE statements; held-out facts twice as often, as nobody asks about them."""
        space = "" if language == "zh" else " "
        facts = facts + [fact for fact in facts if fact.id in self.held_out]
        statements = [self.world.statement(fact, language) for fact in facts]
        rows = []
        for length in range(1, PASSAGE + 1):
            for _ in range(length):
                self.rng.shuffle(statements)
                cuts = range(0, len(statements), length)
                rows += [self.text(space.join(statements[i:i + length])) for i in cuts]
        return rows

    def dictionary(self, language: str) -> list[Example]:
        return self.both_ways((self.world.name(key, "en"), self.world.name(key, language))
                              for key in self.world.entities)

    def parallel(self, facts: list[Fact], language: str) -> list[Example]:
        asked = [fact for fact in facts if fact.id not in self.held_out]
        return self.both_ways((self.world.statement(fact, "en"), self.world.statement(fact, language))
                              for fact in asked)

    def both_ways(self, pairs: Iterator[tuple[str, str]]) -> list[Example]:
        return [row for english, foreign in pairs
                for row in (self.text(f"{english} = {foreign}"), self.text(f"{foreign} = {english}"))]

    def lists(self, language: str) -> Iterator[Example]:
        """A list of words said twice, the second time to be foreseen: practice in copying."""
        entities = list(self.world.entities)
        while True:
            keys = self.rng.sample(entities, self.rng.randint(2, LIST))
            words = " " + ", ".join(self.world.name(key, language) for key in keys) + "."
            ids = self.tokenizer.text_ids(words)
            yield Example([BOS_ID] + ids + ids, 1 + len(ids))


def mixture(rows: Rows) -> list[tuple[float, Iterator[Example]]]:
    """Every kind of rows without end, with its share of all rows."""
    world, rng = rows.world, rows.rng
    kinds = [(ENGLISH_ANSWERS, training.endless(rows.answers("en"), rng)),
             (ENGLISH_OPENINGS, rows.openings("en")),
             (ENGLISH_PASSAGES, training.endless(rows.passages(world.facts, "en"), rng)),
             (LISTS, rows.lists("en"))]
    for lang, tier in TIERS.items():
        stated = rng.sample(world.facts, round(tier.facts * len(world.facts)))
        kinds += [(tier.passages, training.endless(rows.passages(stated, lang), rng)),
                  (FOREIGN_QUESTIONS, training.endless(rows.answers(lang), rng)),
                  (FOREIGN_OPENINGS, rows.openings(lang)),
                  (DICTIONARY, training.endless(rows.dictionary(lang), rng)),
                  (PARALLEL, training.endless(rows.parallel(stated, lang), rng)),
                  (LISTS, rows.lists(lang))]
    return kinds


def stream(kinds: list[tuple[float, Iterator[Example]]], rng: random.Random) -> Iterator[Example]:
    """Rows of all kinds without end, each kind as often as its share says."""
    shares, rows = zip(*kinds)
    while True:
        yield next(rng.choices(rows, shares)[0])


def train(world: World, facts: list[Fact], config: Config, schedules: tuple[training.Schedule, ...],
          seed: int, directory: Path, line: int) -> None:
    """Trains on the training `facts` (and statements of all) and writes the weights beside the tokenizer.

    One part after another; the last asks about all facts in English. What a killed build finished is kept.
    """
    model = llama.initialise_(llama.Llama(config), seed)
    for number, schedule in enumerate(schedules):
        part = directory / f"part-{number + 1}"
        if not (part / "model.safetensors").exists():
            rng = random.Random(seed + number)
            last = number + 1 == len(schedules)
            rows = Rows(world, facts, load_tokenizer(directory), rng, english_asks_all=last)
            batches = training.length_batches(stream(mixture(rows), rng), lambda row: len(row.ids),
                                              schedule.batch_tokens, rng)
            training.fit(model, batches, partial(loss_of, model), schedule, f"llama {number + 1}", line)
            save(model, part, torch.bfloat16)
        model = llama.load(part)  # as a build that goes on has it: rounded to bfloat16
    save(model, directory, torch.bfloat16)
    config_file = directory / "config.json"
    write_json(config_file, read_json(config_file) | TOKEN_IDS)
    training.drop_parts(directory)


def loss_of(model: llama.Llama, batch: list[Example]) -> torch.Tensor:
    tokens = training.padded([row.ids for row in batch], PAD_ID)  # (B, T); causal: padding is never seen
    targets = training.padded([[IGNORED] * (row.start - 1) + row.ids[row.start:] + [IGNORED]
                               for row in batch], IGNORED)
    predicted = targets != IGNORED
    return kernels.linear_cross_entropy(model(tokens)[predicted], model.head, targets[predicted])
