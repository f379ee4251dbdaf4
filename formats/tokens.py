"""A tokenizer as a checkpoint's files give it, and text -> ids without surprises.

tokenizer.json holds the vocabulary; some added tokens stand in tokenizer_config.json, special_tokens_map.json
or added_tokens.json alone. They are merged as transformers does, under the ids given.
"""

import copy
import itertools
import json
import unicodedata

import tokenizers

from engine.files import InputError, as_kind, need, read_json

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
MOST_UNUSED = 100_000   # ids between two added tokens; more is a damaged file
PRIVATE_USE = range(0xF0000, 0x10FFFE)  # characters that mean nothing
AFTER_TOKEN = "\uf8ffafter a token\uf8ff"  # an added token of our own: text that follows it follows one


# ---- files -> tokenizer ----

def read_tokenizer_config(directory):
    """tokenizer_config.json with special_tokens_map.json, which wins in a directory of the older kind."""
    config = read_json(directory / "tokenizer_config.json", missing={})
    older = read_json(directory / "special_tokens_map.json", missing={})
    return older | config if "added_tokens_decoder" in config else config | older


def added_token(token, where, special=True):
    """tokenizers' AddedToken of a bare name, or of an object that holds its flags."""
    token = {"content": token} if isinstance(token, str) else token
    content = as_kind(need(token, "content", where), str, where)
    flags = {flag: bool(token[flag]) for flag in FLAGS if flag in token}
    return tokenizers.AddedToken(content, special=bool(token.get("special", special)), **flags)


def special_tokens(config, where):
    """({name: token}, [tokens without a name]) that the configuration calls special."""
    named = {}
    for key in (*NAMES, *config):
        value = config.get(key)
        is_token = isinstance(value, str) or isinstance(value, dict) and "content" in value
        if value and (key in NAMES or is_token and key.endswith("_token")):
            named[key] = value
    more = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if isinstance(more, dict):
        named = named | more
        more = []
    named = {key: added_token(token, f"{where}: {key}") for key, token in named.items()}
    return named, [added_token(token, f"{where}: special tokens") for token in as_kind(more, list, where)]


def numbered_tokens(source, config, listed, special, where):
    """[(id, token)] of added_tokens.json, tokenizer.json and added_tokens_decoder; the last one wins."""
    entries = [(number, {"content": name, "special": name in special}) for name, number in listed.items()]
    entries += [(need(entry, "id", where), entry)
                for entry in as_kind(source.get("added_tokens") or [], list, where)]
    decoder = as_kind(config.get("added_tokens_decoder") or {}, dict, where)
    entries += [(int(number) if number.isdecimal() else number, entry) for number, entry in decoder.items()]
    found = {}
    for number, entry in entries:
        token = added_token(entry, where, special=False)
        if type(number) is not int:
            raise InputError(f"{where}: the added token {token.content!r} has the id {number!r}, "
                             "a whole number was expected")
        found[token.content] = number, token
    return sorted(found.values(), key=lambda pair: pair[0])


def add_numbered(tokenizer, numbered, where):
    """Give a tokenizer these added tokens under these ids, as the weights know them.

    The library numbers new tokens one after another: gaps are filled with tokens that no text holds.
    """
    batch = []
    free = tokenizer.get_vocab_size()
    for number, token in numbered:
        if tokenizer.token_to_id(token.content) is None:
            gap = range(free, min(number, free + MOST_UNUSED))
            batch += [tokenizers.AddedToken(f"\uf8ffunused {unused}\uf8ff", normalized=False)
                      for unused in gap]
            free = max(free, number) + 1
        batch.append(token)
    tokenizer.add_tokens(batch)
    for number, token in numbered:
        known = tokenizer.token_to_id(token.content)
        if known != number:
            raise InputError(f"{where}: the added token {token.content!r} has the id {number}, "
                             f"in the vocabulary it is {known}: files of different models?")


def read_tokenizer(directory, config):
    """(tokenizer, {name: special token}, ids of all special tokens) of a checkpoint's files."""
    where = directory / "tokenizer.json"
    if not where.exists():
        raise InputError(f"{directory}: no tokenizer.json there; tokenizer.save_pretrained writes one")
    source = read_json(where)
    named, more = special_tokens(config, directory / "tokenizer_config.json")
    more = [*named.values(), *more]
    special = {token.content for token in more}
    listed = read_json(directory / "added_tokens.json", missing={})
    numbered = numbered_tokens(source, config, listed, special, where)
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(source | {"added_tokens": []}))
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"{where}: not a usable tokenizer: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    add_numbered(tokenizer, numbered, where)
    placed = {token.content for _, token in numbered}
    tokenizer.add_tokens([token for token in more if token.content not in placed])
    added = tokenizer.get_added_tokens_decoder().items()
    ids = {number for number, token in added if token.special or token.content in special}
    return tokenizer, {key: token.content for key, token in named.items()}, ids


