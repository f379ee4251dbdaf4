"""Translate an instruction data set with M2M100 or NLLB: documents in, documents out, every sentence checked.

    python translate.py --lang sw --data demo/english.jsonl --out swahili.jsonl
    python translate.py --lang de,ko --text "The capital of France is Paris."
    torchrun --nproc-per-node 2 translate.py --lang sw ...       # rows are dealt to processes; the same file

A document is split into segments (lines, then sentences); code, links, formulas and markup are set aside
and come back untouched. Segments are translated in batches by beam search and checked; what fails is tried
again, then marked. The row of a marked segment is left out of training, its translation is kept in the file.

The same command goes on where a killed one stopped. A file holds one set of languages: others are refused.
Lines whose row, translator or settings have changed are made anew, and the old file is kept beside the new.
"""

import contextlib
import itertools
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from data import read_counted
from engine import flags, ranks
from engine.files import InputError, append_jsonl, check_overwrite, check_unicode, fingerprint, locked
from engine.progress import progress
from formats import hub
from formats.languages import DENSE, UNSPACED, language_list, normal, script_of, suggestion
from formats.markup import KEEP, TEXT, WORD, hide, parse, split_edges, split_spans, unhide
from formats.records import identifier, languages_of, require_languages
from formats.translated import Key, describe_faults, file_failed_, read_done
from formats.weights import DTYPES
from m2m100.beam import beam_search
from m2m100.checks import copied, loops, odd_length, wrong_script
from m2m100.translator import Translator, load

MAX_SOURCE = 150      # tokens of a segment: the models were trained on sentences
LONGEST_TOKEN = 16    # characters; a text of more than MAX_SOURCE such tokens is not worth counting
MAX_LOGITS = 2**26    # elements of the largest logits matrix: bounds the batch when the vocabulary is large
NO_REPEAT = 4         # the second try of a segment bans every repeated n-gram of this length
UNKNOWN_SHARE = 0.1   # a source with more unknown tokens than this cannot be translated
CHUNK = 32            # rows that a process translates before their lines are appended


# ---- segments ----

@dataclass
class Direction:
    """A translator, its two languages, how it searches. on_tokens(n) is called when n more are generated."""
    translator: Translator
    source: str
    target: str
    beams: int = 5
    batch_tokens: int = 2048
    on_tokens: Callable[[int], None] = lambda generated: None

    def source_ids(self, text: str) -> list[int]:
        tokenizer = self.translator.tokenizer
        language = tokenizer.languages[self.source]
        end = self.translator.model.config.eos_token_id
        return [language, *tokenizer.encode(text), end]

    def fits(self, segment: str) -> bool:
        """Whether a segment, its spans hidden, is short enough for the model."""
        room = min(MAX_SOURCE, self.translator.model.config.max_position_embeddings)
        if len(segment) > room * LONGEST_TOKEN:
            return False
        return len(self.source_ids(segment)) <= room

    def fault(self, source: str, source_ids: list[int], text: str, ids: list[int]) -> str | None:
        """Why a translation cannot be trusted, or None."""
        unknown = source_ids.count(self.translator.tokenizer.unknown)
        end = self.translator.model.config.eos_token_id
        faults = {"unknown words": unknown > UNKNOWN_SHARE * len(source_ids),
                  "cut at the limit": ids[-1] != end,
                  "empty": bool(WORD.search(source)) and not WORD.search(text),
                  "repetition": loops(ids) and not loops(source_ids),
                  "wrong script": wrong_script(text, self.target),
                  "copied": copied(source, text, self.source),
                  "length": odd_length(source, text, (self.source, self.target))}
        return next((name for name, found in faults.items() if found), None)


Draft = tuple[str, str | None]  # a translation and its fault, if any


