"""Data: public formats -> rows -> forks -> packed rows of tokens.

A *row* is one sample: {"row_id": str, "en": {"prompt": str, "response": str}, "sw": {...}, ...}.
A *fork* is one prompt with k continuations. A *batch* is rows of T tokens filled with forks, and the list
of its predictions: which position has to name which token.

What is kept of public data (every decision is counted, `describe` prints the counts):
- A conversation gives its first exchange; with turns="all" every user message and the reply right after it
  become a row of their own, without the turns before them.
- OpenAssistant trees follow Open-Assistant's own top-1 rule (oasst_dataset.py): reviewed trees in the
  language, no deleted or synthetic message in the thread, replies of rank 0 or without a sibling.
- System prompts in the data are left out, as nothing translates them; `system=` gives every prompt one.
- Rows with an empty prompt or response are dropped.

Templates are the checkpoint's own. Only a template may make added tokens: "</s>" in user text stays text.

    python data.py FILE --model DIR --lang sw --show 2     # counts, packing, samples with their loss mask
"""

import argparse
import gzip
import hashlib
import json
import os
import re
import sys
import zlib
from bisect import bisect_left, insort
from collections import Counter
from dataclasses import dataclass, fields, replace
from datetime import datetime
from pathlib import Path

import numpy as np
import tokenizers
import torch

import hub