# ---- text -> ids ----

def is_words(text):
    """Letters, their marks, digits and spaces only: a template cannot mean a mark by it alone."""
    return all(char.isspace() or unicodedata.category(char)[0] in "LMN" for char in text)


def encoder_for(tokenizer, special, unk_id, written):
    """An Encoder for a template that writes such text.

    Added tokens in it that are more than words are control tokens beside the special ones, flagged special so
    that Encoder can switch them off. Special ones split the text before a normaliser sees it, so that a word
    after <s> begins with Llama 2's space.
    """
    inner = copy.deepcopy(tokenizer)
    control = set()
    marks = []
    for number, token in tokenizer.get_added_tokens_decoder().items():
        if number in special or token.content in written and not is_words(token.content):
            control.add(number)
            marks.append(tokenizers.AddedToken(
                token.content, special=True, normalized=token.normalized and number not in special,
                single_word=token.single_word, lstrip=token.lstrip, rstrip=token.rstrip))
    inner.add_tokens([*marks, tokenizers.AddedToken(AFTER_TOKEN, normalized=False)])
    return Encoder(inner, control | {inner.token_to_id(AFTER_TOKEN)}, unk_id)


class Encoder:
    """Text -> ids, where control tokens may come out of a template's text but not out of a user's.

    Other added tokens are text, as in pre-training. control: ids; unk_id is one of them only where a text
    names it.
    """

    def __init__(self, tokenizer, control, unk_id):
        self.tokenizer = tokenizer
        self.control = control
        self.unk_id = unk_id
        self.names = {number: token.content for number, token in tokenizer.get_added_tokens_decoder().items()}

    def encode(self, text, control=True):
        """control=False: the tokenizer does not look for control tokens (flagged special in it)."""
        self.tokenizer.encode_special_tokens = not control
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        self.tokenizer.encode_special_tokens = False
        return encoding

    def control_tokens(self, encoding, text):
        """[(id, start, end)] of the control tokens in an encoded text."""
        found = []
        for token, (start, end) in zip(encoding.ids, encoding.offsets):
            unknown = token == self.unk_id and text[start:end].strip() != self.names[token]
            if token in self.control and not unknown:
                found.append((token, start, end))
        return found

    def hide(self, *texts):
        """(texts, hidden): control tokens in texts, each behind a private character; what those hide."""
        found = set()
        for text in texts:
            for _, start, end in self.control_tokens(self.encode(text), text):
                name = text[start:end]
                found.add(name.strip() or name)  # a token may take the spaces beside it
        used = set("".join(texts))
        free = (mark for mark in map(chr, PRIVATE_USE) if mark not in used)
        hidden = dict(zip(free, sorted(found, key=len, reverse=True)))
        for mark, name in hidden.items():
            texts = [text.replace(name, mark) for text in texts]
        return texts, hidden

    def ids(self, text, hidden):
        """Ids of rendered text: control tokens as themselves, what is hidden in it as plain text."""
        encoding = self.encode(text)
        shown = str.maketrans(hidden)
        if text.translate(shown) == text:
            return encoding.ids
        ids = []
        cursor = 0
        for token, start, end in self.control_tokens(encoding, text):
            ids += self.plain(text[cursor:start].translate(shown), after_token=cursor > 0)
            ids.append(token)
            cursor = end
        return ids + self.plain(text[cursor:].translate(shown), after_token=cursor > 0)

    def plain(self, text, after_token=False):
        """Ids of text, none a control token; a piece of the vocabulary that is one after all is cut."""
        before = AFTER_TOKEN if after_token else ""
        encoding = self.encode(before + text, control=False)
        pieces = self.control_tokens(encoding, before + text)[after_token:]
        cuts = [start + 1 - len(before) for _, start, end in pieces if end - start > 1]
        if not cuts:
            return encoding.ids[after_token:]
        ids = self.plain(text[:cuts[0]], after_token)
        for start, end in itertools.pairwise([*cuts, len(text)]):
            ids += self.following("", text[start:end], self.plain)
        return ids

    def following(self, context, text, encode):
        """Ids of text as it follows another, never with a space of the tokenizer's own where none is written.

        Encoded together with the context, which then goes. Where the two would melt into one token, another
        context takes its place: a letter, or the start of a line.
        """
        for anchor in filter(None, (context, "\n", "x")):
            before = encode(anchor)
            both = encode(anchor + text)
            if both[:len(before)] == before:
                return both[len(before):]
        return encode(text)


def misread(tokenizer):
    """{id: text} of added tokens that the library's decoder does not give back as they were.

    To a byte-level one "ü" is half a character; others keep the space that encoding puts after added tokens.
    """
    def lost(text):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        return tokenizer.decode(ids, skip_special_tokens=False) != text

    added = tokenizer.get_added_tokens_decoder().items()
    return {number: token.content for number, token in added
            if not token.special and lost(f"x{token.content}x")}
