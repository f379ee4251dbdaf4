"""Public data formats -> rows.

A *row* is one sample: {"row_id": str, "en": {"prompt": str, "response": str}, "sw": {...}, ...}.

    counts = Counter()
    rows = read_rows("alpaca_data.json", "en", counts=counts)
    print(describe_counts(counts))       # 52,002 read, 51,974 kept, 28 skipped: empty response (first: ...)

Files are JSONL, one JSON list, one JSON object that holds such a list, CSV or TSV with a header; .gz too.
Each record is told by its keys, so one file may mix formats; conversations.py has the table of them and says
how to add one.

What is kept of public data (every decision is counted, `describe_counts` prints the counts):
- A conversation gives its first exchange; with turns="all" every user message and the reply right after it
  become a row of their own, without the turns before them.
- OpenAssistant trees follow Open-Assistant's own top-1 rule (oasst_dataset.py): reviewed trees in the
  language, no deleted or synthetic message in the thread, replies of rank 0 or without a sibling.
- System prompts, calls of tools, what is said before one, and its results are left out, as nothing translates
  them; so are images, and records about images or sound. So are replies that are labelled as bad.
- A record that names another language than the one asked for is left out.
- Rows with an empty prompt or response are dropped. Null and NaN are empty.
- A record that cannot be read is skipped; a file most of whose records cannot be read is refused.
"""

import contextlib
import csv
import io
import itertools
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from engine.files import InputError, is_unicode, parse_json, read_records, read_text, write_jsonl
from formats import hub
from formats.conversations import (BESIDE, CASES, FORMATS, SIDES, TASKS, UNKNOWN, OddRecord, Skip, as_text,
                                   find_format, is_blank, is_false, is_true, named, read_conversation,
                                   unread)
from formats.languages import normal, script_of, suggestion

PARTS = ("prompt", "response")
LANGUAGE_KEYS = ("language_code", "lang", "language")
NAMES = ("row_id", "id", "split", *LANGUAGE_KEYS)       # what a record says about itself
PARQUET = ("parquet files, which are not read here; with pandas and pyarrow installed, convert each: "
           "python -c \"import sys, pandas; pandas.read_parquet(sys.argv[1])"
           ".to_json(sys.argv[2], orient='records', lines=True)\" X.parquet X.jsonl")


# ---- files -> records ----

csv.field_size_limit(2 ** 31 - 1)       # the default, 131,072, is less than a long document


def read_data(path):
    """[(where, record)] of a data file; InputError with file and line, or when there is nothing."""
    path = hub.data_file(path)
    if kind_of(path) == ".parquet":
        raise InputError(f"{path} is one of the {PARQUET}")
    if kind_of(path) in (".csv", ".tsv"):
        records = read_table(path)
    else:
        single = single_object(path)
        records = read_records(path) if single is None else unwrap(path, single)
    if not records:
        raise InputError(f"{path}: the file is empty")
    try:
        return [(where, without_nan(record)) for where, record in records]
    except RecursionError:
        raise InputError(f"{path}: lists or objects nested too deeply") from None