PARTS = ("prompt", "response")
HALF_A_CHARACTER = "[\ud800-\udfff]"  # JSON can spell a surrogate on its own
ROLES = {"user": "user", "human": "user", "prompter": "user", "system": "system",
         "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}
FORMATS = ('parallel ({"en": {"prompt", "response"}, ...}), Alpaca (instruction, output), messages, ShareGPT '
           '(conversations), OpenAssistant (trees or messages), prompt and response')
TEMPLATE_DATE = datetime(2024, 7, 26)  # templates that print today's date would change caches overnight
PLAIN_TEMPLATE = (  # for base models, which bring none: Alpaca's headings
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' %}{{ message.content }}\n\n"
    "{% elif message.role == 'user' %}### Instruction:\n{{ message.content }}\n\n### Response:\n"
    "{% else %}{{ message.content }}{{ eos_token }}{% endif %}{% endfor %}")


class DataError(ValueError):
    """Bad input, in one line: what, where (file:line), how to fix it."""


def run(main):
    """Run a command line: bad input becomes one line on stderr and exit code 2, Ctrl-C exit code 130."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, ValueError) as error:
        if type(error) is ValueError:  # ours are subclasses; a plain one is a bug and keeps its traceback
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


# ---- files -> records ----

def read_text(path):
    """The text of a UTF-8 file, plain or gzip (told by its first bytes)."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: {'a directory, a file is wanted' if path.is_dir() else 'no such file'}")
    raw = path.read_bytes()
    try:
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
        return raw.decode("utf-8-sig")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip file ({error}); fetch it again") from None
    except UnicodeDecodeError as error:
        line = raw[:error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: not UTF-8 text; JSON or JSONL in UTF-8 is wanted") from None


def parse_json(text, path, wanted, line=1):
    """The value of JSON text that begins in this line of a file. wanted: what belongs there, for errors."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line, why = line + error.lineno - 1, f"{error.msg} (column {error.colno})"
    except RecursionError:
        why = "lists or objects nested too deeply"
    except ValueError as error:  # a number of thousands of digits
        why = str(error)
    raise DataError(f"{path}:{line}: not valid JSON: {why}; {wanted}")


def read_records(path):
    """[(where, object)] of a JSONL file ("file:line") or of a file holding one JSON list ("file[item]")."""
    text, wanted = read_text(path), "one object a line is wanted, or one list"
    if text.lstrip()[:1] == "[":
        return [(f"{path}[{item}]", record) for item, record in enumerate(parse_json(text, path, wanted))]
    return [(f"{path}:{number}", parse_json(line, path, wanted, number))  # splitlines() also cuts at U+2028
            for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def optional_object(path):
    """The object in a JSON file, {} without the file."""
    if not path.exists():
        return {}
    return as_kind(parse_json(read_text(path), path, "one object is wanted"), dict, path)


def write_jsonl(path, records):
    """Write one JSON object a line; to a temporary name first, so there is never half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    with open(partial, "w", encoding="utf-8", newline="\n") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    os.replace(partial, path)


# ---- records -> rows ----

def as_kind(value, kind, where):
    """The value, or an error if it is not of that kind (dict, list, str)."""
    if not isinstance(value, kind):
        raise DataError(f"{where}: {kind.__name__} expected, found {type(value).__name__}")
    return value


def need(record, key, where):
    """record[key], or an error that names the place and the keys that are there."""
    if key not in as_kind(record, dict, where):
        raise DataError(f'{where}: "{key}" is missing (found: {", ".join(record)})')
    return record[key]


def whole(value, where):
    """The value, or an error if a string anywhere in it holds half of a character: no file can hold that."""
    if re.search(HALF_A_CHARACTER, json.dumps(value, ensure_ascii=False)):
        raise DataError(f"{where}: broken Unicode (half of a character): write the whole one, or take it out")
    return value


def as_text(value, where):
    """A message's text: a string, null (a tool call), or a list of parts that are joined."""
    if isinstance(value, list):
        return "".join(as_text(need(part, "text", where), where) for part in value)
    return "" if value is None else as_kind(value, str, where)


def languages(row):
    """The languages of a row, in its order: keys whose value has a prompt and a response."""
    return [key for key, value in row.items() if isinstance(value, dict) and {*PARTS} <= value.keys()]


def identifier(record, where):
    """row_id, or id (an object under "id" is Indonesian, no identifier), or file name and line."""
    for key in ("row_id", "id"):
        if isinstance(record.get(key), (str, int)):
            return whole(str(record[key]), where)
    return Path(where).name


def held_languages(record, codes, where):
    """The record without those of the languages that are null: not translated yet. DataError for another kind
    than an object; a string under "id" is the identifier."""
    for code in codes & record.keys():
        if record[code] is not None and not (code == "id" and isinstance(record[code], (str, int))):
            for part in PARTS:
                need(record[code], part, f'{where}: language "{code}" (prompt and response, or null)')
    return {key: value for key, value in record.items() if value is not None or key not in codes}


def parallel_rows(records, language, turns, counts):
    """Rows of our own format; keys that are neither a language nor the identifier stay as they are."""
    for where, record in records:
        row = {"row_id": identifier(record, where)}
        for key, value in record.items():
            rest = value
            if isinstance(value, dict) and value.keys() & PARTS:
                rest = {name: value[name] for name in value if name not in PARTS}
                value = value | {part: as_text(need(value, part, where), where) for part in PARTS}
            whole([key, rest], where)
            if key != "row_id" and (key != "id" or isinstance(value, dict)):
                row[key] = value
        if not languages(row):
            raise DataError(f"{where}: no language with a prompt and a response (found: {', '.join(record)})")
        yield row


def conversation(record, where):
    """[(role, text)] of a ShareGPT, messages, Alpaca or prompt-and-response record."""
    if "conversations" in record or "messages" in record:
        listed = as_kind(record["conversations" if "conversations" in record else "messages"], list, where)
        speaker, text = ("from", "value") if any("from" in as_kind(message, dict, where)
                                                 for message in listed) else ("role", "content")
        return [(ROLES.get(str(need(message, speaker, where))), as_text(need(message, text, where), where))
                for message in listed]
    if "instruction" in record:
        prompt, response = as_text(need(record, "instruction", where), where), need(record, "output", where)
        extra = as_text(record.get("input"), where)
        prompt += "\n" + extra if extra.strip() else ""
    else:
        prompt = as_text(need(record, "prompt", where), where)
        response = need(record, "completion" if "completion" in record else "response", where)
    system = [("system", record["system"])] if record.get("system") else []
    earlier = [(role, as_text(text, where)) for turn in record.get("history") or []
               for role, text in zip(("user", "assistant"), as_kind(turn, list, where))]
    return [*system, *earlier, ("user", prompt), ("assistant", as_text(response, where))]


def chat_rows(records, language, turns, counts):
    """One row a conversation (its first exchange), or with turns="all" one a user message with a reply."""
    for where, record in records:
        messages = conversation(record, where)
        counts["system prompts left out"] += sum(role == "system" for role, _ in messages)
        messages = [message for message in messages if message[0] != "system"]
        pairs = [(asked[1], reply[1]) for asked, reply in zip(messages, messages[1:])
                 if (asked[0], reply[0]) == ("user", "assistant")]
        if turns == "first":
            opens = [role for role, _ in messages[:2]] == ["user", "assistant"]
            counts["later turns left out"] += len(pairs[1:] if opens else pairs)
            pairs = pairs[:1] if opens else []
        counts["skipped: no user message followed by a reply"] += not pairs
        for turn, (prompt, response) in enumerate(pairs):
            name = identifier(record, where) + (f"#{turn + 1}" if turn else "")
            yield {"row_id": name, language: {"prompt": prompt, "response": response}}


def oasst_message(record, where):
    """The message with its replies, their kinds checked; "where" is added."""
    for key in ("message_id", "text"):
        as_kind(need(as_kind(record, dict, where), key, where), str, where)
    for key in ("lang", "parent_id"):
        if record.get(key) is not None:
            as_kind(record[key], str, where)
    replies = as_kind(record.get("replies") or [], list, where)
    return record | {"where": where, "replies": [oasst_message(reply, where) for reply in replies]}


def oasst_roots(records):
    """Root messages with their replies below them, out of trees, nested messages or flat messages."""
    roots, by_id = [], {}
    for where, record in records:
        if "message_id" in record:
            message = oasst_message(record, where)
            by_id[message["message_id"]] = message
        else:
            prompt = oasst_message(need(record, "prompt", where), where)
            roots.append(prompt | {"tree_state": record.get("tree_state")})
    for message in by_id.values():
        if message.get("parent_id") in by_id:
            by_id[message["parent_id"]]["replies"].append(message)
        elif message.get("parent_id") is None:
            roots.append(message)
    return roots


def oasst_edges(prompt, turns, counts):
    """(prompt, best reply) of the first turn or of every turn below it, by Open-Assistant's top-1 rule."""
    replies = prompt.get("replies") or []
    for reply in replies:
        best = len(replies) == 1 if reply.get("rank") is None else reply["rank"] == 0
        if not best or unusable(reply):
            continue
        yield prompt, reply
        later = [message for message in reply.get("replies") or [] if not unusable(message)]
        counts["later turns left out"] += len(later) if turns == "first" else 0
        for message in later if turns == "all" else []:
            yield from oasst_edges(message, turns, counts)


def unusable(message):
    """Deleted, or written by a model."""
    return message.get("deleted") or message.get("synthetic")


def oasst_fault(root, language):
    """Why nothing of a tree is taken, or None."""
    if root.get("tree_state") not in (None, "ready_for_export") or not root.get("review_result", True):
        return "tree not reviewed"
    if as_kind(need(root, "lang", root["where"]), str, root["where"]).split("-")[0] != language.split("-")[0]:
        return f"tree not in {language}"
    return "tree deleted or synthetic" if unusable(root) else None


def oasst_rows(records, language, turns, counts):
    """Rows of OpenAssistant trees or messages in `language` ("pt" takes "pt-BR" too)."""
    for root in oasst_roots(records):
        why, where = oasst_fault(root, language), root["where"]
        edges = [] if why else list(oasst_edges(root, turns, counts))
        if not edges:
            counts[f"skipped: {why or 'tree without a best reply'}"] += 1
        for prompt, reply in edges:
            texts = [as_text(need(message, "text", where), where) for message in (prompt, reply)]
            yield {"row_id": whole(reply["message_id"], where), language: dict(zip(PARTS, texts))}


def sniff(record, where):
    """The reader for a file whose first record this is."""
    keys = as_kind(record, dict, where).keys()
    if "message_id" in keys or isinstance(record.get("prompt"), dict) and "message_id" in record["prompt"]:
        return oasst_rows
    if languages(record):
        return parallel_rows
    if any(wanted <= keys for wanted in ({"conversations"}, {"messages"}, {"instruction", "output"},
                                         {"prompt", "response"}, {"prompt", "completion"})):
        return chat_rows
    raise DataError(f"{where}: unknown format (keys: {', '.join(keys)}); known: {FORMATS}")


def fault(row):
    """Why a row cannot be used, or None."""
    for language in languages(row):
        for part in PARTS:
            if not row[language][part].strip():
                return f"empty {part}"
            if re.search(HALF_A_CHARACTER, row[language][part]):
                return "broken Unicode (half of a character)"
    return None


def read_rows(path, language="en", turns="first", counts=None, targets=()):
    """Rows of a file in any of FORMATS, told by its first record, or of a data set that hub.py knows by name.

    language: of formats that hold only one. turns: "first" exchange of a conversation, or "all".
    counts: a Counter that receives what was read, kept and skipped, and why. targets: languages that parallel
    rows may still lack; a key of that name has to be one.
    Raises DataError with file and line.
    """
    assert turns in ("first", "all"), f"turns {turns!r} is neither first nor all"
    counts, records = Counter() if counts is None else counts, read_records(hub.data_file(path))
    if not records:
        raise DataError(f"{path}: the file is empty")
    counts.update({"read": len(records), "kept": 0})
    reader = sniff(records[0][1], records[0][0])
    records = [(where, as_kind(record, dict, where)) for where, record in records]
    if reader is parallel_rows:
        codes = {*targets}.union(*(languages(record) for _, record in records))
        records = [(where, held_languages(record, codes, where)) for where, record in records]
    rows = []
    try:
        for row in reader(records, language, turns, counts):
            why = fault(row)
            counts[f"skipped: {why}" if why else "kept"] += 1
            rows += [] if why else [row]
    except RecursionError:
        raise DataError(f"{path}: lists or objects nested too deeply after row {len(rows)}") from None
    if not rows:
        raise DataError(f"{path}: no usable row ({describe(counts)})")
    return rows


def write_rows(path, rows):
    """Write parallel JSONL. The identifier is "id", but "row_id" beside Indonesian, whose code is "id"."""
    write_jsonl(path, (row if "id" in row else {"id" if key == "row_id" else key: value
                                                for key, value in row.items()} for row in rows))


def write_preferences(path, rows, source, target):
    """Write TRL preference rows in both directions, none with equal responses; returns how many.

    Each has prompt, chosen and rejected as message lists (TRL, "Dataset formats"), and its "language".
    """
    def say(role, text):
        return [{"role": role, "content": text}]

    pairs = [{"prompt": say("user", row[own]["prompt"]), "chosen": say("assistant", row[own]["response"]),
              "rejected": say("assistant", row[other]["response"]), "language": own}
             for row in require_languages(rows, source, target)
             for own, other in ((source, target), (target, source))
             if row[source]["response"] != row[target]["response"]]
    write_jsonl(path, pairs)
    return len(pairs)


def require_languages(rows, *wanted):
    """The rows that hold all wanted languages; if none does, a DataError that names those in the data."""
    have = [row for row in rows if set(wanted) <= set(languages(row))]
    if not have:
        there = ", ".join(sorted({language for row in rows for language in languages(row)})) or "none"
        raise DataError(f"no row holds {' and '.join(wanted)}; languages in the data: {there}")
    return have


def describe(counts):
    """Counts in one line: "100 read, 95 kept, 5 skipped: empty response"."""
    return ", ".join(f"{number:,} {what}" for what, number in counts.items() if number)


# ---- text -> ids ----

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
        return DataError(f"{where}: the chat template {what} ({why}): mend it, or put another into "
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
            raise DataError(f"{directory}: no tokenizer.json there; tokenizer.save_pretrained writes one")
        source = optional_object(directory / "tokenizer.json") | {"truncation": None, "padding": None}
        config = optional_object(directory / "special_tokens_map.json")
        config |= optional_object(directory / "tokenizer_config.json")
        self.names = {key: self._name(key, config[key])
                      for key in ("bos_token", "eos_token", "unk_token", "pad_token") if config.get(key)}
        self.full = self._build(source)
        self.bos_id, self.eos_id, self.unk_id = (
            self.full.token_to_id(self.names.get(key, "")) for key in ("bos_token", "eos_token", "unk_token"))
        self.vocab_size = 1 + max(self.full.get_vocab(with_added_tokens=True).values())
        # of the embedding: often more, never fewer
        rows = optional_object(directory / "config.json").get("vocab_size")
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
            raise DataError(f"{self.directory / 'tokenizer_config.json'}: {key} is {name!r}, "
                            "a string was expected")
        return name

    def _build(self, source):
        try:
            return tokenizers.Tokenizer.from_str(json.dumps(source))
        except Exception as error:  # the library raises nothing narrower
            raise DataError(f"{self.directory / 'tokenizer.json'}: not a usable tokenizer: {error}") from None

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
                raise DataError(f"{self.directory / 'tokenizer.json'}: the added tokens {token['content']!r} "
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
            raise DataError(f"{self.directory}: the chat template does not write replies as they are given "
                            f"({probe!r} became {reply[:60]!r}): mend it, or put another into "
                            "chat_template.jinja")
        end = reply.index(probe) + len(probe)
        after = [match.start() >= end for match in self.added_token.finditer(reply)]
        self.stop_place = after.index(True) if any(after) else None  # which of a reply's added tokens ends it
        if self.eos_id is None and self.stop_place is None:
            raise DataError(f"{self.directory}: tokenizer_config.json names no eos_token of the vocabulary, "
                            "so no reply could end")
        self.stop_ids = {self.response_ids(probe)[-1]} | ({self.eos_id} - {None})
        for name in ("config.json", "generation_config.json"):
            ids = optional_object(self.directory / name).get("eos_token_id")
            ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
            if not all(type(token) is int for token in ids):
                raise DataError(f"{self.directory / name}: eos_token_id is {ids!r}, "
                                "whole numbers were expected")
            self.stop_ids |= set(ids)

    def _text(self, messages, asking):
        return self.render(messages=messages, add_generation_prompt=asking, **self.variables)

    def _reply(self, response):
        """What the template writes for a reply, after the prompt."""
        messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": response}]
        text = self._text(messages, asking=False)
        if not text.startswith(self.opening):
            raise DataError(f"{self.directory}: the chat template writes no reply after its own prompt")
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
            raise DataError(f"{self.directory}: tokenizer.json gives id {max(ids)}, "
                            f"config.json's vocab_size is {self.rows}: "
                            "tokenizer and weights do not belong together")
        return ids

    def text_ids(self, text):
        """Ids of bare text: no BOS, no template, no added token."""
        return self._plain(self.start, text)

    def prompt_ids(self, prompt, system=None):
        """Ids of a user message in the template, ready for the reply. At most one BOS, or DataError."""
        mark, (prompt, system) = self._guard(prompt, system or "")
        messages = [{"role": "system", "content": system}] if system else []
        text = self._text([*messages, {"role": "user", "content": prompt}], asking=True)
        ids = self._ids(self.start, text, mark)
        if self.bos_id is not None and ids.count(self.bos_id) > 1:
            raise DataError(f"{self.directory}: the chat template writes BOS more than once")
        if not ids:
            raise DataError(f"{self.directory}: the chat template writes nothing before a reply, which then "
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
    """The tokenizer of a Hugging Face directory or hub id. Raises DataError or HubError."""
    return Tokenizer(hub.local(directory, weights=()))


# ---- rows -> forks ----

@dataclass
class Fork:
    """One prompt and its continuations, as ids; continuation 0 is the right one, in the prompt's language."""
    prompt: list
    continuations: list
    language: str
    row: str

    @property
    def length(self):
        return len(self.prompt) + sum(map(len, self.continuations))

    @property
    def equal(self):
        """Another continuation has the right one's ids: such a pair says nothing about language."""
        return self.continuations[0] in self.continuations[1:]


def cut_to_fit(continuations, room):
    """The continuations, the longest cut until all fit into `room` tokens; None if no token of each does."""
    if room < len(continuations):
        return None
    longest = max(map(len, continuations))
    while sum(min(len(ids), longest) for ids in continuations) > room:
        longest -= 1
    return [ids[:longest] for ids in continuations]


def make_forks(rows, tokenizer, source="en", target="sw", row_tokens=1024, system=None, continuations="pair"):
    """([[source fork, target fork] a row], counts).

    A fork is a prompt, the response in its language, and the responses in the other ones.
    target: a language, or a list of them. continuations: "pair", or "chosen" for the right response alone.
    A fork longer than row_tokens loses the ends of its responses, and with them the stop token; a row whose
    prompt leaves them no room is dropped. Raises DataError if no row has the languages, or none fits.
    """
    assert continuations in ("pair", "chosen"), f"continuations {continuations!r} is neither pair nor chosen"
    wanted = [source, *([target] if isinstance(target, str) else target)]
    usable, groups = require_languages(rows, *wanted), []
    counts = Counter({"rows": len(rows), f"without {' and '.join(wanted)}": len(rows) - len(usable)})
    for row in usable:
        prompts = {own: tokenizer.prompt_ids(row[own]["prompt"], system) for own in wanted}
        replies = {own: tokenizer.response_ids(row[own]["response"]) for own in wanted}
        whole = [Fork(prompts[own], [replies[own], *(replies[other] for other in wanted
                                                     if other != own and continuations == "pair")],
                      own, row["row_id"]) for own in wanted]
        group = [replace(fork, continuations=cut_to_fit(fork.continuations, row_tokens - len(fork.prompt)))
                 for fork in whole]
        if any(fork.continuations is None for fork in group):
            counts[f"rows dropped: a prompt fills {row_tokens} tokens"] += 1
            continue
        groups.append(group)
        counts["forks"] += len(group)
        counts[f"forks cut to {row_tokens} tokens"] += sum(fork != uncut for fork, uncut in zip(group, whole))
        counts["forks with equal continuations (no preference to learn)"] += sum(fork.equal for fork in group)
    if not groups:
        raise DataError(f"no row fits into {row_tokens} tokens; make the rows longer")
    return groups, counts


# ---- forks -> batches ----

@dataclass
class Batch:
    """B packed rows of T tokens and their N predictions.

    Token q sees token k iff fork[q] == fork[k] and k <= q and (branch[k] == 0 or branch[k] == branch[q]).
    """
    tokens: torch.Tensor     # (B, T)
    positions: torch.Tensor  # (B, T), each continuation goes on at its prompt's length
    fork: torch.Tensor       # (B, T), index into forks; -1 padding
    branch: torch.Tensor     # (B, T), 0 prompt, i + 1 continuation i
    row_index: torch.Tensor  # (N,), the position in the flattened (B * T) hidden states that predicts
    targets: torch.Tensor    # (N,), the token it has to predict
    sequence: torch.Tensor   # (N,), the continuation this belongs to, counted over forks in order
    forks: list              # of Fork, in the order of the rows
    order: list              # of int: forks[i] was number order[i] of the forks given to pack

    def to(self, device):
        """The same batch with its tensors on a device."""
        return replace(self, **{field.name: getattr(self, field.name).to(device) for field in fields(self)
                                if field.name not in ("forks", "order")})

    @property
    def padding(self):
        """Share of the B * T tokens that is padding, 0 to 1."""
        return (self.fork < 0).double().mean().item()


def best_fit(lengths, row_tokens):
    """Rows, as lists of indices: longest first, each into the fullest row that has room. Deterministic."""
    rows, by_room = [], []  # by_room: sorted (room left, row)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        assert 0 < lengths[i] <= row_tokens, f"a fork of {lengths[i]} tokens for rows of {row_tokens}"
        at = bisect_left(by_room, (lengths[i], 0))
        if at == len(by_room):
            by_room.append((row_tokens, len(rows)))
            rows.append([])
        room, row = by_room.pop(at)
        rows[row].append(i)
        insort(by_room, (room - lengths[i], row))
    return rows


def laid_length(fork, ends):
    """Tokens a fork takes up in a row; see micro_batches."""
    return fork.length - (0 if ends else len(fork.continuations))


def lay_out(forks, rows, width, ends=True):
    """The Batch of `rows` (lists of indices into forks), each `width` tokens long."""
    grids = np.zeros((4, len(rows), width), np.int64)  # tokens, positions, fork, branch
    grids[2] = -1
    row_index, targets, sequence, order = [], [], [], []
    for b, row in enumerate(rows):
        cursor = 0
        for i in row:
            size, last = len(forks[i].prompt), b * width + cursor + len(forks[i].prompt) - 1
            for branch, ids in enumerate([forks[i].prompt, *forks[i].continuations]):
                assert ids, f"row {forks[i].row}: empty prompt or continuation"
                first, laid = size if branch else 0, ids if ends or not branch else ids[:-1]
                grids[:, b, cursor:cursor + len(laid)] = (laid, range(first, first + len(laid)),
                                                          [len(order)] * len(laid), [branch] * len(laid))
                if branch:  # the shift by one: the prompt's last token predicts the first, then each the next
                    here = b * width + cursor
                    row_index += [last, *range(here, here + len(ids) - 1)]
                    sequence += [sequence[-1] + 1 if sequence else 0] * len(ids)
                    targets += ids
                cursor += len(laid)
            order.append(i)
    return Batch(*torch.from_numpy(grids), *map(torch.tensor, (row_index, targets, sequence)),
                 [forks[i] for i in order], order)


def micro_batches(forks, row_tokens, rows, trim=True, ends=True):
    """[Batch]: forks packed into rows of row_tokens, `rows` of them a batch.

    trim drops padding that all rows share; without it every batch has one shape, in the last one with empty
    rows if need be. ends=False leaves each continuation's last token out of the row: it is a target, but
    predicts nothing.
    """
    assert forks and rows > 0, f"{len(forks)} forks in batches of {rows} rows"
    packed = best_fit([laid_length(fork, ends) for fork in forks], row_tokens)
    batches = []
    for first in range(0, len(packed), rows):
        part = packed[first:first + rows]
        longest = max(sum(laid_length(forks[i], ends) for i in row) for row in part)
        if not trim:
            longest, part = row_tokens, part + [[]] * (rows - len(part))
        batches.append(lay_out(forks, part, longest, ends))
    return batches


def pack(forks, row_tokens, trim=True):
    """All forks in one Batch."""
    rows = len(best_fit([fork.length for fork in forks], row_tokens))
    return micro_batches(forks, row_tokens, rows, trim)[0]


# ---- command line ----

def show(fork, tokenizer, colour):
    """A fork as text: the prompt, then each continuation, which the loss reads, marked."""
    before, after = ("\033[32m", "\033[0m") if colour else ("[[", "]]")
    lines = [f"row {fork.row}, {fork.language} prompt, {len(fork.prompt)} tokens:",
             tokenizer.decode(fork.prompt, special=True)]
    for i, ids in enumerate(fork.continuations):
        name = "right" if i == 0 else "equal to the right one" if ids == fork.continuations[0] else "wrong"
        lines += [f"continuation {i}, {name}, {len(ids)} tokens:",
                  before + tokenizer.decode(ids, special=True) + after]
    return "\n".join(lines)


def show_forks(rows, tokenizer, args):
    """Print what training would see of the rows: counts, packing, unknown tokens, samples."""
    groups, counts = make_forks(rows, tokenizer, args.source, args.lang or [], args.row_tokens, args.system)
    forks = [fork for group in groups for fork in group]
    batch = pack(forks, args.row_tokens)
    rows, width = batch.tokens.shape
    print(f"forks: {describe(counts)}")
    print(f"packed: {rows:,} rows of {width} tokens, {batch.padding:.1%} padding, "
          f"{len(batch.targets):,} predictions")
    for language in dict.fromkeys(fork.language for fork in forks) if tokenizer.unk_id is not None else []:
        ids = [token for fork in forks if fork.language == language for token in fork.continuations[0]]
        print(f"unknown to the tokenizer: {ids.count(tokenizer.unk_id) / len(ids):.1%} of {language} tokens")
    for group in groups[:args.show]:
        for fork in group:
            print("\n" + show(fork, tokenizer, sys.stdout.isatty()))


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Count a data file and show what training would see of it.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("file", help=f"{FORMATS}; JSONL or one JSON list, .gz too")
    parser.add_argument("--source", default="en", help="source language, and that of one-language files")
    parser.add_argument("--lang", help="target language; without it each prompt has its own response only")
    parser.add_argument("--turns", choices=("first", "all"), default="first", help="turns of a conversation")
    parser.add_argument("--model", help="Hugging Face directory whose tokenizer and template make the forks")
    parser.add_argument("--system", help="system prompt before every prompt")
    parser.add_argument("--row-tokens", type=int, default=1024, help="length of a packed row, in tokens")
    parser.add_argument("--show", type=int, default=0, help="rows to print as forks (needs --model)")
    parser.add_argument("--trl", metavar="OUT", help="write TRL preference rows here (needs --lang)")
    return parser.parse_args(argv)


def main(argv=None):
    args, counts = parse_args(argv), Counter()
    for given, other, needed in ((args.show, args.model, "--show needs --model DIR"),
                                 (args.trl, args.lang, "--trl needs --lang CODE")):
        if given and not other:
            raise DataError(needed)
    rows = read_rows(args.file, args.source, args.turns, counts)
    print(f"{args.file}: {describe(counts)}")
    print("languages: " + describe(Counter(language for row in rows for language in languages(row))))
    if args.trl:
        print(f"{args.trl}: {write_preferences(args.trl, rows, args.source, args.lang):,} preference rows")
    if args.model:
        show_forks(rows, load_tokenizer(args.model), args)


if __name__ == "__main__":
    run(main)
