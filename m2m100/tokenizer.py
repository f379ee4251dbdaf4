"""The translators' tokenizers, with the `tokenizers` package alone: SentencePiece .model or tokenizer.json.

    tokenizer = load_tokenizer(Path("demo/m2m100"))
    tokenizer.decode(tokenizer.encode("Hello."))

M2M100 comes as a SentencePiece model (BPE) and vocab.json, which gives the pieces other ids; the ids of its
languages start where vocab.json ends. NLLB comes as a tokenizer.json whose added tokens are languages. A
.model is a protobuf message (sentencepiece_model.proto). BPE: Sennrich et al. 2016 (arXiv:1508.07909);
Unigram: Kudo 2018 (arXiv:1804.10959).
"""

import io
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import decoders, models

from engine.files import InputError, read_json, refuse_pointer
from formats.languages import M2M100_LANGUAGES, normal
from formats.tokens import read_tokenizer, read_tokenizer_config

NORMAL, UNKNOWN, USER_DEFINED, BYTE = 1, 2, 4, 6  # kinds of SentencePiece's pieces
FIXED_BYTES = {1: 8, 5: 4}  # of protobuf's wire types with a fixed size


def wire_fields(message: bytes):
    """(field number, value) of a protobuf message, whatever its schema: varints as int, the rest as bytes."""
    stream = io.BytesIO(message)

    def varint() -> int:
        value = shift = 0
        while True:
            byte = stream.read(1)[0]
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while stream.tell() < len(message):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
        else:
            size = varint() if kind == 2 else FIXED_BYTES[kind]
            if size > len(message) - stream.tell():
                raise ValueError(f"a field of {size} bytes at byte {stream.tell()} of {len(message)}")
            yield key >> 3, stream.read(size)


@dataclass
class Normalizer:
    """What SentencePiece does to a text first: everywhere the longest rule of its charsmap, then the spaces.

    By hand, since tokenizers' version drops the second of two marks on a letter, and with it Yoruba's tones.
    charsmap: u32 size of a trie; the trie, a double array as the library darts-clone writes it; the
    replacements, each ending in a zero byte. A unit of the trie: bits 0-7 label, 8 "a value follows", 9 and
    10-30 scale and offset of its children.
    """
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool

    def __post_init__(self):
        size = int.from_bytes(self.charsmap[:4], "little")
        self.trie = struct.unpack(f"<{size // 4}I", self.charsmap[4:4 + size])
        self.texts = self.charsmap[4 + size:]

    def __call__(self, text: str) -> str:
        raw = text.encode("utf-8")
        out = bytearray()
        at = 0
        while at < len(raw):
            length, replacement = self.match(raw, at)
            out += replacement
            at += length
        text = out.decode("utf-8")
        if self.remove_extra_whitespaces:
            text = re.sub(" {2,}", " ", text).strip(" ")
        if self.add_dummy_prefix and text:
            text = " " + text
        return text.replace(" ", "▁")

    def match(self, raw: bytes, at: int) -> tuple[int, bytes]:
        """(bytes taken at raw[at:], their replacement) by the longest rule, or a character as it is."""
        length = 1 if raw[at] < 0x80 else 2 if raw[at] < 0xE0 else 3 if raw[at] < 0xF0 else 4
        found = length, raw[at:at + length]
        if not self.trie:
            return found
        node = children(self.trie[0])
        for end in range(at, len(raw)):
            node ^= raw[end]
            unit = self.trie[node]
            if unit & 0x800000FF != raw[end]:
                break
            node ^= children(unit)
            if unit >> 8 & 1:
                start = self.trie[node] & 0x7FFFFFFF
                found = end + 1 - at, self.texts[start:self.texts.index(b"\0", start)]
        return found


def children(unit: int) -> int:
    """What leads from a unit of the trie to its children, by exclusive or with its place."""
    return unit >> 10 << (unit >> 6 & 8)


def bpe(pieces: list[str], scores: list[float], kinds: list[int], unknown: int) -> models.BPE:
    """SentencePiece joins the neighbours that form the best piece: so every split of a piece is a merge, best
    piece first, and of its splits the longest left part first."""
    ids = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for piece, score, kind in zip(pieces, scores, kinds):
        for i in range(1, len(piece) if kind == NORMAL else 0):
            left, right = piece[:i], piece[i:]
            if left in ids and right in ids:
                merges.append(((score, i), (left, right)))
    merges.sort(key=lambda merge: merge[0], reverse=True)
    pairs = [pair for _, pair in merges]
    return models.BPE(ids, pairs, unk_token=pieces[unknown], fuse_unk=True, byte_fallback=BYTE in kinds)


