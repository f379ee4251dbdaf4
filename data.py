"""Data: public formats -> rows -> forks -> packed rows of tokens.

A *row* is one sample in one or more languages: {"row_id": str, "en": {"prompt": str, "response": str}, "sw": {...}}.
A *fork* is one prompt with k continuations. A *batch* is rows of T tokens filled with forks, and the list of its
predictions: the token that each predicting position has to name.

What is kept of public data (every decision is counted, see `describe`):
- A conversation gives its first exchange; with turns="all" each user message and the reply that follows it become a
  row of their own, without the turns before them.
- OpenAssistant trees follow Open-Assistant's own top-1 rule (oasst_dataset.py): reviewed trees in the language, no
  deleted or synthetic message in the thread, replies of rank 0 or without a sibling.
- System prompts inside the data are left out: nothing translates them. `system=` gives every prompt the same one.
- Rows with an empty prompt or response are dropped.

Templates are the checkpoint's own. Only the template may produce added tokens: "</s>" typed by a user stays text.

    python data.py FILE --model DIR --lang sw --show 2       # counts, packing, samples with the loss mask visible
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

ROLES = {"user": "user", "human": "user", "prompter": "user", "system": "system",
         "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}
KNOWN_FORMATS = ('parallel {"en": {"prompt", "response"}}, Alpaca (instruction, output), messages, ShareGPT '
                 '(conversations), OpenAssistant (trees, messages), prompt and response')
TEMPLATE_DATE = datetime(2024, 7, 26)  # templates that print today's date would change every cache overnight
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
        if type(error) is ValueError or isinstance(error, UnicodeError):
            raise  # ours are subclasses with names; a plain one is a bug and keeps its traceback
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


# ---- files -> records ----

def read_text(path):
    """The text of a UTF-8 file, plain or gzip (told by its first bytes)."""
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such file")
    if path.is_dir():
        raise DataError(f"{path}: is a directory, give a file")
    raw = path.read_bytes()
    try:
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
        return raw.decode("utf-8-sig")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip file ({error}); fetch it again") from None
    except UnicodeDecodeError as error:
        line = raw[:error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: not UTF-8 text; convert the file to UTF-8 JSONL") from None


def read_records(path):
    """[(where, object)] of a JSONL file ("file:line") or of a file with one JSON list ("file[item]")."""
    text, number = read_text(path), 1
    try:
        if text.lstrip()[:1] == "[":
            return [(f"{path}[{i}]", record) for i, record in enumerate(json.loads(text))]
        records = []
        for number, line in enumerate(text.split("\n"), 1):  # splitlines() would also cut at U+2028 inside strings
            if line.strip():
                records.append((f"{path}:{number}", json.loads(line)))
        return records
    except json.JSONDecodeError as error:
        line = number + error.lineno - 1
        raise DataError(f"{path}:{line}: not valid JSON, {error.msg} at column {error.colno}; "
                        "expected one object a line, or one list") from None


def write_jsonl(path, records):
    """Write one JSON object a line, to a temporary name first: never half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    with open(partial, "w", encoding="utf-8", newline="\n") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    os.replace(partial, path)


# ---- records -> rows ----

def need(record, key, where):
    """record[key], or an error that names the place and the keys that are there."""
    if not isinstance(record, dict) or key not in record:
        seen = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise DataError(f'{where}: "{key}" is missing (found: {seen})')
    return record[key]


def as_text(value, where):
    """A message's text: a string, null (a tool call), or a list of parts of which the text parts count."""
    if isinstance(value, list):
        return "".join(as_text(need(part, "text", where), where) for part in value)
    if not isinstance(value, str) and value is not None:
        raise DataError(f"{where}: text expected, found {type(value).__name__}")
    return value or ""


def languages(row):
    """The languages of a row, in its order: keys whose value has a prompt and a response."""
    return [key for key, value in row.items() if isinstance(value, dict) and {"prompt", "response"} <= value.keys()]