def kind_of(path):
    """What a file's name says that it is, in small letters: ".csv" of "F.CSV.gz"."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def single_object(path):
    """The one object that a file is, on one line or several; None if it is anything else."""
    text = read_text(path)
    if text.lstrip().startswith("{"):
        with contextlib.suppress(InputError):
            return parse_json(text, path, "one object is wanted")
    return None


def unwrap(path, record):
    """[(where, record)] of a file with this one record, which may stand around a list of them, as in
    {"data": [...]} or {"train": [...]}. What it says of all of them is not read: InputError where that is
    part of a prompt."""
    lists = [key for key, value in record.items() if is_list_of_records(value)]
    known = is_message(record) or find_format(record)
    if not lists or known and "data" not in lists:
        return [(f"{path}:1", record)]
    if len(lists) > 1:
        raise InputError(f"{path}: lists of records under {named(lists)}: write the one wanted to a file")
    prompting = (*BESIDE, *TASKS, *CASES)
    common = [key for key, value in record.items() if value and key.lower() in prompting and key not in lists]
    if common:
        raise InputError(f"{path}: {named(common)} stands once, beside the list of records under "
                         f"{named(lists)}: write it into each of them")
    return [(f"{path}[{lists[0]}][{item}]", inner) for item, inner in enumerate(record[lists[0]])]


def is_list_of_records(value):
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def without_nan(value):
    """The value with null for every NaN, which pandas writes for it."""
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_nan(inner) for inner in value]
    return None if value != value else value          # NaN alone differs from itself


def read_table(path):
    """[(where, {column: text})] of a csv or tsv file with a header."""
    records, columns = [], None
    for where, cells in table_cells(path):
        columns = columns or cells
        if len(set(columns)) < len(columns):
            raise InputError(f"{where}: a header with two columns of one name: {named(columns)}")
        if len(cells) != len(columns):
            raise InputError(f"{where}: {len(cells)} cells below a header of {len(columns)}: "
                             f"is a quotation mark missing?")
        records.append((where, dict(zip(columns, cells))))
    return records[1:]


def table_cells(path):
    """Yields ("file:line", cells) of a csv or tsv file; a record is named by its first line.
    Blank lines are left out. A csv whose first line has semicolons and no comma is split at those, as Excel
    writes it where the comma is the decimal point."""
    text, line = read_text(path), 1
    first = text.lstrip().partition("\n")[0]
    semicolons = ";" in first and "," not in first and first.count('"') % 2 == 0      # a cell may go on below
    delimiter = "\t" if kind_of(path) == ".tsv" else ";" if semicolons else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for cells in reader:
            if len(cells) > 1 or "".join(cells).strip():
                yield f"{path}:{line}", cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}:{line}: not a table ({error}): is a quotation mark left open, or not "
                         f"doubled inside a quoted cell?") from None


# ---- what records say about themselves ----

def identifier(record, where):
    """row_id, or id (an object under "id" is Indonesian, no identifier), or file name and line."""
    for key in ("row_id", "id"):
        if isinstance(record.get(key), (str, int)):
            return str(record[key])
    return Path(where).name


def languages_of(row):
    """The languages of a row, in its order: keys whose value has a prompt and a response."""
    return [key for key, value in row.items() if isinstance(value, dict) and {*PARTS} <= value.keys()]


def refuse_other_language(record, language, counts):
    """Skip a record that says it is in another language ("pt" takes "pt-BR")."""
    labels = [record[key] for key in LANGUAGE_KEYS if record.get(key)]
    labels = [label[0] if isinstance(label, list) and len(label) == 1 else label for label in labels]
    label = next((label for label in labels if isinstance(label, str)), language)
    if normal(label) == normal(language):
        return
    if script_of(label):
        raise Skip(f"not in {language}")
    counts[f"in the language {label!r:.40}, which is unknown: taken for {language}"] += 1


# ---- conversations ----

def conversation_rows(record, where, asked, counts):
    """One row (the first exchange), or with turns="all" one for each user message with a reply."""
    refuse_other_language(record, asked.language, counts)
    record = known_spelling(record)
    messages = read_conversation(record, counts)
    asked.unread.update(dict.fromkeys(key for key in unread(record) if key not in NAMES))
    pairs, opens = counted_exchanges(messages, counts)
    if asked.turns == "first":
        counts["later turns left out"] += len(pairs) - opens
        pairs = pairs[:opens]
    if not pairs:
        raise Skip("no user message followed by a reply")
    name = identifier(record, where)
    return [{"row_id": f"{name}#{turn}" if turn > 1 else name, asked.language: dict(zip(PARTS, pair))}
            for turn, pair in enumerate(pairs, 1)]


def counted_exchanges(messages, counts):
    """The exchanges of a conversation; what is left out of it is counted."""
    roles = Counter(role for role, _ in messages)
    counts["system prompts left out"] += roles["system"]
    counts["messages of tools left out"] += roles["tool"]
    counts["replies marked as not for training left out"] += roles["untrained"]
    pairs, opens = exchanges([message for message in messages if message[0] != "system"])
    said = roles["user"] + roles["assistant"]
    counts["messages without a question or a reply beside them left out"] += said - 2 * len(pairs)
    return pairs, opens


def exchanges(messages):
    """([(question, reply)], whether they begin with the first message). Words before a call of a tool are no
    reply: the one that the call is for comes after it."""
    roles = [role for role, _ in messages]
    places = [number for number in range(len(roles) - 1)
              if roles[number:number + 2] == [*SIDES] and roles[number + 2:number + 3] != ["tool"]]
    pairs = [(messages[number][1], messages[number + 1][1]) for number in places]
    return pairs, places[:1] == [0]


def known_spelling(record):
    """The record; or with its keys in small letters, where no format is known by them as they are."""
    small = {key.strip().lower(): value for key, value in record.items()}
    spelt_once = len(small) == len(record)
    return small if spelt_once and not find_format(record) and find_format(small) else record


# ---- OpenAssistant ----

def is_message(record):
    return (isinstance(record, dict) and isinstance(record.get("message_id"), str) and "text" in record
            and isinstance(record.get("replies") or [], list))


def hang_messages(records, skipped):
    """[(where, record)] with flat OpenAssistant messages below their parents, as they are in trees; other
    records stay. skipped: {reason: [where]}, which receives messages that have no place."""
    messages, kept, roots = {}, [], []
    for where, record in records:
        if is_message(record):
            name = record["message_id"]
            if name in messages:
                skipped["a message that was there before"].append(where)
                continue
            record = messages[name] = record | {"replies": [*(record.get("replies") or [])]}
        kept.append((where, record))
    for where, record in kept:
        parent = record.get("parent_id") if is_message(record) else None
        if parent in (None, ""):                                            # a table has no null
            roots.append((where, record))
        elif str(parent) in messages:
            messages[str(parent)]["replies"].append(record)
        else:
            skipped["a message without its parent"].append(where)
    return roots


def unusable(message):
    """Deleted, or written by a model."""
    return is_true(message.get("deleted")) or is_true(message.get("synthetic"))


def replies_to(message):
    replies = message.get("replies") or []
    if not all(map(is_message, replies)):
        raise OddRecord('"replies" holds no messages')
    return replies


def best_replies(prompt, turns, counts):
    """(prompt, best reply) of the first turn or of every turn below it, by Open-Assistant's top-1 rule."""
    replies = replies_to(prompt)
    for reply in replies:
        rank = reply.get("rank")
        best = len(replies) == 1 if rank in (None, "") else is_false(rank)       # is 0
        if not best or unusable(reply):
            continue
        yield prompt, reply
        for message in replies_to(reply):
            if turns == "all" and not unusable(message):
                yield from best_replies(message, turns, counts)
            counts["later turns left out"] += turns == "first" and not unusable(message)