def unigram(pieces: list[str], scores: list[float], kinds: list[int], unknown: int) -> models.Unigram:
    """The most probable segmentation. <s> and the like get a name that no text has."""
    named = [piece if kind in (NORMAL, BYTE) else "\0" + piece for piece, kind in zip(pieces, kinds)]
    return models.Unigram(list(zip(named, scores)), unknown, byte_fallback=BYTE in kinds)


def read_sentencepiece(path: Path) -> tuple[tokenizers.Tokenizer, list[str], Normalizer]:
    """A SentencePiece .model: a tokenizer with its ids, its pieces in order, what it does to a text first.

    Fields by sentencepiece_model.proto. Model: 1 piece {1 text, 2 score, 3 kind}, 2 trainer {3 algorithm},
    3 normalizer {2 charsmap, 3 add_dummy_prefix, 4 remove_extra_whitespaces}.
    """
    pieces, scores, kinds = [], [], []
    trainer, rules = {}, {}
    raw = path.read_bytes()
    refuse_pointer(path, raw)
    try:
        for number, value in wire_fields(raw):
            if number == 1:
                piece = {3: NORMAL} | dict(wire_fields(value))
                pieces.append(piece[1].decode("utf-8"))
                scores.append(struct.unpack("<f", piece.get(2, bytes(4)))[0])
                kinds.append(piece[3])
            elif number == 2:
                trainer.update(wire_fields(value))
            elif number == 3:
                rules.update(wire_fields(value))
        unknown = kinds.index(UNKNOWN)
    except (IndexError, KeyError, TypeError, ValueError, struct.error) as error:
        raise InputError(f"{path} is no SentencePiece model ({error}): download it again") from None
    if USER_DEFINED in kinds:
        piece = pieces[kinds.index(USER_DEFINED)]
        raise InputError(f"{path}: user-defined pieces such as {piece!r} are not supported")
    algorithm = bpe if trainer.get(3, 1) == 2 else unigram
    inner = tokenizers.Tokenizer(algorithm(pieces, scores, kinds, unknown))
    normalize = Normalizer(rules.get(2, b""), bool(rules.get(3, 1)), bool(rules.get(4, 1)))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if normalize.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    inner.decoder = decoders.Sequence(steps)
    return inner, pieces, normalize


@dataclass
class Tokenizer:
    """Text <-> model ids."""
    inner: tokenizers.Tokenizer
    languages: dict[str, int]  # normal code (formats/languages.py) -> id of its token
    unknown: int
    to_model: Sequence[int]  # the tokenizer's own ids -> the model's
    normalize: Callable[[str], str] = str  # nothing to do: a tokenizer.json does it itself

    def __post_init__(self):
        special = {0, 1, 2, self.unknown, *self.languages.values()}  # <s>, <pad>, </s> come first everywhere
        self.from_model = {known: i for i, known in enumerate(self.to_model) if known not in special}

    def encode(self, text: str) -> list[int]:
        """Pieces of one line, without language and end tokens."""
        ids = self.inner.encode(self.normalize(text), add_special_tokens=False).ids
        return [self.to_model[i] for i in ids]

    def decode(self, ids: list[int]) -> str:
        return self.inner.decode([self.from_model[i] for i in ids if i in self.from_model]).strip()


def load_tokenizer(path: Path) -> Tokenizer:
    """M2M100's SentencePiece model with vocab.json, or a tokenizer.json whose added tokens are languages."""
    spm = path / "sentencepiece.bpe.model"
    vocab = path / "vocab.json"
    fast = path / "tokenizer.json"
    if spm.exists() and vocab.exists():
        inner, pieces, normalize = read_sentencepiece(spm)
        ids = read_json(vocab)
        unknown = ids.get("<unk>", 3)
        languages = {normal(code): len(ids) + i for i, code in enumerate(M2M100_LANGUAGES)}
        to_model = [ids.get(piece, unknown) for piece in pieces]
        return Tokenizer(inner, languages, unknown, to_model, normalize)
    if not fast.exists():
        raise InputError(f"{path} has no tokenizer: {spm.name} and {vocab.name}, or {fast.name}")
    inner, _, _ = read_tokenizer(path, read_tokenizer_config(path))
    inner.encode_special_tokens = True  # "</s>" or "eng_Latn" in a text is text
    languages = {}
    for i, token in inner.get_added_tokens_decoder().items():
        found = re.fullmatch(r"__([a-z]{2,3})__|([a-z]{3}_[A-Z][a-z]{3})", token.content)
        if found:
            languages[normal(found[1] or found[2])] = i
    if not languages:
        raise InputError(f"{fast} has no language tokens such as __sw__ or swh_Latn: no translator")
    ids = range(max(inner.get_vocab().values()) + 1)
    return Tokenizer(inner, languages, inner.token_to_id("<unk>"), to_model=ids)
