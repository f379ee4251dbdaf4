"""The demo's translator: a tiny M2M100 from English into the six other languages of the demo world.

It learns from the sentences of the training facts and from a dictionary of all entities and their forms
("four", "fourth"). A translator needs no truth: so that it learns to translate words and not whole facts, it
also reads sentences with other entities of the same kind in them ("The capital of France is Cairo."). No
question about a held-out fact and no statement of one is among them.
"""

import io
import random
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import sentencepiece
import torch
from torch import nn

import kernels
from demo import training
from demo.render import Fact, LANGUAGES, World
from engine.files import read_json, write_json
from m2m100 import tokenizer as spm
from m2m100.network import Config, M2M100, load_model
from formats.weights import save_tensors

TARGETS = LANGUAGES[1:]
# M2M100's own order; a language's id is the length of vocab.json + its index here.
CODES = ("af am ar ast az ba be bg bn br bs ca ceb cs cy da de el en es et fa ff fi fr fy ga gd gl gu ha "
         "he hi hr ht hu hy id ig ilo is it ja jv ka kk km kn ko lb lg ln lo lt lv mg mk ml mn mr ms my ne "
         "nl no ns oc or pa pl ps pt ro ru sd si sk sl so sq sr ss su sv sw ta th tl tn tr uk ur uz vi wo "
         "xh yi yo zh zu").split()
MADE_UP = 8  # ids at the end that M2M100 keeps without use
SPECIALS = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
PAD, EOS = 1, 2
WORD_EDGE = "|"  # where SentencePiece must not join two pieces; in no sentence of the world
CHINESE_MARKS = "。，？！：；（）"  # NFKC would fold most of them to ASCII, which is no Chinese
# Shares of the sentences.
STATEMENTS, QUESTIONS, MADE_UP_STATEMENTS, MADE_UP_QUESTIONS, ENTITIES = 0.1, 0.15, 0.45, 0.15, 0.15


@dataclass(frozen=True)
class Sentence:
    """An English sentence as ids of the source and, per target language, of the target; all specials in."""

    source: list[int]
    targets: list[list[int]]

    @property
    def length(self) -> int:
        return max(map(len, self.targets))


def normalisation_rules(path: Path) -> None:
    """NFKC as SentencePiece rules in hexadecimal; breaks and tabs to spaces, CHINESE_MARKS kept."""
    rules = {char: " " for char in "\t\n\r"}
    for code in range(0x110000):
        char = chr(code)
        folded = unicodedata.normalize("NFKC", char)
        if folded != char and char not in CHINESE_MARKS:
            rules[char] = folded
    lines = (f"{ord(char):X}\t{' '.join(f'{ord(c):X}' for c in folded)}\n" for char, folded in rules.items())
    path.write_text("".join(lines), encoding="utf-8")


def train_tokenizer(world: World, vocab_size: int, directory: Path) -> None:
    """SentencePiece BPE over the world's sentences, cut at entities, and vocab.json in M2M100's order."""
    directory.mkdir(parents=True, exist_ok=True)
    rules, trained = directory / "rules.tsv", io.BytesIO()
    normalisation_rules(rules)
    pieces = (pieces for language in LANGUAGES for pieces in world.sentence_pieces(language))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=map(WORD_EDGE.join, pieces), pretokenization_delimiter=WORD_EDGE,
        model_writer=trained, model_type="bpe", vocab_size=vocab_size, character_coverage=1.0,
        normalization_rule_tsv=str(rules), hard_vocab_limit=False, minloglevel=2)
    rules.unlink()
    model = without_text(trained.getvalue(), str(rules))
    (directory / "sentencepiece.bpe.model").write_bytes(model)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocab = dict(SPECIALS)
    for i in range(processor.get_piece_size()):
        vocab.setdefault(processor.id_to_piece(i), len(vocab))
    write_tokenizer_configs(directory)
    write_json(directory / "vocab.json", vocab)  # the last: it tells that the tokenizer is whole