def identifier(record, where):
    """row_id, or id (an object under "id" is Indonesian, not an identifier), or file name and line."""
    for key in ("row_id", "id"):
        if isinstance(record.get(key), (str, int)):
            return str(record[key])
    return Path(where).name


def parallel_rows(records, language, turns, counts):
    """Rows of our own format; keys that are neither languages nor the identifier are kept as they are."""
    for where, record in records:
        row = {"row_id": identifier(record, where)}
        row |= {key: value for key, value in record.items() if key != "row_id" and (key != "id" or type(value) is dict)}
        for key, value in row.items():
            if isinstance(value, dict) and value.keys() & {"prompt", "response"}:
                row[key] = value | {part: as_text(need(value, part, where), where) for part in ("prompt", "response")}
        if not languages(row):
            raise DataError(f"{where}: no language with a prompt and a response (found: {', '.join(record)})")
        yield row


def conversation(record, where):
    """[(role, text)] of an Alpaca, prompt-and-response, ShareGPT or messages record."""
    if "conversations" in record or "messages" in record:
        listed = record.get("conversations") or record.get("messages") or []
        speaker, text = ("from", "value") if any("from" in message for message in listed) else ("role", "content")
        return [(ROLES.get(need(message, speaker, where), "other"), as_text(need(message, text, where), where))
                for message in listed]
    if "instruction" in record:
        prompt, response = (as_text(need(record, key, where), where) for key in ("instruction", "output"))
        prompt += "\n" + record["input"] if record.get("input") else ""
    else:
        response = need(record, "completion" if "completion" in record else "response", where)
        prompt, response = as_text(need(record, "prompt", where), where), as_text(response, where)
    system = [("system", record["system"])] if record.get("system") else []
    earlier = [(role, text) for turn in record.get("history") or [] for role, text in zip(("user", "assistant"), turn)]
    return [*system, *earlier, ("user", prompt), ("assistant", response)]


def chat_rows(records, language, turns, counts):
    """One row a conversation (its first exchange), or with turns="all" one a user message that has a reply."""
    for where, record in records:
        messages = conversation(record, where)
        counts["system prompts left out"] += sum(role == "system" for role, _ in messages)
        messages = [message for message in messages if message[0] != "system"]
        pairs = [(user[1], reply[1]) for user, reply in zip(messages, messages[1:])
                 if (user[0], reply[0]) == ("user", "assistant")]
        if not pairs or turns == "first" and messages[0][0] != "user":
            counts["skipped: does not open with a user message and its reply"] += 1
            continue
        counts["later turns left out"] += len(pairs[1:]) if turns == "first" else 0
        for turn, (prompt, response) in enumerate(pairs[:1] if turns == "first" else pairs):
            name = identifier(record, where) + (f"#{turn + 1}" if turn else "")
            yield {"row_id": name, language: {"prompt": prompt, "response": response}}


def oasst_roots(records):
    """The root messages, replies linked below them, of trees, nested messages or flat messages."""
    messages = [record | {"where": where, "replies": list(record.get("replies") or [])} for where, record in records
                if "message_id" in record]
    by_id = {message["message_id"]: message for message in messages}
    for message in messages:
        if message.get("parent_id") in by_id:
            by_id[message["parent_id"]]["replies"].append(message)
    trees = [need(record, "prompt", where) | {"where": where, "tree_state": record.get("tree_state")}
             for where, record in records if "message_id" not in record]
    return trees + [message for message in messages if message.get("parent_id") is None]


def oasst_edges(prompt, turns, counts):
    """(prompt message, its best reply) for the first turn or for every turn, by Open-Assistant's top-1 rule."""
    replies = prompt.get("replies") or []
    for reply in replies:
        best = len(replies) == 1 if reply.get("rank") is None else reply["rank"] == 0
        if reply.get("deleted") or reply.get("synthetic") or not best:
            continue
        yield prompt, reply
        for later in reply.get("replies") or []:
            if turns == "first":
                counts["later turns left out"] += 1
            elif not later.get("deleted") and not later.get("synthetic"):
                yield from oasst_edges(later, turns, counts)