def translate_sentences(texts: list[str], direction: Direction, beams: int,
                        no_repeat: int = 0) -> list[Draft]:
    """The drafts of some texts, made in batches of like length."""
    model = direction.translator.model
    tokenizer = direction.translator.tokenizer
    language = tokenizer.languages[direction.target]
    longest = model.config.max_position_embeddings
    most = MAX_LOGITS // (beams * len(model.head))
    sources = [direction.source_ids(text) for text in texts]
    drafts = {}
    waiting = sorted(range(len(texts)), key=lambda i: -len(sources[i]))
    while waiting:
        largest = len(sources[waiting[0]])
        size = max(1, min(direction.batch_tokens // largest, most))
        batch = waiting[:size]
        waiting = waiting[size:]
        asked = [sources[i] for i in batch]
        limits = [min(2 * len(ids) + 50, longest) for ids in asked]
        outputs = beam_search(model, asked, language, limits, beams, no_repeat=no_repeat)
        for i, ids in zip(batch, outputs):
            text = tokenizer.decode(ids)
            drafts[i] = text, direction.fault(texts[i], sources[i], text, ids)
        direction.on_tokens(sum(map(len, outputs)))
    return [drafts[i] for i in range(len(texts))]


def translate_twice(texts: list[str], direction: Direction) -> list[Draft]:
    """The drafts of some texts. What fails is tried again, greedily and without repeats, unless its words are
    unknown to the translator, which they would stay."""
    drafts = translate_sentences(texts, direction, direction.beams)
    again = [i for i, (_, fault) in enumerate(drafts) if fault not in (None, "unknown words")]
    asked = [texts[i] for i in again]
    second = translate_sentences(asked, direction, 1, NO_REPEAT)
    for i, (text, fault) in zip(again, second):
        if fault is None:
            drafts[i] = text, None
    return drafts


def translate_segments(segments: list[str], direction: Direction) -> dict[str, Draft]:
    """The draft of each segment, its protected spans in their places."""
    hidden = [hide(segment) for segment in segments]
    texts = [text for text, _ in hidden]
    drafts = translate_twice(texts, direction)
    done = {}
    for segment, (asked, spans), (text, fault) in zip(segments, hidden, drafts):
        done[segment] = unhide(without_half_marks(asked, text), spans), fault
    lost = [segment for segment, (text, _) in done.items() if text is None]
    if lost:
        done |= translate_around_spans(lost, direction)
    return done


def without_half_marks(source: str, text: str) -> str:
    """A translation in which ** for bold, or ~~, came back by halves, without them."""
    for mark in ("**", "~~"):
        if source.count(mark) % 2 == 0 and text.count(mark) % 2:
            text = text.replace(mark, "")
    return text


def translate_around_spans(segments: list[str], direction: Direction) -> dict[str, Draft]:
    """Where the model loses a span, the texts around the spans are translated on their own."""
    texts = set()
    for segment in segments:
        for text in split_spans(segment)[::2]:
            _, core, _ = split_edges(text)
            if WORD.search(core):
                texts.add(core)
    known = translate_segments(sorted(texts), direction)
    return {segment: around_spans(segment, known) for segment in segments}


def around_spans(segment: str, known: dict[str, Draft]) -> Draft:
    parts = split_spans(segment)
    faults = []
    for i in range(0, len(parts), 2):  # the spans lie between
        before, core, after = split_edges(parts[i])
        text, fault = known.get(core, (core, None))
        parts[i] = before + text + after
        faults.append(fault)
    return "".join(parts), next(filter(None, faults), None)


# ---- documents ----

class Translation(str):
    """A translated text. faults: how many of its segments failed which check."""
    faults: Counter


def translate_documents(texts: list[str], direction: Direction) -> list[Translation]:
    """The translation of each document. A segment is translated once."""
    parsed = [parse(text, direction.fits) for text in texts]
    segments = {string for parts in parsed for kind, string in parts if kind == TEXT}
    known = translate_segments(sorted(segments), direction)
    return [put_together(parts, known, direction) for parts in parsed]


def put_together(parts: list[tuple[str, str]], known: dict[str, Draft], direction: Direction) -> Translation:
    """A document of its parts (formats.markup.parse) and their translations."""
    dense = script_of(direction.target) in DENSE
    apart = script_of(direction.source) in UNSPACED and not dense
    out = []
    faults = Counter()
    before = KEEP
    for (kind, string), (behind, _) in zip(parts, [*parts[1:], (KEEP, "")]):
        if kind == TEXT:
            text, fault = known[string]
            if before == TEXT and apart:
                out.append(" ")  # none follows 。 but one belongs behind its translation
            out.append(text)
            if fault:
                faults[fault] += 1
        elif not dense or KEEP in (before, kind, behind):
            out.append(string)
        before = kind
    translation = Translation("".join(out))
    translation.faults = faults
    return translation


def translate(texts: list[str], source: str, target: str, translator: Translator, beams: int = 5,
              batch_tokens: int = 2048) -> list[Translation]:
    """Each document in `target`, its lines, code, links and markup as they were: a str whose `faults` count
    the segments that failed their checks. InputError unless the translator knows both languages."""
    source, target = normal(source), normal(target)
    translator.check(source, [target])
    return translate_documents(texts, Direction(translator, source, target, beams, batch_tokens))


# ---- rows ----

def new_record(row: dict, targets: list[str], direction: Direction) -> dict:
    """A row as the file has it, before its translation. hash: another text, translator or setting gives
    another one."""
    languages = sorted(targets)
    # What people have translated stays.
    own = {code: row.get(code) for code in (direction.source, *languages)}
    dtype = str(direction.translator.model.head.dtype)
    made_by = direction.translator.fingerprint, dtype, direction.beams
    made = {"hash": fingerprint(own, direction.source, languages, made_by),
            "into": targets,
            "failed": {},
            "drafts": {}}
    label = "row_id" if "id" in (*row, *targets) else "id"  # Indonesian is called "id"
    rest = {key: value for key, value in row.items() if key not in ("row_id", "clo")}
    return {label: row["row_id"], **rest, "clo": made}


def translate_records_(records: list[dict], targets: list[str], direction: Direction) -> None:
    """Translate some records. A translation that a row already has stays."""
    for target in targets:
        todo = [record for record in records if target not in record]
        texts = []
        for record in todo:
            side = record[direction.source]
            texts += [side["prompt"], side["response"]]
        done = translate_documents(texts, replace(direction, target=target))
        for record, prompt, response in zip(todo, done[::2], done[1::2]):
            record[target] = {"prompt": prompt, "response": response}
            faults = prompt.faults + response.faults
            if faults:
                record["clo"]["failed"][target] = dict(faults)


def translated_chunks(todo: list[dict], targets: list[str], direction: Direction) -> Iterator[list[dict]]:
    """The records with their translations, a chunk a rank at a time, the same on every rank."""
    for first in range(0, len(todo), CHUNK * ranks.size()):
        own = first + CHUNK * ranks.rank()
        part = todo[own:own + CHUNK]        # empty where the last round has fewer chunks than ranks
        translate_records_(part, targets, direction)
        yield [*itertools.chain(*ranks.gather([part]))]


def speedometer(bar: tqdm) -> Callable[[int], None]:
    """A function that shows on a bar how fast tokens are generated, called with how many are new."""
    tokens = 0
    start = time.perf_counter()

    def add(generated: int) -> None:
        nonlocal tokens
        tokens += generated * ranks.size()  # the other ranks have as much to do
        seconds = time.perf_counter() - start
        bar.set_postfix_str(f"{tokens / seconds:,.0f} tokens/s")
    return add


def complete_file(path: Path, records: list[dict], targets: list[str], direction: Direction,
                  keep_failed: bool) -> list[dict]:
    """The records as the file has them; those that it has not are made now, and appended."""
    keys = [(identifier(record, path), record["clo"]["hash"]) for record in records]

    def begin() -> dict[Key, dict]:
        lock.enter_context(locked(path))
        return read_done(path, keys, targets, keep_failed)

    with contextlib.ExitStack() as lock:
        done = ranks.on_first(begin)
        todo = {key: record for key, record in zip(keys, records) if key not in done}
        finished = len(records) - len(todo)
        title = f"{direction.source} -> {','.join(targets)}"
        made = []
        with progress(total=len(records), initial=finished, desc=title, unit="row") as bar:
            direction = replace(direction, on_tokens=speedometer(bar))
            for found in translated_chunks([*todo.values()], targets, direction):
                for record in found:
                    file_failed_(record, keep_failed)
                if ranks.rank() == 0:
                    append_jsonl(path, found)
                made += found
                bar.update(len(found))
    done |= zip(todo, made)
    return [done[key] for key in keys]


def translate_rows(rows: list[dict], translator: Translator, source: str, target: str | list[str], path=None,
                   beams: int = 5, batch_tokens: int = 2048, keep_failed: bool = False) -> list[dict]:
    """The rows with their translation into `target` (a code or several), through the JSONL file `path`.

    Every CHUNK rows their lines are appended; a run killed at any moment goes on from there. Ranks take a
    chunk each and the first one writes: the file is that of one process. A row of which a segment failed is
    left out of the result, and its translation is filed under "clo", unless keep_failed.

    Without a path nothing is written and no row is left out: to look at before a run.
    """
    source = normal(source)
    given = [target] if isinstance(target, str) else target
    targets = [*dict.fromkeys(map(normal, given))]
    translator.check(source, targets)
    rows = require_languages(rows, source)
    direction = Direction(translator, source, targets[0], beams, batch_tokens)
    records = [new_record(row, targets, direction) for row in rows]
    if path is None:
        translate_records_(records, targets, direction)
    else:
        records = complete_file(Path(path), records, targets, direction, keep_failed)
        print(describe_faults(records, targets, keep_failed))
    translated = []
    for row, record in zip(rows, records):
        if set(targets) <= record.keys():
            translated.append(row | {code: record[code] for code in targets})
    return translated


def translator_for(rows: list[dict], targets: list[str], path, device) -> Translator:
    """The translator at `path`; InputError when it does not know a target."""
    translator = load(path, device)
    for target in targets:
        if target not in translator.languages:
            held = sorted(set().union(*map(languages_of, rows)))
            known = ", ".join(translator.languages)
            near = suggestion(target, [*held, *translator.languages])
            raise InputError(f"--lang {target}{near}: the data hold {', '.join(held)} and the translator "
                             f"{path} knows {known}")
    return translator


# ---- command line ----

def parse_args(argv=None):
    parser = flags.Parser(description=__doc__)
    add = flags.group(parser, "what")
    add("--lang", str, flags.REQUIRED, "target language, or several: sw,yo")
    add("--source", normal, "en", "language of the data")
    add("--data", str, "demo/english.jsonl", "rows in any format that data.py reads")
    add("--turns", ["first", "all"], "first", "exchanges of a conversation to take")
    add("--samples", flags.count, 0, "how many rows, from the first; 0: all")
    add("--out", str, None, "JSONL file; a run goes on with what is there (default: translated-LANG.jsonl)")
    add("--text", str, None, "a text to translate and print instead")
    add = flags.group(parser, "translator")
    add("--translator", str, "demo/m2m100", "directory or hub id of an M2M100 or NLLB")
    add("--device", str, "auto", "auto, cpu, cuda, cuda:1, ...")
    add("--dtype", ["auto", "fp32", "bf16"], "auto", "of weights; auto: bf16 on CUDA, else fp32")
    add = flags.group(parser, "decoding and checks")
    add("--beams", flags.positive_int, 5, "hypotheses of a sentence")
    add("--batch-tokens", flags.positive_int, 2048, "source tokens of a batch: fewer need less memory")
    add("--keep-failed", bool, False, "keep rows of which a segment failed its checks")
    return parser.parse_args(argv)


def print_translations(text: str, source: str, targets: list[str], translator: Translator, beams: int,
                       batch_tokens: int) -> None:
    """The text in each language; what the checks say goes to stderr."""
    translator.check(source, targets)
    for target in targets:
        found, = translate([text], source, target, translator, beams, batch_tokens)
        print(found)
        for fault, number in found.faults.items():
            print(f"{target}: {number} of the text's segments failed a check: {fault}", file=sys.stderr)


def check_out(out: Path, data: Path) -> None:
    """InputError if it is no file, or writing it or what lies beside it would overwrite the data."""
    if out.exists() and not out.is_file():
        raise InputError(f"--out {out} is no file: give the name of one")
    check_overwrite("--out", out, data)


def main():
    args = parse_args()
    device = ranks.start(ranks.pick_device(args.device))
    targets = [*dict.fromkeys(language_list(args.lang))]
    dtype = DTYPES.get(args.dtype)
    if args.text is not None:
        check_unicode(args.text, "--text")
        translator = load(args.translator, device, dtype)
        print_translations(args.text, args.source, targets, translator, args.beams, args.batch_tokens)
        return
    out = Path(args.out or f"translated-{','.join(targets)}.jsonl")
    check_out(out, hub.data_file(args.data))
    rows = read_counted(args.data, args.source, args.turns, targets)
    rows = rows[:args.samples or None]
    translator = load(args.translator, device, dtype)
    translate_rows(rows, translator, args.source, targets, out,
                   args.beams, args.batch_tokens, args.keep_failed)
    print(f"{out} is written; next: python clo.py --lang {','.join(targets)} --data {out}")
    ranks.stop()


if __name__ == "__main__":
    ranks.run(main)
