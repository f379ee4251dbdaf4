"""A checkpoint's tokenizer and chat template: text -> ids.

Templates are the checkpoint's own. Only a template may make added tokens: "</s>" in user text stays text.
"""

import hashlib
import json
import re
from datetime import datetime
from pathlib import Path

import tokenizers

from engine.files import InputError, as_kind, need, read_json, read_text
from formats import hub

TEMPLATE_DATE = datetime(2024, 7, 26)  # templates that print today's date would change caches overnight
PLAIN_TEMPLATE = (  # for base models, which bring none: Alpaca's headings
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' %}{{ message.content }}\n\n"
    "{% elif message.role == 'user' %}### Instruction:\n{{ message.content }}\n\n### Response:\n"
    "{% else %}{{ message.content }}{{ eos_token }}{% endif %}{% endfor %}")


def without_prefix(part, inside):
    """A part of tokenizer.json that puts no space before its text.

    Inside a line none does. After an added token only Metaspace "first" does not: its space is for the very
    start of a text.
    """
    if isinstance(part, list):
        return [without_prefix(item, inside) for item in part]
    if not isinstance(part, dict):
        return part
    part = {key: without_prefix(value, inside) for key, value in part.items()}
    if part.get("type") == "Metaspace" and (inside or part.get("prepend_scheme") == "first"):
        part["prepend_scheme"] = "never"
    if "add_prefix_space" in part and (inside or part["type"] == "Metaspace"):
        part["add_prefix_space"] = part.get("prepend_scheme", "never") != "never"
    if part.get("type") == "Prepend" and inside:
        return {"type": "Sequence", "normalizers": []}
    return part


def compile_template(source, where):
    """A chat template as transformers compiles it: render(**variables) -> str."""
    import jinja2.ext
    import jinja2.sandbox  # comes with torch
    # a template is a program: these are what its own mistakes raise
    mistakes = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError,
                SyntaxError, TypeError, ValueError)

    class Generation(jinja2.ext.Extension):
        """{% generation %} marks replies, for masks in transformers; here what is inside stands as it is."""
        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def to_json(value, indent=None):
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation])
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": TEMPLATE_DATE.strftime}

    def refusal(what, error):
        why = " ".join(f"{type(error).__name__}: {error}".split())
        return InputError(f"{where}: the chat template {what} ({why}): mend it, or put another into "
                         "chat_template.jinja")

    def render(**variables):
        try:
            return template.render(tools=None, documents=None, **variables)
        except mistakes as error:
            raise refusal("fails", error) from None

    try:
        template = environment.from_string(source)
    except mistakes as error:
        raise refusal("does not compile", error) from None
    return render