def tree_rows(record, asked, counts):
    """Rows of one OpenAssistant tree, or of a message with its replies, in the language asked for."""
    root = record if is_message(record) else record["prompt"]
    ready = record.get("tree_state") in (None, "", "ready_for_export")
    if not ready or not is_true(root.get("review_result", True)):
        raise Skip("tree not reviewed")
    refuse_other_language(root, asked.language, counts)
    if unusable(root):
        raise Skip("tree deleted or synthetic")
    rows = []
    for pair in best_replies(root, asked.turns, counts):
        texts = [as_text(message.get("text"), "text", counts) for message in pair]
        rows.append({"row_id": pair[1]["message_id"], asked.language: dict(zip(PARTS, texts))})
    if not rows:
        raise Skip("tree without a best reply")
    return rows


# ---- parallel ----

def parallel_row(record, where, asked, counts):
    """A row of our own format, whose languages are spelt as they were asked for: "zh" for "zh-CN". A language
    that is null is not translated yet; keys that are neither a language nor the identifier stay as they are.
    InputError when two keys are spellings of one language."""
    row, spelt = {"row_id": identifier(record, where)}, {}
    for key, value in record.items():
        has_part = isinstance(value, dict) and not value.keys().isdisjoint(PARTS)
        before = spelt.setdefault(normal(key), key) if has_part else key
        if before != key:
            raise InputError(f"{where}: {before!r:.40} and {key!r:.40} are the same language: leave one")
        if key == "row_id" or key == "id" and not isinstance(value, dict):
            continue
        if key not in asked.codes and not has_part:
            row[key] = value
        elif value is not None:
            name = asked.spellings.get(normal(key), key)
            if name != key:
                counts[f"{key!r:.40} taken for {name}"] += 1
            row[name] = language_side(value, name, counts)
    if not languages_of(row):
        raise OddRecord("no language with a prompt and a response")
    return row


