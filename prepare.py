"""Which rows a run trains on, holds out and answers:
read, counted, translated where the target language is missing.

The rows of `--data` are for training; those of `--eval-data` were written by people in every language and
are never translated, since that would score the translator. Held-out rows steer choices (validation),
answered rows are the report.
"""

from collections import Counter
from pathlib import Path

import torch

import data
from formats import hub
from engine import ranks
from engine import runs
import translate
from engine.files import InputError, fingerprint
from formats.records import describe_counts, languages_of, read_rows, require_languages

LOOK = 4                # rows that a dry run translates
# Arguments in which a command may differ from that of the run it goes on with.
UNSAVED = {"dry_run", "gpus", "fresh", "resume", "out", "targets", "tensorboard", "recompute"}


def settings(args) -> dict:
    """The arguments that decide what a run gives."""
    return {key: value for key, value in vars(args).items() if key not in UNSAVED}


def read_inputs(args) -> tuple[list[dict], list[dict], list[dict], int]:
    """Training rows (some perhaps without the target languages yet), held-out rows, rows to answer at the
    end, and how many of the training rows are to be set apart as held-out ones: none when --eval-data has a
    validation split."""
    rows = usable_rows(read_counted(args.data, args), args)
    evaluated = []
    if args.eval_data:
        evaluated = require(args.eval_data, read_counted(args.eval_data, args), args.source, *args.targets)
    heldout = [row for row in evaluated if row.get("split") == "validation"][:args.holdout]
    answered = [row for row in evaluated if row.get("split", args.eval_split) == args.eval_split]
    if evaluated and not answered:
        raise InputError(f"{args.eval_data} has no row of split {args.eval_split!r}: see --eval-split")
    apart = 0 if heldout else min(args.holdout, len(rows) // 5)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(args.seed)).tolist()
    rows = [rows[i] for i in order[:apart + (args.samples or len(rows))]]
    if args.samples and len(rows) < apart + args.samples:
        print(f"{args.data} has {len(rows) - apart} rows to train on, "
              f"fewer than --samples {args.samples}: all are used")
    return rows, heldout, answered, apart


def read_counted(path: str, args) -> list[dict]:
    counts = Counter()
    rows = read_rows(path, args.source, args.turns, counts, args.targets)
    print(f"{path}: {describe_counts(counts)}")
    return rows


def require(path: str, rows: list[dict], *languages: str) -> list[dict]:
    """data.require_languages, which does not know the file."""
    try:
        return require_languages(rows, *languages)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def usable_rows(rows: list[dict], args) -> list[dict]:
    """The rows with the source and every target that any row holds;
    a target that none holds is left to the translator."""
    held = [target for target in args.targets if any(target in languages_of(row) for row in rows)]
    usable = require(args.data, rows, args.source, *held)
    if len(usable) < len(rows):
        print(f"{len(rows) - len(usable)} rows without {' or '.join([args.source, *held])} are left out")
    return usable


def missing_targets(rows: list[dict], args) -> list[str]:
    return [target for target in args.targets if not all(target in languages_of(row) for row in rows)]


def load_translator(rows: list[dict], args, device):
    """The translator, or None when no row needs it;
    InputError when it does not know a language that is missing."""
    missing = missing_targets(rows, args)
    if not missing:
        return None
    translator = translate.load(args.translator, device)
    for target in missing:
        if target not in translator.languages:
            held = sorted({language for row in rows for language in languages_of(row)})
            raise InputError(f"--lang {target}: {args.data} holds {', '.join(held)} and the translator "
                                 f"{args.translator} knows {', '.join(translator.languages)}")
    return translator


def look_ahead(args, device) -> tuple[int, list[dict]]:
    """How many rows a run would train on, and rows with every language to tell their lengths by: all of them
    where the data hold the languages, else the first LOOK rows, translated without writing anything."""
    rows, _, _, apart = read_inputs(args)
    count, rows = len(rows) - apart, rows[apart:]
    missing = missing_targets(rows, args)
    translator, rows = load_translator(rows, args, device), rows[:LOOK] if missing else rows
    for target in missing:
        texts = [row[args.source][part] for row in rows for part in ("prompt", "response")]
        done = translate.translate(texts, args.source, target, translator, args.beams)
        rows = [row | {target: {"prompt": prompt, "response": response}}
                for row, prompt, response in zip(rows, done[::2], done[1::2])]
    return count, rows


def check_enough(rows: list[dict], heldout: list[dict], args) -> None:
    if not rows or not heldout:
        raise InputError(
            f"{args.data}: {len(rows)} rows are left to train on and {len(heldout)} to hold out, "
            f"one of each is needed: give more rows, or --keep-failed if the translation checks dropped them")


def check_fit(rows: list[dict], path: str, tokenizer, args, row_tokens: int) -> None:
    """InputError, naming the file, unless one of the rows makes forks: of those that need no translation."""
    failed = None
    for row in rows:
        if not missing_targets([row], args):
            try:
                data.make_forks([row], tokenizer, args.source, args.targets, row_tokens, args.system_prompt)
                return
            except InputError as error:
                failed = error
    if failed:
        raise InputError(f"{path}: {failed}")


def prepare_rows(args, inputs: dict, tokenizer, row_tokens: int,
                 device) -> tuple[list[dict], list[dict], list[dict]]:
    """Rows to train on, to hold out and to answer, all with every language; all ranks call this,
    and translate. The run directory is claimed once all input has been read and found usable, and before
    anything is translated into it."""
    rows, heldout, answered, apart = ranks.on_first(lambda: read_inputs(args))
    translator = load_translator(rows, args, device)

    def claim() -> Path:
        check_enough(rows[apart:], heldout or rows[:apart], args)
        check_fit(rows[apart:], args.data, tokenizer, args, row_tokens)
        check_fit(heldout or rows[:apart], args.eval_data if heldout else args.data, tokenizer, args,
                  row_tokens)
        files = {"data": fingerprint(hub.data_file(args.data)),
                 "eval_data": args.eval_data and fingerprint(hub.data_file(args.eval_data))}
        return runs.open_run(args.out, settings(args), inputs | files, args.fresh, args.resume)
    run = ranks.on_first(claim)
    if translator is not None:
        missing = missing_targets(rows, args)
        rows = translate.translate_rows(
            rows, translator, args.source, missing, run / f"translated-{','.join(missing)}.jsonl",
            args.beams, keep_failed=args.keep_failed)
    heldout, rows = heldout or rows[:apart], rows[apart:]
    check_enough(rows, heldout, args)
    return rows, heldout, answered or heldout