class Tokenizer:
    """A checkpoint's tokenizer and chat template; only the template's own text may become added tokens.

    Text is encoded by tokenizers that know no added token: `start` at the start of a prompt, `later` after an
    added token, `inside` within a line (never with SentencePiece's leading space).
    """

    def __init__(self, directory):
        self.directory = directory = Path(directory)
        if not (directory / "tokenizer.json").exists():
            raise InputError(f"{directory}: no tokenizer.json there; tokenizer.save_pretrained writes one")
        source = read_json(directory / "tokenizer.json", missing={}) | {"truncation": None, "padding": None}
        config = read_json(directory / "special_tokens_map.json", missing={})
        config |= read_json(directory / "tokenizer_config.json", missing={})
        self.names = {key: self._name(key, config[key])
                      for key in ("bos_token", "eos_token", "unk_token", "pad_token") if config.get(key)}
        self.full = self._build(source)
        self.bos_id, self.eos_id, self.unk_id = (
            self.full.token_to_id(self.names.get(key, "")) for key in ("bos_token", "eos_token", "unk_token"))
        self.vocab_size = 1 + max(self.full.get_vocab(with_added_tokens=True).values())
        # of the embedding: often more, never fewer
        rows = read_json(directory / "config.json", missing={}).get("vocab_size")
        self.rows = rows if type(rows) is int else self.vocab_size
        self._build_encoders(source)
        self._find_added(source)
        self._find_template(config)
        self._find_stops()
        told = [read_text(directory / "tokenizer.json"), self.template, self.variables, sorted(self.stop_ids)]
        self.fingerprint = hashlib.sha256(repr(told).encode()).hexdigest()

    def _name(self, key, token):
        """A special token's text; tokenizer_config.json gives it bare or inside {"content": ...}."""
        name = token.get("content") if isinstance(token, dict) else token
        if not isinstance(name, str):
            raise InputError(f"{self.directory / 'tokenizer_config.json'}: {key} is {name!r}, "
                            "a string was expected")
        return name

    def _build(self, source):
        try:
            return tokenizers.Tokenizer.from_str(json.dumps(source))
        except Exception as error:  # the library raises nothing narrower
            raise InputError(f"{self.directory / 'tokenizer.json'}: not a usable tokenizer: {error}") from None

    def _build_encoders(self, source):
        start = source | {"added_tokens": []}
        later, inside = (start | {part: without_prefix(source.get(part), inside)
                                  for part in ("normalizer", "pre_tokenizer")} for inside in (False, True))
        self.start = self._build(start)
        self.later = self.start if later == start else self._build(later)
        self.inside = self.later if inside == later else self._build(inside)

    def _find_added(self, source):
        """Patterns that find added tokens, longest first, in a template's text and in a user's.

        bos and eos count as added even if only the vocabulary has them. One character is text: it cannot be
        cut.
        """
        added = {token["content"]: token for token in source.get("added_tokens") or []}
        for key, token in (("bos_token", self.bos_id), ("eos_token", self.eos_id)):
            if token is not None:
                added.setdefault(self.names[key], {"content": self.names[key], "id": token})
        added = sorted((token for token in added.values() if len(token["content"]) > 1),
                       key=lambda token: (-len(token["content"]), token["content"]))
        by_id = {token["id"]: token["content"] for token in added}
        for token in added:
            if by_id[token["id"]] != token["content"]:
                raise InputError(f"{self.directory / 'tokenizer.json'}: the added tokens {token['content']!r} "
                                f"and {by_id[token['id']]!r} have the same id, {token['id']}: "
                                "give each its own")
        self.added_ids = {*by_id} - {self.unk_id}
        names = [re.escape(token["content"]) for token in added]
        groups = [f"(?P<id{token['id']}>" + r"\s*" * token.get("lstrip", False) + name
                  + r"\s*" * token.get("rstrip", False) + ")" for token, name in zip(added, names)]
        self.added_name, self.added_token = (re.compile("|".join(each) or "(?!)") for each in (names, groups))

    def _find_template(self, config):
        """chat_template.jinja, else tokenizer_config's chat_template, else the plain one."""
        file = self.directory / "chat_template.jinja"
        chat = read_text(file) if file.exists() else config.get("chat_template")
        if isinstance(chat, list):
            chat = self._named_template(chat)
        if chat is not None:
            as_kind(chat, str, f"{self.directory}: chat_template")
        adds_bos = config.get("add_bos_token", self.bos_id in self.full.encode("").ids)
        # a chat template decides on BOS itself, the plain one as the tokenizer
        self.template = chat or (PLAIN_TEMPLATE if adds_bos
                                 else PLAIN_TEMPLATE.removeprefix("{{ bos_token }}"))
        self.render = compile_template(self.template, self.directory)
        self.variables = dict(self.names)

    def _named_template(self, entries):
        """Of several templates the default one, else the first; None if there are none."""
        where = f"{self.directory}: chat_template"
        named = {as_kind(need(entry, "name", where), str, where):
                 as_kind(need(entry, "template", where), str, where) for entry in entries}
        return named.get("default", next(iter(named.values()), None))

    def _find_stops(self):
        """stop_ids: the ends named by tokenizer, config and generation_config, and the template's own."""
        self.opening = self._text([{"role": "user", "content": "x"}], asking=True)
        self.opening_ends_added = any(match.end() == len(self.opening)
                                      for match in self.added_token.finditer(self.opening))
        probe = "probe"
        reply = self._reply(probe)
        if probe not in reply:
            raise InputError(f"{self.directory}: the chat template does not write replies as they are given "
                            f"({probe!r} became {reply[:60]!r}): mend it, or put another into "
                            "chat_template.jinja")
        end = reply.index(probe) + len(probe)
        after = [match.start() >= end for match in self.added_token.finditer(reply)]
        self.stop_place = after.index(True) if any(after) else None  # which of a reply's added tokens ends it
        if self.eos_id is None and self.stop_place is None:
            raise InputError(f"{self.directory}: tokenizer_config.json names no eos_token of the vocabulary, "
                            "so no reply could end")
        self.stop_ids = {self.response_ids(probe)[-1]} | ({self.eos_id} - {None})
        for name in ("config.json", "generation_config.json"):
            ids = read_json(self.directory / name, missing={}).get("eos_token_id")
            ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
            if not all(type(token) is int for token in ids):
                raise InputError(f"{self.directory / name}: eos_token_id is {ids!r}, "
                                "whole numbers were expected")
            self.stop_ids |= set(ids)

    def _text(self, messages, asking):
        return self.render(messages=messages, add_generation_prompt=asking, **self.variables)

    def _reply(self, response):
        """What the template writes for a reply, after the prompt."""
        messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": response}]
        text = self._text(messages, asking=False)
        if not text.startswith(self.opening):
            raise InputError(f"{self.directory}: the chat template writes no reply after its own prompt")
        return text[len(self.opening):]

    def _guard(self, *texts):
        """(mark, texts): a mark inside every added token's name, so that only the template's stay whole."""
        mark = next(mark for mark in map(chr, range(0xE000, 0xF900)) if mark not in "".join(texts))
        while any(map(self.added_name.search, texts)):  # names may overlap: each pass breaks one of them
            texts = [self.added_name.sub(lambda name: name[0][0] + mark + name[0][1:], one) for one in texts]
        return mark, texts

    def _plain(self, encoder, text):
        """Ids of text, none an added token: a piece of the vocabulary that is one after all is cut in two."""
        encoding = encoder.encode(text, add_special_tokens=False)
        for token, (start, end) in zip(encoding.ids, encoding.offsets):
            if token in self.added_ids and end - start > 1:
                return self._plain(encoder, text[:start + 1]) + self._plain(self.inside, text[start + 1:])
        return encoding.ids

    def _ids(self, encoder, text, mark):
        """Ids of a rendered text: added tokens as themselves, text between them plain, marks taken out."""
        ids, cursor = [], 0
        for match in self.added_token.finditer(text):
            ids += self._plain(encoder, text[cursor:match.start()].replace(mark, ""))
            ids.append(int(match.lastgroup[len("id"):]))
            cursor, encoder = match.end(), self.later
        ids += self._plain(encoder, text[cursor:].replace(mark, ""))
        if ids and max(ids) >= self.rows:
            raise InputError(f"{self.directory}: tokenizer.json gives id {max(ids)}, "
                            f"config.json's vocab_size is {self.rows}: "
                            "tokenizer and weights do not belong together")
        return ids

    def text_ids(self, text):
        """Ids of bare text: no BOS, no template, no added token."""
        return self._plain(self.start, text)

    def prompt_ids(self, prompt, system=None):
        """Ids of a user message in the template, ready for the reply. At most one BOS, or InputError."""
        mark, (prompt, system) = self._guard(prompt, system or "")
        messages = [{"role": "system", "content": system}] if system else []
        text = self._text([*messages, {"role": "user", "content": prompt}], asking=True)
        ids = self._ids(self.start, text, mark)
        if self.bos_id is not None and ids.count(self.bos_id) > 1:
            raise InputError(f"{self.directory}: the chat template writes BOS more than once")
        if not ids:
            raise InputError(f"{self.directory}: the chat template writes nothing before a reply, which then "
                            "has no token to follow: mend it, or put another into chat_template.jinja")
        return ids

    def response_ids(self, response):
        """Ids of a reply as they follow prompt_ids; the last one is the stop token."""
        mark, (response,) = self._guard(response)
        text, stop = self._reply(response), [self.eos_id]
        if self.stop_place is not None:
            text, stop = text[:list(self.added_token.finditer(text))[self.stop_place].end()], []
        return self._ids(self.later if self.opening_ends_added else self.inside, text, mark) + stop

    def decode(self, ids, special=False):
        """Text of ids; special=True shows the special tokens too."""
        return self.full.decode(list(ids), skip_special_tokens=not special)


def load_tokenizer(directory):
    """The tokenizer of a Hugging Face directory or hub id. Raises InputError or InputError."""
    return Tokenizer(hub.local(directory, weights=()))