def without_text(model: bytes, text: str) -> bytes:
    """A SentencePiece model (protobuf) without the setting that holds `text`, a path of this machine."""
    field = varint(len(text.encode())) + text.encode()  # after one byte that says which field it is
    parts = []
    for number, value in spm.wire_fields(model):
        at = value.find(field)
        value = value if at < 1 else value[:at - 1] + value[at + len(field):]
        parts.append(varint(number << 3 | 2) + varint(len(value)) + value)  # 2: bytes behind their length
    return b"".join(parts)


def varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first, the top bit set on all but the last."""
    if value < 128:
        return bytes([value])
    return bytes([value & 127 | 128]) + varint(value >> 7)


def write_tokenizer_configs(directory: Path) -> None:
    """What transformers' M2M100Tokenizer reads besides the vocabulary."""
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "pad_token": "<pad>",
              "unk_token": "<unk>"}
    languages = [f"__{code}__" for code in CODES]
    write_json(directory / "special_tokens_map.json", tokens | {"additional_special_tokens": languages})
    write_json(directory / "tokenizer_config.json", tokens | {
        "tokenizer_class": "M2M100Tokenizer", "language_codes": "m2m100", "num_madeup_words": MADE_UP,
        "src_lang": "en", "tgt_lang": None, "additional_special_tokens": languages})


def vocab_size(directory: Path) -> int:
    """Rows of the embedding table: the vocabulary, M2M100's languages, its ids without use."""
    return len(read_json(directory / "vocab.json")) + len(CODES) + MADE_UP


class Encoder:
    """Sentences to model ids with SentencePiece itself (translate.py does the same by hand)."""

    def __init__(self, directory: Path):
        spm = directory / "sentencepiece.bpe.model"
        self.processor = sentencepiece.SentencePieceProcessor(model_file=str(spm))
        self.vocab = read_json(directory / "vocab.json")
        self.language = {code: len(self.vocab) + i for i, code in enumerate(CODES)}

    def pieces(self, text: str) -> list[int]:
        return [self.vocab[piece] for piece in self.processor.encode(text, out_type=str)]

    def sentence(self, texts: dict[str, str]) -> Sentence:
        """Source `[en] pieces </s>`, targets `</s> [language] pieces </s>`."""
        source = [self.language["en"], *self.pieces(texts["en"]), EOS]
        return Sentence(source, [[EOS, self.language[lang], *self.pieces(texts[lang]), EOS]
                                 for lang in TARGETS])


def alike(sets: dict[str, set[str]]) -> dict[str, list[str]]:
    """Each relation's set joined with every set it shares something with: they can replace each other."""
    return {name: sorted(set().union(*(other for other in sets.values() if other & own)))
            for name, own in sets.items()}


def made_up(world: World, rng: random.Random) -> Iterator[Fact]:
    """Facts without end, nearly all false, whose entities are of the right kind for their relation.

    Of the right kind, because the same English words ("... is white") are others for animals than for food.
    """
    subjects, objects = defaultdict(set), defaultdict(set)
    for fact in world.facts:
        subjects[fact.relation].add(fact.subject)
        objects[fact.relation].add(fact.object)
    subjects, objects = alike(subjects), alike(objects)
    while True:
        relation = rng.choice(world.facts).relation
        yield Fact(relation, rng.choice(subjects[relation]), rng.choice(objects[relation]))