def language_side(value, language, counts):
    """{"prompt": text, "response": text, ...} of one language of a row."""
    for part in PARTS:
        if not isinstance(value, dict) or part not in value:
            raise OddRecord(f'language {language!r:.40} (prompt and response, or null): "{part}" is missing')
    return value | {part: as_text(value[part], part, counts) for part in PARTS}


def with_our_parts(record, counts):
    """The record; sides that name their parts otherwise, as in {"en": {"question": ..., "answer": ...}}, get
    our names. One that cannot be read stays as it is."""
    if not isinstance(record, dict):
        return record
    return {key: our_parts(value, counts) if isinstance(value, dict) and script_of(key) else value
            for key, value in record.items()}


def our_parts(side, counts):
    if not side.keys().isdisjoint(PARTS) or not find_format(side):
        return side
    left_out = Counter()
    try:
        pairs, _ = counted_exchanges(read_conversation(side, left_out), left_out)
    except Skip:
        return side
    if len(pairs) != 1:
        return side
    counts.update(left_out)
    return side | dict(zip(PARTS, pairs[0]))


# ---- records -> rows ----

@dataclass(frozen=True)
class Asked:
    """What is wanted of a file; see read_rows. codes: the languages that its parallel rows are in.
    spellings: {normal code: code} of the languages asked for. unread: the columns found that are not read."""
    language: str
    turns: str
    codes: set
    spellings: dict
    unread: dict = field(default_factory=dict)


def record_rows(record, where, asked, counts):
    """The rows of one record. Skip or OddRecord where it has none."""
    if not isinstance(record, dict):
        raise OddRecord("no object")
    if any(code in record and (code != "id" or isinstance(record["id"], dict)) for code in asked.codes):
        return [parallel_row(record, where, asked, counts)]
    if is_message(record) or is_message(record.get("prompt")):
        return tree_rows(record, asked, counts)
    return conversation_rows(record, where, asked, counts)


def row_fault(row):
    """Why a row cannot be used, or None."""
    for language in languages_of(row):
        for part in PARTS:
            if is_blank(row[language][part]):
                return f"empty {part}"
    return None if is_unicode(row) else "broken Unicode (half of a character)"


def read_rows(path, language="en", turns="first", counts=None, targets=(), unique=False):
    """Rows of a file in any of FORMATS, or of a data set that hub.py knows by name.

    language: of formats that hold only one. turns: "first" exchange of a conversation, or "all".
    counts: a Counter that receives what was read, kept and skipped, and why. targets: languages that parallel
    rows may still lack; a key of that name has to be one. unique: refuse an identifier that two rows have, as
    an evaluation needs; else the second one gets "#2".
    Raises InputError with file and line.
    """
    counts = Counter() if counts is None else counts
    records = read_data(path)
    counts.update({"read": len(records), "kept": 0})
    records = [(where, with_our_parts(record, counts)) for where, record in records]
    codes = {*targets}.union(*(languages_of(record) for _, record in records if isinstance(record, dict)))
    asked = Asked(language, turns, codes, {normal(code): code for code in (language, *targets)})
    found, skipped, odd = [], defaultdict(list), defaultdict(list)    # the last two: {reason: [where]}
    for where, record in hang_messages(records, skipped):
        try:
            for row in record_rows(record, where, asked, counts):
                if fault := row_fault(row):
                    skipped[fault].append(where)
                else:
                    found.append((where, row))
        except RecursionError:
            odd["lists or objects nested too deeply"].append(where)
        except OddRecord as reason:
            odd[str(reason)].append(where)
        except Skip as reason:
            skipped[str(reason)].append(where)
    refuse_mostly_odd(odd, len(records))
    counts["kept"] = len(found)
    for reason, places in [*skipped.items(), *odd.items()]:
        counts[f"skipped: {reason} (first: {Path(places[0]).name})"] = len(places)
    if asked.unread:
        counts[f"columns not read ({named(asked.unread)})"] = len(asked.unread)
    if not found:
        raise InputError(f"{path}: no usable row ({describe_counts(counts)})")
    if unique:
        refuse_duplicates([(where, row["row_id"]) for where, row in found])
    return number_duplicates([row for _, row in found], counts)


