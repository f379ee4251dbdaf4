"""The file of translated rows: one JSON line each, appended to, and taken up again after a kill.

    {"id": "7", "en": {"prompt", "response"}, "sw": {"prompt", "response"},
     "clo": {"hash": of what the translation depends on, "into": ["sw"], "failed": {}, "drafts": {}}}

A translation of which a segment failed its checks is under "drafts", out of the way of what reads the file as
data, and "failed" counts why: {"sw": {"length": 2}}.
"""

import itertools
import json
import shutil
from collections import Counter
from pathlib import Path

from engine.files import InputError, check_unicode, whole_lines, write_jsonl
from formats.records import identifier

Key = tuple[str, str]  # of a row: its id, and the hash of what its translation depends on


def file_failed_(record: dict, keep_failed: bool) -> bool:
    """Put failed translations beside the others, or under "clo", out of the way. True if one moved."""
    drafts = record["clo"]["drafts"]
    moving = [code for code in record["clo"]["failed"] if (code in drafts) == keep_failed]
    for code in moving:
        old, new = (drafts, record) if keep_failed else (record, drafts)
        new[code] = old.pop(code)
    return bool(moving)


def check_draft(record: dict, targets: list[str]) -> None:
    """KeyError, TypeError or AttributeError unless the record is as translate_chunk and file_failed_ leave
    it: a prompt and a response in every target, and how many segments failed why."""
    for code in targets:
        side = (record if code in record else record["clo"]["drafts"])[code]
        "".join([side["prompt"], side["response"]])
    for faults in record["clo"]["failed"].values():
        sum(faults.values())


def read_record(line: bytes, where: str, targets: list[str], keep_failed: bool) -> tuple[Key, dict, bool]:
    """(key, record, whether a failed translation changed its place) of a line. InputError for a foreign one,
    and for one in other languages."""
    try:
        record = json.loads(line)
        key = check_unicode(identifier(record, where), where), record["clo"]["hash"]
        made = ",".join(sorted(record["clo"]["into"]))
        hash(key)
        if made == ",".join(sorted(targets)):
            moved = file_failed_(record, keep_failed)
            check_draft(record, targets)
            return key, record, moved
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{where}: not written by translate.py, or damaged: choose another file, "
                         f"or delete the line to have its row translated again") from None
    raise InputError(f"{where} is a translation into {made}, this command translates into "
                     f"{','.join(targets)}: give another file name (--out)")


def read_done(path: Path, keys: list[Key], targets: list[str], keep_failed: bool) -> dict[Key, dict]:
    """The records of the file that need no more work. It is written anew if it ends in half a line (after a
    kill) or holds lines whose row, translator or settings have changed: then the old file stays beside it."""
    lines = whole_lines(path)
    wanted, names = set(keys), {name for name, _ in keys}
    done, stale, moved = {}, 0, False
    for number, line in enumerate(lines, 1):
        key, record, changed = read_record(line, f"{path}:{number}", targets, keep_failed)
        moved |= changed
        if key in done or key not in wanted and key[0] in names:
            stale += 1
        else:
            done[key] = record
    others = len(done.keys() - wanted)
    if others:
        print(f"{path} also holds {others:,} rows that this command does not translate: they stay")
    if stale:
        old = free_name(path)
        shutil.copyfile(path, old)
        print(f"{stale:,} of {len(lines):,} lines of {path} are of other text, another translator or other "
              f"settings: they are made anew; the file as it was is kept as {old}")
    if stale or moved or path.exists() and path.stat().st_size > sum(len(line) + 1 for line in lines):
        write_jsonl(path.resolve(), done.values())  # a link stays one
    return done


def free_name(path: Path) -> Path:
    """A name for the old file that is not taken."""
    names = (path.with_name(f"{path.name}.old{number}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())


def describe_faults(records: list[dict], targets: list[str], keep_failed: bool) -> str:
    """How many rows failed and why, by language."""
    lines = []
    for target in targets:
        failed = [record["clo"]["failed"][target] for record in records if target in record["clo"]["failed"]]
        fate = f"; {len(failed)} with a failed segment are {'kept' if keep_failed else 'left out'}:"
        lines.append(f"{target}: {len(records) - len(failed)} of {len(records)} rows translated"
                     + fate * bool(failed))
        faults = sum(map(Counter, failed), Counter())
        lines += [f"{number:8,} segments: {fault}" for fault, number in faults.most_common()]
    return "\n".join(lines)