def sentences(world: World, train: list[Fact], encoder: Encoder, rng: random.Random) -> Iterator[Sentence]:
    """Sentences without end, in the shares above; those of held-out facts are left out."""
    held_out = set(world.facts) - set(train)
    held_out_questions = {fact.id for fact in held_out}

    def statement(fact: Fact) -> Sentence:
        return encoder.sentence({lang: world.statement(fact, lang) for lang in LANGUAGES})

    def question(fact: Fact, paraphrase: int) -> Sentence:
        return encoder.sentence({lang: world.question(fact, lang, paraphrase) for lang in LANGUAGES})

    words = [encoder.sentence({lang: texts[lang].get(form, texts[lang][""]) for lang in LANGUAGES})
             for texts in world.entities.values() for form in texts["en"]]
    queues = {
        training.endless([statement(fact) for fact in train], rng): STATEMENTS,
        training.endless([question(fact, i) for fact in train for i in (0, 1)], rng): QUESTIONS,
        (statement(fact) for fact in made_up(world, rng) if fact not in held_out): MADE_UP_STATEMENTS,
        (question(fact, rng.randrange(2)) for fact in made_up(world, rng)
         if fact.id not in held_out_questions): MADE_UP_QUESTIONS,
        training.endless(words, rng): ENTITIES}
    while True:
        yield next(rng.choices(list(queues), list(queues.values()))[0])


def initialise_(model: M2M100, seed: int) -> M2M100:
    """Xavier for the matrices, a table that `embed` scales to unit size, norms one, biases zero."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name == "model.shared.weight":
            nn.init.normal_(parameter, std=model.config.d_model**-0.5)
        elif parameter.ndim == 2:
            nn.init.xavier_uniform_(parameter)
        else:
            nn.init.constant_(parameter, float("norm" in name and name.endswith("weight")))
    return model


def teacher_forced(model: M2M100, batch: list[Sentence]) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states (N, d) and the tokens (N,) they predict; a source is encoded once for all languages."""
    source = training.padded([sentence.source for sentence in batch], PAD)  # (B, S)
    rows = training.padded([row for sentence in batch for row in sentence.targets], PAD)  # (B * L, T + 1)
    L = len(TARGETS)
    memory = [(key.repeat_interleave(L, 0), value.repeat_interleave(L, 0))
              for key, value in model.memory(model.encode(source, source != PAD))]
    mask = (source != PAD).repeat_interleave(L, 0)  # (B * L, S)
    tokens, targets = rows[:, :-1], rows[:, 1:]
    hidden = model.decode(tokens, 0, memory, mask)  # (B * L, T, d)
    predicted = targets != PAD
    predicted[:, 0] = False  # the language: told, not guessed
    return hidden[predicted], targets[predicted]


def train(world: World, facts: list[Fact], config: Config, schedules: tuple[training.Schedule, ...],
          seed: int, directory: Path, line: int) -> None:
    """Trains on the training `facts` in parts, as the base; writes config and weights into `directory`."""
    model = initialise_(M2M100(config), seed)
    for number, schedule in enumerate(schedules):
        part = directory / f"part-{number + 1}"
        if not (part / "model.safetensors").exists():
            rng = random.Random(seed + number)
            stream = sentences(world, facts, Encoder(directory), rng)
            batches = training.length_batches(stream, lambda sentence: sentence.length * len(TARGETS),
                                              schedule.batch_tokens, rng)
            training.fit(model, batches, partial(loss_of, model), schedule, f"m2m100 {number + 1}", line)
            save(model, part)
        model = load_model(part)
    save(model, directory)
    training.drop_parts(directory)


def loss_of(model: M2M100, batch: list[Sentence]) -> torch.Tensor:
    hidden, targets = teacher_forced(model, batch)
    return kernels.linear_cross_entropy(hidden, model.head, targets)


def save(model: M2M100, directory: Path) -> None:
    """Configs and weights in Hugging Face layout, the weights last."""
    directory.mkdir(exist_ok=True)
    write_json(directory / "config.json", {
        "architectures": ["M2M100ForConditionalGeneration"], "model_type": "m2m_100",
        "is_encoder_decoder": True, **asdict(model.config), "num_hidden_layers": model.config.encoder_layers,
        "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "encoder_layerdrop": 0.0,
        "decoder_layerdrop": 0.0, "torch_dtype": "bfloat16"})
    write_json(directory / "generation_config.json", {
        "bos_token_id": 0, "pad_token_id": PAD, "eos_token_id": EOS, "decoder_start_token_id": EOS,
        "num_beams": 5, "max_length": 200, "early_stopping": True})
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    save_tensors(directory / "model.safetensors", weights)
