"""Public data formats -> rows.

A *row* is one sample: {"row_id": str, "en": {"prompt": str, "response": str}, "sw": {...}, ...}.

What is kept of public data (every decision is counted, `describe_counts` prints the counts):
- A conversation gives its first exchange; with turns="all" every user message and the reply right after it
  become a row of their own, without the turns before them.
- OpenAssistant trees follow Open-Assistant's own top-1 rule (oasst_dataset.py): reviewed trees in the
  language, no deleted or synthetic message in the thread, replies of rank 0 or without a sibling.
- System prompts in the data are left out, as nothing translates them.
- Rows with an empty prompt or response are dropped.
"""

import re
from collections import Counter
from pathlib import Path

from engine.files import HALF_A_CHARACTER, InputError, as_kind, check_unicode, need, read_records, write_jsonl
from formats import hub

PARTS = ("prompt", "response")
ROLES = {"user": "user", "human": "user", "prompter": "user", "system": "system",
         "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}
FORMATS = ('parallel ({"en": {"prompt", "response"}, ...}), Alpaca (instruction, output), messages, ShareGPT '
           '(conversations), OpenAssistant (trees or messages), prompt and response')


def as_text(value, where):
    """A message's text: a string, null (a tool call), or a list of parts that are joined."""
    if isinstance(value, list):
        return "".join(as_text(need(part, "text", where), where) for part in value)
    return "" if value is None else as_kind(value, str, where)


def languages_of(row):
    """The languages of a row, in its order: keys whose value has a prompt and a response."""
    return [key for key, value in row.items() if isinstance(value, dict) and {*PARTS} <= value.keys()]


def identifier(record, where):
    """row_id, or id (an object under "id" is Indonesian, no identifier), or file name and line."""
    for key in ("row_id", "id"):
        if isinstance(record.get(key), (str, int)):
            return check_unicode(str(record[key]), where)
    return Path(where).name


def held_languages(record, codes, where):
    """The record without those of the languages that are null: not translated yet. InputError for another kind
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
            check_unicode([key, rest], where)
            if key != "row_id" and (key != "id" or isinstance(value, dict)):
                row[key] = value
        if not languages_of(row):
            raise InputError(f"{where}: no language with a prompt and a response (found: {', '.join(record)})")
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
            yield {"row_id": check_unicode(reply["message_id"], where), language: dict(zip(PARTS, texts))}


def sniff(record, where):
    """The reader for a file whose first record this is."""
    keys = as_kind(record, dict, where).keys()
    if "message_id" in keys or isinstance(record.get("prompt"), dict) and "message_id" in record["prompt"]:
        return oasst_rows
    if languages_of(record):
        return parallel_rows
    if any(wanted <= keys for wanted in ({"conversations"}, {"messages"}, {"instruction", "output"},
                                         {"prompt", "response"}, {"prompt", "completion"})):
        return chat_rows
    raise InputError(f"{where}: unknown format (keys: {', '.join(keys)}); known: {FORMATS}")


def row_fault(row):
    """Why a row cannot be used, or None."""
    for language in languages_of(row):
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
    Raises InputError with file and line.
    """
    assert turns in ("first", "all"), f"turns {turns!r} is neither first nor all"
    counts, records = Counter() if counts is None else counts, read_records(hub.data_file(path))
    if not records:
        raise InputError(f"{path}: the file is empty")
    counts.update({"read": len(records), "kept": 0})
    reader = sniff(records[0][1], records[0][0])
    records = [(where, as_kind(record, dict, where)) for where, record in records]
    if reader is parallel_rows:
        codes = {*targets}.union(*(languages_of(record) for _, record in records))
        records = [(where, held_languages(record, codes, where)) for where, record in records]
    rows = []
    try:
        for row in reader(records, language, turns, counts):
            why = row_fault(row)
            counts[f"skipped: {why}" if why else "kept"] += 1
            rows += [] if why else [row]
    except RecursionError:
        raise InputError(f"{path}: lists or objects nested too deeply after row {len(rows)}") from None
    if not rows:
        raise InputError(f"{path}: no usable row ({describe_counts(counts)})")
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
    """The rows that hold all wanted languages; if none does, a InputError that names those in the data."""
    have = [row for row in rows if set(wanted) <= set(languages_of(row))]
    if not have:
        there = ", ".join(sorted({language for row in rows for language in languages_of(row)})) or "none"
        raise InputError(f"no row holds {' and '.join(wanted)}; languages in the data: {there}")
    return have


def describe_counts(counts):
    """Counts in one line: "100 read, 95 kept, 5 skipped: empty response"."""
    return ", ".join(f"{number:,} {what}" for what, number in counts.items() if number)