def refuse_mostly_odd(odd, read):
    """InputError when more than half of the records of a file cannot be read: the file is not what it is
    taken for. odd: {reason: [where]}."""
    number = sum(map(len, odd.values()))
    if 2 * number > read:
        reason, places = next(iter(odd.items()))
        known = f"; known: {FORMATS}" if reason.startswith(UNKNOWN) else ""
        raise InputError(f"{places[0]}: {reason} ({number:,} of {read:,} records cannot be read){known}")


def refuse_duplicates(identified):
    """InputError naming both places when an identifier occurs twice. identified: [(where, identifier)]."""
    seen = {}
    for where, name in identified:
        if name in seen:
            raise InputError(f"{where}: the same identifier as in {seen[name]}: {str(name)[:80]!r}; "
                             f"each question needs one of its own")
        seen[name] = where


def number_duplicates(rows, counts):
    """The rows; the second one of an identifier gets "#2", and so on: none is lost, each has one answer."""
    taken, seen = {row["row_id"] for row in rows}, set()
    numbers = defaultdict(lambda: itertools.count(2))
    for row in rows:
        name = row["row_id"]
        if name in seen:
            names = (f"{name}#{number}" for number in numbers[name])
            row["row_id"] = next(new for new in names if new not in taken)
            counts["repeated identifiers numbered"] += 1
        seen.add(name)
    return rows


def write_rows(path, rows):
    """Write parallel JSONL. The identifier is "id", but "row_id" beside Indonesian, whose code is "id"."""
    def as_written(row):
        names = {} if "id" in row else {"row_id": "id"}
        return {names.get(key, key): value for key, value in row.items()}

    write_jsonl(path, map(as_written, rows))


def write_preferences(path, rows, *languages):
    """Write TRL preference rows: each language prefers its own response to every other one's, none with equal
    responses; returns how many.

    Each has prompt, chosen and rejected as message lists (TRL, "Dataset formats"), and its "language".
    """
    def say(role, text):
        return [{"role": role, "content": text}]

    pairs = []
    for row in require_languages(rows, *languages):
        for own, other in itertools.permutations(languages, 2):
            right, wrong = row[own]["response"], row[other]["response"]
            if right != wrong:
                pairs.append({"prompt": say("user", row[own]["prompt"]), "chosen": say("assistant", right),
                              "rejected": say("assistant", wrong), "language": own})
    write_jsonl(path, pairs)
    return len(pairs)


def require_languages(rows, *wanted):
    """The rows that hold all wanted languages; if none does, a InputError that names those in the data."""
    have = [row for row in rows if {*wanted} <= {*languages_of(row)}]
    if not have:
        there = sorted(set().union(*map(languages_of, rows)))
        near = "".join(suggestion(code, there) for code in wanted if code not in there)
        raise InputError(f"no row holds {' and '.join(wanted)}{near}; "
                         f"languages in the data: {', '.join(there) or 'none'}")
    return have


def describe_counts(counts):
    """Counts in one line: "100 read, 95 kept, 5 skipped: empty response"."""
    return ", ".join(f"{number:,} {what}" for what, number in counts.items() if number)
