"""The file of translated rows: one JSON line each, appended to, and taken up again after a kill.

    {"id": "7", "en": {"prompt", "response"}, "sw": {"prompt", "response"},
     "clo": {"hash": of what the translation depends on, "into": ["sw"], "failed": {}, "drafts": {}}}

A translation of which a segment failed its checks is under "drafts", out of the way of what reads the file as
data, and "failed" counts why: {"sw": {"length": 2}}.
"""

import shutil
from collections import Counter
from pathlib import Path

from engine.files import InputError, check_unicode, free_name, read_journal, write_jsonl
from formats.records import identifier

Key = tuple[str, str]  # of a row: its id, and the hash of what its translation depends on
REMEDY = "choose another file, or delete the line to have its row translated again"


def file_failed_(record: dict, keep_failed: bool) -> None:
    """Put failed translations beside the others, or under "clo", out of the way."""
    drafts = record["clo"]["drafts"]
    old, new = (drafts, record) if keep_failed else (record, drafts)
    for code in record["clo"]["failed"]:
        if code in old:
            new[code] = old.pop(code)


def check_draft(record: dict, targets: list[str]) -> None:
    """KeyError, TypeError or AttributeError unless the record is as translate.py leaves it: a prompt and a
    response in every target, and how many segments failed why."""
    for code in targets:
        side = (record if code in record else record["clo"]["drafts"])[code]
        "".join([side["prompt"], side["response"]])
    for faults in record["clo"]["failed"].values():
        sum(faults.values())


def take_up_(record: dict, where: str, targets: list[str], keep_failed: bool) -> Key:
    """The key of a record, whose failed translations go where they are wanted now. InputError for a record of
    another program, and for one in other languages."""
    try:
        key = check_unicode(identifier(record, where), where), record["clo"]["hash"]
        made = ",".join(sorted(record["clo"]["into"]))
        hash(key)
        if made == ",".join(sorted(targets)):
            file_failed_(record, keep_failed)
            check_draft(record, targets)
            return key
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{where}: not written by translate.py, or damaged: {REMEDY}") from None
    raise InputError(f"{where} is a translation into {made}, this command translates into "
                     f"{','.join(targets)}: give another file name (--out)")


def read_done(path: Path, keys: list[Key], targets: list[str], keep_failed: bool) -> dict[Key, dict]:
    """The records of the file that need no more work. It holds no others afterwards; with lines whose row,
    translator or settings have changed the old file stays beside it."""
    wanted, names = set(keys), {name for name, _ in keys}
    done, stale = {}, 0
    for where, record in read_journal(path, REMEDY):
        key = take_up_(record, where, targets, keep_failed)
        # A second line of a row, or one of another text, translator or settings than this command's.
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
        print(f"{stale:,} of {stale + len(done):,} lines of {path} are of other text, another translator or "
              f"other settings: they are made anew; the file as it was is kept as {old}")
    if path.exists():
        write_jsonl(path.resolve(), done.values())  # a link stays one
    return done


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