def oasst_rows(records, language, turns, counts):
    """Rows of OpenAssistant trees or messages in `language` ("pt" also takes "pt-BR")."""
    for root in oasst_roots(records):
        ready = root.get("tree_state") in (None, "ready_for_export") and root.get("review_result", True)
        if not ready or root.get("lang", language).split("-")[0] != language.split("-")[0]:
            counts["skipped: unreviewed tree" if not ready else f"skipped: tree not in {language}"] += 1
            continue
        clean = not root.get("deleted") and not root.get("synthetic")
        edges = list(oasst_edges(root, turns, counts)) if clean else []
        counts["skipped: tree without an accepted reply"] += not edges
        for prompt, reply in edges:
            texts = {"prompt": need(prompt, "text", root["where"]), "response": need(reply, "text", root["where"])}
            yield {"row_id": need(reply, "message_id", root["where"]), language: texts}


def sniff(record, where):
    """The reader for a file whose first record this is."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: an object expected, found {type(record).__name__}; known formats: {KNOWN_FORMATS}")
    if "message_id" in record or isinstance(record.get("prompt"), dict) and "message_id" in record["prompt"]:
        return oasst_rows
    if languages(record):
        return parallel_rows
    for keys in ({"conversations"}, {"messages"}, {"instruction", "output"}, {"prompt", "response"},
                 {"prompt", "completion"}):
        if keys <= record.keys():
            return chat_rows
    raise DataError(f"{where}: unknown format (keys: {', '.join(record)}); known formats: {KNOWN_FORMATS}")


def fault(row):
    """Why a row cannot be used, or None."""
    for language in languages(row):
        for part in ("prompt", "response"):
            if not row[language][part].strip():
                return f"empty {part}"
            if re.search("[\ud800-\udfff]", row[language][part]):  # half of a character, as "\ud83d" in JSON
                return "broken Unicode"
    return None


def read_rows(path, language="en", turns="first", counts=None):
    """Rows of any known format, told by the first record.

    language: of formats that hold one language only. turns: "first" or "all" exchanges of a conversation.
    counts: a Counter that receives how much was read, kept and skipped, and why (see `describe`).
    Raises DataError with file and line.
    """
    assert turns in ("first", "all"), f"turns {turns!r} is neither first nor all"
    counts = Counter() if counts is None else counts
    records = read_records(path)
    if not records:
        raise DataError(f"{path}: the file is empty")
    reader = sniff(records[0][1], records[0][0])
    for where, record in records:
        if not isinstance(record, dict):
            raise DataError(f"{where}: an object expected, found {type(record).__name__}")
    counts["read"] += len(records)
    rows = []
    for row in reader(records, language, turns, counts):
        why = fault(row)
        counts[f"skipped: {why}" if why else "kept"] += 1
        if not why:
            rows.append(row)
    if not rows:
        raise DataError(f"{path}: no usable row ({describe(counts)})")
    return rows


def write_rows(path, rows):
    """Write rows as parallel JSONL; the identifier is "id" unless the row has Indonesian, whose code is "id" too."""
    write_jsonl(path, ({("row_id" if "id" in row else "id"): row["row_id"]}
                       | {key: value for key, value in row.items() if key != "row_id"} for row in rows))


def write_preferences(path, rows, source, target):
    """Write rows as TRL preference pairs, both directions; pairs with equal responses are left out.

    Each: prompt, chosen, rejected as message lists, and "language" of the prompt. Returns how many were written.
    """
    pairs = [{"prompt": [{"role": "user", "content": row[own]["prompt"]}],
              "chosen": [{"role": "assistant", "content": row[own]["response"]}],
              "rejected": [{"role": "assistant", "content": row[other]["response"]}], "language": own}
             for row in require_languages(rows, source, target)
             for own, other in ((source, target), (target, source))
             if row[source]["response"] != row[target]["response"]]
    write_jsonl(path, pairs)
    return len(pairs)


def require_languages(rows, *wanted):
    """The rows that hold all wanted languages. Raises DataError, naming the languages that are there, if none does."""
    have = [row for row in rows if all(language in languages(row) for language in wanted)]
    if not have:
        there = ", ".join(sorted({language for row in rows for language in languages(row)})) or "no language"
        raise DataError(f"no row holds {' and '.join(wanted)}; the rows hold {there}")
    return have


def describe(counts):
    """Counts in one line: "100 read, 95 kept, 5 skipped: empty response"."""
    return ", ".join(f"{number:,} {what}" for what, number in counts.items() if number)


# ---- text -> ids ----

def optional_json(path):
    """The object in a JSON file, {} without the file."""
    if not path.exists():
        return {}
    try:
        found = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not valid JSON, {error.msg}") from None
    if not isinstance(found, dict):
        raise DataError(f"{path}: an object expected, found {type(found).__name__}")
    return found


def without_prefix(part, inside):
    """A tokenizer.json part that puts no space before its text.

    Always for Metaspace "first" (only a text's very start gets that space); for the others when `inside` a line.
    """
    if isinstance(part, list):
        return [without_prefix(item, inside) for item in part]
    if not isinstance(part, dict):
        return part
    part = {key: without_prefix(value, inside) for key, value in part.items()}
    if part.get("type") == "Metaspace" and (inside or part.get("prepend_scheme") == "first"):
        part |= {"prepend_scheme": "never"} | ({"add_prefix_space": False} if "add_prefix_space" in part else {})
    if part.get("type") == "ByteLevel" and inside:
        part["add_prefix_space"] = False
    if part.get("type") == "Prepend" and inside:
        part = {"type": "Sequence", "normalizers": []}
    return part


def compile_template(source, where):
    """A chat template as transformers compiles it: render(**variables) -> str."""
    import jinja2
    import jinja2.sandbox  # comes with torch

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def to_json(value, indent=None):
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": TEMPLATE_DATE.strftime}

    def render(**variables):
        try:
            return template.render(tools=None, documents=None, **variables)
        except jinja2.TemplateError as error:
            raise DataError(f"{where}: the chat template fails: {error}") from None

    try:
        template = environment.from_string(source)
    except jinja2.TemplateError as error:
        raise DataError(f"{where}: the chat template does not compile: {error}") from None
    return render


class Tokenizer:
    """A checkpoint's tokenizer and chat template.

    Three encoders that know no added token, so that none can come out of text: `start` for the start of a prompt,
    `later` for text after an added token, `inside` for text that continues a line (never a SentencePiece space).
    """

    def __init__(self, directory):
        directory = Path(directory)
        if not (directory / "tokenizer.json").exists():
            raise DataError(f"{directory}: no tokenizer.json there; save it with tokenizer.save_pretrained(...)")
        self.directory = directory
        source = optional_json(directory / "tokenizer.json") | {"truncation": None, "padding": None}
        config = optional_json(directory / "special_tokens_map.json") | optional_json(directory / "tokenizer_config.json")
        self.full = self._build(source)
        self.vocab_size = 1 + max(self.full.get_vocab(with_added_tokens=True).values())
        self._find_added(source, config)
        self._build_encoders(source)
        self._find_template(config)
        self._find_stops()
        self.fingerprint = hashlib.sha256(json.dumps(
            [source, self.template, self.names, sorted(self.stop_ids)], sort_keys=True).encode()).hexdigest()

    def _build(self, source):
        try:
            return tokenizers.Tokenizer.from_str(json.dumps(source))
        except Exception as error:  # the library raises nothing more particular than Exception
            raise DataError(f"{self.directory / 'tokenizer.json'}: not a usable tokenizer: {error}") from None

    def _find_added(self, source, config):
        """Added tokens by name; bos and eos count as added even where they are only in the vocabulary."""
        self.names = {key: value["content"] if isinstance(value, dict) else value
                      for key in ("bos_token", "eos_token", "unk_token", "pad_token") if (value := config.get(key))}
        added = list(source.get("added_tokens") or [])
        known = {token["content"] for token in added}
        added += [{"content": name, "id": self.full.token_to_id(name)} for name in set(self.names.values()) - known
                  if self.full.token_to_id(name) is not None]
        added = [token for token in added if len(token["content"]) > 1]  # one character is text, and cannot be cut
        added.sort(key=lambda token: (-len(token["content"]), token["content"]))  # longest match first
        unknown = self.names.get("unk_token") or source["model"].get("unk_token")
        self.added_ids = {token["id"] for token in added if token["content"] != unknown}
        self.bos_id = self.full.token_to_id(self.names["bos_token"]) if "bos_token" in self.names else None
        written = [("\\s*" if token.get("lstrip") else "") + re.escape(token["content"])
                   + ("\\s*" if token.get("rstrip") else "") for token in added]
        self.scaffold = re.compile("|".join(f"(?P<id{token['id']}>{pattern})" for token, pattern in zip(added, written))
                                   or "(?!)")
        self.added_name = re.compile("|".join(re.escape(token["content"]) for token in added) or "(?!)")
        self.adds_bos = self.bos_id is not None and config.get(
            "add_bos_token", self.bos_id in self.full.encode("").ids)

    def _build_encoders(self, source):
        parts = ("normalizer", "pre_tokenizer")
        start = source | {"added_tokens": []}
        later = start | {part: without_prefix(source.get(part), inside=False) for part in parts}
        inside = start | {part: without_prefix(source.get(part), inside=True) for part in parts}
        self.start = self._build(start)
        self.later = self.start if later == start else self._build(later)
        self.inside = self.later if inside == later else self._build(inside)

    def _find_template(self, config):
        """chat_template.jinja, else tokenizer_config's chat_template, else the plain one."""
        file = self.directory / "chat_template.jinja"
        template = read_text(file) if file.exists() else config.get("chat_template")
        if isinstance(template, list):
            template = {one["name"]: one["template"] for one in template}.get("default")
        self.template = template or PLAIN_TEMPLATE
        self._template = compile_template(self.template, self.directory)
        self.variables = dict(self.names)
        if not template and not self.adds_bos:
            self.variables["bos_token"] = ""  # a chat template writes its own BOS, the plain one as the tokenizer would

    def _find_stops(self):
        """stop_ids: the end tokens of tokenizer, config, generation_config, and the one the template ends replies with."""
        self.opening = self._render([{"role": "user", "content": "x"}], True)
        probe = "reply"
        reply = self._reply(probe)
        end = reply.index(probe) + len(probe)
        places = [match.start() >= end for match in self.scaffold.finditer(reply)]
        self.stop_place = places.index(True) if True in places else None  # the how-manieth added token of a reply
        self.stop_ids = set()
        for name in ("config.json", "generation_config.json"):
            ids = optional_json(self.directory / name).get("eos_token_id")
            self.stop_ids |= set(ids if isinstance(ids, list) else [] if ids is None else [ids])
        self.eos_id = self.full.token_to_id(self.names["eos_token"]) if "eos_token" in self.names else None
        if self.eos_id is None and self.stop_place is None:
            raise DataError(f"{self.directory}: tokenizer_config.json names no eos_token of the vocabulary, "
                            "so a reply could not end")
        self.stop_ids |= {self.eos_id} - {None}
        self.stop_ids.add(self.response_ids(probe)[-1])

    def _render(self, messages, ask):
        return self._template(messages=messages, add_generation_prompt=ask, **self.variables)

    def _reply(self, response):
        """What the template writes for a reply, after the prompt."""
        messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": response}]
        text = self._render(messages, False)
        if not text.startswith(self.opening):
            raise DataError(f"{self.directory}: the chat template does not continue its own prompt with the reply")
        return text[len(self.opening):]

    def _plain(self, encoder, text):
        """Ids of text, none of them an added token: a piece that is one after all is cut after its first character."""
        if not text:
            return []
        encoding = encoder.encode(text, add_special_tokens=False)
        for token, (start, end) in zip(encoding.ids, encoding.offsets):
            if token in self.added_ids and end - start > 1:
                return self._plain(encoder, text[:start + 1]) + self._plain(self.inside, text[start + 1:])
        return encoding.ids

    def _guard(self, *texts):
        """(mark, the texts with a mark inside every added token's name): the template's own stay whole."""
        mark = next(chr(code) for code in range(0xE000, 0xF8FF) if not any(chr(code) in text for text in texts))
        guarded = []
        for text in texts:
            while self.added_name.search(text):
                text = self.added_name.sub(lambda name: name[0][0] + mark + name[0][1:], text)
            guarded.append(text)
        return mark, guarded

    def _ids(self, encoder, text, mark):
        """Ids of a rendered text: added tokens as themselves, the text between them plain, without marks."""
        ids, cursor = [], 0
        for match in self.scaffold.finditer(text):
            ids += self._plain(encoder, text[cursor:match.start()].replace(mark, ""))
            ids.append(int(match.lastgroup[2:]))
            cursor, encoder = match.end(), self.later
        return ids + self._plain(encoder, text[cursor:].replace(mark, ""))

    def text_ids(self, text):
        """Ids of bare text: no BOS, no template, no added token."""
        return self._plain(self.start, text)

    def prompt_ids(self, prompt, system=None):
        """Ids of a user message in the template, ready for the reply."""
        mark, (prompt, system) = self._guard(prompt, system or "")
        messages = [{"role": "system", "content": system}] if system else []
        ids = self._ids(self.start, self._render([*messages, {"role": "user", "content": prompt}], True), mark)
        if self.bos_id is not None and ids.count(self.bos_id) > 1:
            raise DataError(f"{self.directory}: the chat template writes BOS more than once")
        return ids

    def response_ids(self, response):
        """Ids of a reply as they follow prompt_ids; the last one is the stop token."""
        mark, (response,) = self._guard(response)
        text = self._reply(response)
        if self.stop_place is None:
            stop = [self.eos_id]
        else:
            stop, text = [], text[:list(self.scaffold.finditer(text))[self.stop_place].end()]
        after_added = any(match.end() == len(self.opening) for match in self.scaffold.finditer(self.opening))
        return self._ids(self.later if after_added else self.inside, text, mark) + stop

    def decode(self, ids, special=False):
        """Text of ids; special=True shows the added tokens too."""
        return self.full.decode(list(ids), skip_special_tokens=not special)


def load_tokenizer(directory):
    """The tokenizer of a Hugging Face directory; see Tokenizer."""
    return Tokenizer(directory)


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
        """Another continuation has the very ids of the right one: such a pair says nothing about language."""
        return self.continuations[0] in self.continuations[1:]


def cut_to_fit(continuations, room):
    """The continuations, the longest cut until all of them fit into `room` tokens; None when not one token of each does."""
    if room < len(continuations):
        return None
    longest = max(map(len, continuations))
    while sum(min(len(ids), longest) for ids in continuations) > room:
        longest -= 1
    return [ids[:longest] for ids in continuations]


def make_forks(rows, tokenizer, source="en", target="sw", row_tokens=1024, system=None, continuations="pair"):
    """Forks of the rows: for each, one per language, that prompt with its own response first, then the others'.

    target: a language or a list of them. continuations: "pair", or "chosen" to keep the right response only.
    A fork longer than row_tokens loses the ends of its responses, and with them the stop token; a row whose prompt
    leaves no room is dropped. Returns ([[source fork, target fork, ...] a row], counts). Raises DataError if no row
    has the languages.
    """
    assert continuations in ("pair", "chosen"), f"continuations {continuations!r} is neither pair nor chosen"
    wanted = [source, *([target] if isinstance(target, str) else target)]
    usable = require_languages(rows, *wanted)
    counts = Counter({"rows": len(rows), f"rows lack {' or '.join(wanted)}": len(rows) - len(usable)})
    groups = []
    for row in usable:
        prompts = {own: tokenizer.prompt_ids(row[own]["prompt"], system) for own in wanted}
        replies = {own: tokenizer.response_ids(row[own]["response"]) for own in wanted}
        group = []
        for own in wanted:
            others = [replies[other] for other in wanted if other != own and continuations == "pair"]
            fitting = cut_to_fit([replies[own], *others], row_tokens - len(prompts[own]))
            group.append(fitting and Fork(prompts[own], fitting, own, row["row_id"]))
        if None in group:
            counts[f"rows dropped, the prompt alone fills {row_tokens} tokens"] += 1
            continue
        groups.append(group)
        counts["forks"] += len(group)
        counts["forks cut to fit"] += sum(fork.continuations[0][-1] not in tokenizer.stop_ids or any(
            ids[-1] not in tokenizer.stop_ids for ids in fork.continuations) for fork in group)
        counts["forks with equal continuations (no preference, NLL only)"] += sum(fork.equal for fork in group)
    if not groups:
        raise DataError(f"no row fits into {row_tokens} tokens; raise the row length")
    return groups, counts


# ---- forks -> batches ----

@dataclass
class Batch:
    """B packed rows of T tokens and their N predictions.

    Token q sees token k iff fork[q] == fork[k] and k <= q and (branch[k] == 0 or branch[k] == branch[q]).
    """
    tokens: torch.Tensor     # (B, T)
    positions: torch.Tensor  # (B, T), every continuation goes on at its prompt's length
    fork: torch.Tensor       # (B, T), index into forks; -1 padding
    branch: torch.Tensor     # (B, T), 0 prompt, i + 1 continuation i
    row_index: torch.Tensor  # (N,), where in the flattened (B * T) hidden states a prediction is made
    targets: torch.Tensor    # (N,), the token predicted there
    sequence: torch.Tensor   # (N,), its continuation, counted over forks in order
    forks: list              # of Fork, in the order of the rows
    order: list              # of int: forks[i] was forks[order[i]] of the list that was packed

    def to(self, device):
        """The same batch with its tensors on a device."""
        moved = {field.name: getattr(self, field.name).to(device) for field in fields(self)
                 if isinstance(getattr(self, field.name), torch.Tensor)}
        return replace(self, **moved)

    @property
    def padding(self):
        """Share of the B * T tokens that is padding, 0 to 1."""
        return (self.fork < 0).double().mean().item()


def best_fit(lengths, row_tokens):
    """Rows as lists of indices: longest first, each into the fullest row that still has room. Deterministic."""
    rows, by_room = [], []  # by_room: sorted (room left, row)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        assert 0 < lengths[i] <= row_tokens, f"a fork of {lengths[i]} tokens in rows of {row_tokens}"
        at = bisect_left(by_room, (lengths[i], 0))
        if at == len(by_room):
            by_room.append((row_tokens, len(rows)))
            rows.append([])
        room, row = by_room.pop(at)
        rows[row].append(i)
        insort(by_room, (room - lengths[i], row))
    return rows


def lay_out(forks, rows, width):
    """The Batch of forks put into rows (lists of indices into forks) of `width` tokens."""
    tokens, positions, fork, branch = grids = np.zeros((4, len(rows), width), np.int64)
    fork -= 1
    predictions, order, sequences = [], [], 0
    for b, row in enumerate(rows):
        cursor = 0
        for i in row:
            size, prompt_end = len(forks[i].prompt), cursor + len(forks[i].prompt)
            for part, ids in enumerate([forks[i].prompt, *forks[i].continuations]):
                here, first = slice(cursor, cursor + len(ids)), size if part else 0
                grids[:, b, here] = (ids, range(first, first + len(ids)), [len(order)] * len(ids), [part] * len(ids))
                if part:  # the shift by one: the prompt's last token predicts the first, each token the next
                    sources = [prompt_end - 1, *range(cursor, cursor + len(ids) - 1)]
                    predictions.append(([b * width + at for at in sources], ids, [sequences] * len(ids)))
                    sequences += 1
                cursor += len(ids)
            order.append(i)
    lists = [torch.tensor([value for part in column for value in part]) for column in zip(*predictions)]
    return Batch(*map(torch.from_numpy, grids), *lists, [forks[i] for i in order], order)


def micro_batches(forks, row_tokens, rows=None, trim=True):
    """Forks packed into rows of row_tokens, `rows` of them a Batch; trim drops the columns that are all padding."""
    layout = best_fit([fork.length for fork in forks], row_tokens)
    parts = [layout[i:i + (rows or len(layout))] for i in range(0, len(layout), rows or len(layout))]
    longest = [max(sum(forks[i].length for i in row) for row in part) for part in parts]
    return [lay_out(forks, part, used if trim else row_tokens) for part, used in zip(parts, longest)]


def pack(forks, row_tokens, trim=True):
    """All forks in one Batch."""
    assert forks, "nothing to pack"
    return micro_batches(forks, row_tokens, None, trim)[0]


# ---- command line ----

def show(fork, tokenizer, colour):
    """A fork as text: the prompt, then each continuation with what the loss reads marked."""
    before, after = ("\033[32m", "\033[0m") if colour else ("[[", "]]")
    lines = [f"row {fork.row} ({fork.language}), prompt, {len(fork.prompt)} tokens:",
             tokenizer.decode(fork.prompt, special=True)]
    for i, ids in enumerate(fork.continuations):
        name = "right" if i == 0 else "equal to the right one" if ids == fork.continuations[0] else "wrong"
        lines += [f"continuation {i} ({name}), {len(ids)} tokens:", before + tokenizer.decode(ids, special=True) + after]
    return "\n".join(lines)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Read a data file, count it, and show what a model would train on.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("file", help=f"any of: {KNOWN_FORMATS}; JSONL or a JSON list, .gz too")
    parser.add_argument("--source", default="en", help="language of files that hold only one, and of the source forks")
    parser.add_argument("--lang", help="target language; without it every row is a prompt with its own response")
    parser.add_argument("--turns", choices=("first", "all"), default="first", help="exchanges kept of a conversation")
    parser.add_argument("--model", help="Hugging Face directory whose tokenizer and template to use")
    parser.add_argument("--system", help="system prompt put before every prompt")
    parser.add_argument("--row-tokens", type=int, default=1024, help="length of a packed row, in tokens")
    parser.add_argument("--show", type=int, default=0, help="print this many rows as forks, with the loss mask")
    parser.add_argument("--trl", metavar="OUT", help="write TRL preference rows (needs --lang)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    counts = Counter()
    rows = read_rows(args.file, args.source, args.turns, counts)
    held = Counter(language for row in rows for language in languages(row))
    print(f"{args.file}: {describe(counts)}\nlanguages: {describe(held)}")
    if args.trl:
        if not args.lang:
            raise DataError("--trl writes pairs of two languages; name the target with --lang")
        print(f"{args.trl}: {write_preferences(args.trl, rows, args.source, args.lang):,} preference rows")
    if args.show and not args.model:
        raise DataError("--show needs a tokenizer; name a checkpoint with --model DIR")
    if args.model:
        tokenizer = load_tokenizer(args.model)
        groups, counts = make_forks(rows, tokenizer, args.source, args.lang or [], args.row_tokens, args.system)
        forks = [fork for group in groups for fork in group]
        batch = pack(forks, args.row_tokens)
        print(f"{describe(counts)}\npacked: {len(batch.tokens):,} rows of up to {batch.tokens.shape[1]} tokens, "
              f"{batch.padding:.1%} padding, {len(batch.targets):,} predicted tokens")
        for fork in [fork for group in groups[:args.show] for fork in group]:
            print("\n" + show(fork, tokenizer, sys.stdout.isatty()))


if __name__ == "__main__":
    run(main)
