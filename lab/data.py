"""Split a parallel file into training, validation and test rows, once, by row.

    python -m lab.data alpaca_en_pt.jsonl --lang pt --name alpaca-pt

writes runs/data/alpaca-pt/train.jsonl and eval.jsonl (whose rows name their split), and what was done into
lab/splits/alpaca-pt.json: the rows' identifiers, how many were left out and why, and the SHA-256 of every file.
Where that is there already the rows are dealt out as it says, and files that come out otherwise are refused.

Rows are dealt out in the order of the SHA-256 of their identifier: the split knows nothing of their content, and
most rows of a data set are in the same part in every language.
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
LONGEST = 120               # words of a response


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def left_out(row: dict, languages: list[str]) -> str | None:
    """Why a row says little of language, or would be cut; None for a good one."""
    responses = [row[language]["response"] for language in languages]
    if len(set(responses)) < len(responses):
        return "equal responses"
    if max(len(response.split()) for response in responses) > LONGEST:
        return f"a response of more than {LONGEST} words"
    return None


def usable_rows(path: Path, languages: list[str]) -> tuple[list[dict], dict]:
    """(rows in the order of their identifiers' hash, what was read and left out)."""
    counts, kept = Counter(), []
    for row in data.read_rows(path, languages[0], counts=counts, targets=languages[1:], unique=True):
        reason = "a language is missing" if not set(languages) <= row.keys() else left_out(row, languages)
        if reason is None:
            kept.append({"row_id": row["row_id"]} | {language: row[language] for language in languages})
        else:
            counts[f"left out: {reason}"] += 1
    return sorted(kept, key=lambda row: sha256(row["row_id"].encode())), dict(counts)


def deal(rows: list[dict], validation: int, test: int, train: int | None) -> dict[str, list[dict]]:
    """{part: its rows}. InputError when none is left to train on."""
    first = validation + test
    if len(rows) <= first:
        raise InputError(f"{len(rows)} usable rows: with {validation} for validation and {test} for test none "
                         f"is left to train on; give fewer of them")
    last = None if train is None else first + train
    return {"validation": rows[:validation], "test": rows[validation:first], "train": rows[first:last]}


def write_parts(parts: dict[str, list[dict]], directory: Path) -> dict[str, str]:
    """Write train.jsonl and eval.jsonl; {file: its SHA-256}."""
    write_rows(directory / "train.jsonl", parts["train"])
    answered = [row | {"split": part} for part in ("validation", "test") for row in parts[part]]
    write_rows(directory / "eval.jsonl", answered)
    return {name: sha256((directory / name).read_bytes()) for name in ("train.jsonl", "eval.jsonl")}


def write_record(path: Path, record: dict) -> None:
    """JSON with a line for each key: thousands of identifiers are nothing to scroll through."""
    lines = [f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in record.items()]
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def again(record: dict, rows: list[dict], path: Path) -> dict[str, list[dict]]:
    """The parts that a split on record names. InputError when a row of it is missing."""
    known = {row["row_id"]: row for row in rows}
    ids = record["ids"]
    missing = [row for part in ids.values() for row in part if row not in known]
    if missing:
        raise InputError(f"{path}: {len(missing)} of the split's rows are missing, the first is {missing[0]}: "
                         f"make the file as lab/README.md tells")
    return {part: [known[row] for row in own] for part, own in ids.items()}


def parse_args(argv=None):
    parser = flags.Parser(prog="python -m lab.data", description=__doc__)
    add = parser.add_argument
    add("pairs", type=Path, help="parallel JSONL with both languages in every row")
    add("--lang", required=True, help="target language")
    add("--source", default="en", help="language the model knows")
    add("--name", required=True, help="of the split, in lab/splits/, and of its directory")
    add("--out", type=Path, default=Path("runs/data"), help="directory of directories")
    add("--splits", type=Path, default=SPLITS, help="directory of what was done")
    add("--validation", type=flags.positive_int, default=100, help="rows that choices are made by")
    add("--test", type=flags.positive_int, default=120, help="rows that figures are told of")
    add("--train", type=flags.positive_int, default=None, help="rows to train on; without it all others")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse_args(argv)
    rows, counts = usable_rows(args.pairs, [args.source, args.lang])
    path, directory = args.splits / f"{args.name}.json", args.out / args.name
    record = read_json(path, missing={})
    parts = again(record, rows, args.pairs) if record else deal(rows, args.validation, args.test, args.train)
    files = {args.pairs.name: sha256(args.pairs.read_bytes())} | write_parts(parts, directory)
    print(f"{args.pairs}: {describe_counts(counts)}")
    print(f"{directory}: " + ", ".join(f"{len(own)} {part}" for part, own in parts.items()))
    if not record:
        ids = {part: [row["row_id"] for row in own] for part, own in parts.items()}
        write_record(path, {"languages": [args.source, args.lang], "counts": counts, "sha256": files, "ids": ids})
        print(f"{path} is new: commit it")
        return
    for name in ("train.jsonl", "eval.jsonl"):
        if files[name] != record["sha256"][name]:
            raise InputError(f"{directory / name} is not the file that {path} tells of: another version of the "
                             f"data or of its translator; under another --name it is a split of its own")


if __name__ == "__main__":
    run(main)
