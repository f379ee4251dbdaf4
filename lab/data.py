"""Split a parallel file into training, validation and test rows, once, by row.

    python -m lab.data alpaca_en_pt.jsonl --lang pt --name alpaca-pt

writes runs/data/alpaca-pt/train.jsonl and eval.jsonl, whose rows name their split, and into
lab/splits/alpaca-pt.json the identifiers of each part, what was left out, and the SHA-256 of both files. What
comes out otherwise than a split on record is refused.

Rows are dealt out in the order of the SHA-256 of their identifier: the split knows nothing of their content,
and most rows of a data set are in the same part in every language.
"""

import hashlib
import json
from collections import Counter
from pathlib import Path

import data
from engine import flags
from engine.files import InputError, read_json, run, write_text
from formats.records import describe_counts, write_rows

SPLITS = Path(__file__).parent / "splits"
SOURCE = "en"
LONGEST = 120               # words of a response


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def fault(row: dict, languages: list[str]) -> str | None:
    """Why a row says little of language, or would be cut; None for a good one."""
    if not set(languages) <= row.keys():
        return "left out: a language is missing"
    responses = [row[language]["response"] for language in languages]
    if len(set(responses)) < len(responses):
        return "left out: equal responses"
    if max(len(response.split()) for response in responses) > LONGEST:
        return f"left out: a response of more than {LONGEST} words"
    return None


def usable_rows(path: Path, languages: list[str]) -> tuple[list[dict], Counter]:
    """(rows in the order of their identifiers' hash, what was read and left out)."""
    read, kept = Counter(), []
    rows = data.read_rows(path, SOURCE, counts=read, targets=languages, unique=True)
    counts = Counter({"read": read["read"], "left out: empty or damaged": read["read"] - len(rows)})
    for row in rows:
        reason = fault(row, languages)
        if reason:
            counts[reason] += 1
        else:
            kept.append(row)
    return sorted(kept, key=lambda row: sha256(row["row_id"].encode())), counts


def write_parts(parts: dict[str, list[dict]], languages: list[str], directory: Path) -> dict[str, str]:
    """Write train.jsonl and eval.jsonl; {file: its SHA-256}."""
    files = {"train.jsonl": [], "eval.jsonl": []}
    for part, rows in parts.items():
        file, more = ("train.jsonl", {}) if part == "train" else ("eval.jsonl", {"split": part})
        for row in rows:
            texts = {language: row[language] for language in languages}
            files[file].append({"row_id": row["row_id"]} | texts | more)
    for name, rows in files.items():
        write_rows(directory / name, rows)
    return {name: sha256((directory / name).read_bytes()) for name in files}


def keep_record(path: Path, record: dict) -> None:
    """Write what was done; InputError when something else is on record."""
    before = read_json(path, missing=record)
    for key, value in before.items():
        if value != record[key]:
            raise InputError(f"{path} tells of a split with other {key}: another version of the data or "
                             f"of its translator; give it another --name, its results are others too")
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in record.items()]
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")       # a thousand identifiers are one line


def parse_args(argv=None):
    parser = flags.Parser(prog="python -m lab.data", description=__doc__)
    add = parser.add_argument
    add("pairs", type=Path, help="parallel JSONL with both languages in every row")
    add("--lang", required=True, help="target language")
    add("--name", required=True, help="of the split in lab/splits/, and of its directory")
    add("--out", type=Path, default=Path("runs/data"), help="directory of that directory")
    add("--validation", type=flags.positive_int, default=100, help="rows that choices are made by")
    add("--test", type=flags.positive_int, default=120, help="rows that figures are told of")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse_args(argv)
    languages = [SOURCE, args.lang]
    rows, counts = usable_rows(args.pairs, languages)
    first = args.validation + args.test
    if len(rows) <= first:
        raise InputError(f"{args.pairs}: {len(rows)} usable rows, none is left to train on: give a smaller "
                         f"--validation or --test")
    parts = {"validation": rows[:args.validation], "test": rows[args.validation:first], "train": rows[first:]}
    ids = {part: [row["row_id"] for row in own] for part, own in parts.items()}
    files = write_parts(parts, languages, args.out / args.name)
    print(f"{args.pairs}: {describe_counts(counts)}")
    print(f"{args.out / args.name}: " + describe_counts({part: len(own) for part, own in parts.items()}))
    record = {"languages": languages, "counts": counts, "ids": ids, "sha256": files}
    keep_record(SPLITS / f"{args.name}.json", record)


if __name__ == "__main__":
    run(main)
