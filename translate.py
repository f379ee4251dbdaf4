"""Translate an instruction data set with M2M100 or NLLB: documents in, documents out, every sentence checked.

    python translate.py --lang sw --data demo/english.jsonl --out swahili.jsonl
    python translate.py --lang de,ko --text "The capital of France is Paris."
    torchrun --nproc-per-node 2 translate.py --lang sw ...       # rows are dealt to processes; the same file

A document is split into segments (lines, then sentences); code, links, formulas and markup are set aside and
come back untouched. Segments are translated in batches by beam search and checked; what fails is tried again,
then marked. The row of a marked segment is left out of training.
"""

import argparse
import hashlib
import json
import os
import re
import time
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from engine import ranks
from engine.files import InputError
from formats import hub
from formats.languages import KANA, UNSPACED, script_of
from formats.records import identifier, languages_of, read_rows, require_languages
from m2m100.beam import beam_search
from m2m100.network import M2M100, load_model
from m2m100.tokenizer import Tokenizer, load_tokenizer

MAX_SOURCE = 150      # tokens of a segment: the models were trained on sentences
MAX_LOGITS = 2**26    # elements of the largest logits matrix: bounds the batch when the vocabulary is large
NO_REPEAT = 4         # the second try of a segment bans every repeated n-gram of this length
UNKNOWN_SHARE = 0.1   # a source with more unknown tokens than this cannot be translated
LENGTH_RATIO = {"CJK": 0.35, "KANA": 0.45, "HANGUL": 0.55, "yo": 1.5, "en": 1.0}  # characters, English 1
LENGTH_BOUNDS = 0.4, 2.5  # of a translation over what is expected; people's go from 0.55 to 2.05 (NTREX)
LENGTH_SLACK = 15         # characters added to both, so that short segments are not judged by their length


# ---- the translator ----

def fingerprint(path: Path) -> str:
    """Hash of a checkpoint: names, sizes and ends of its files (to read gigabytes would take a minute)."""
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if file.suffix in (".json", ".model", ".safetensors", ".bin"):
            with open(file, "rb") as stream:
                size = stream.seek(0, os.SEEK_END)
                stream.seek(max(0, size - 2**20))
                digest.update(f"{file.name} {size} ".encode() + stream.read())
    return digest.hexdigest()[:16]


@dataclass
class Translator:
    """A model and its tokenizer. languages: those it can write. fingerprint: hash of its files."""
    model: M2M100
    tokenizer: Tokenizer
    languages: list[str]
    fingerprint: str


def load(path, device="cpu", dtype: torch.dtype = torch.float32) -> Translator:
    """The translator of an M2M100 or NLLB directory or hub id. InputError says what is wrong with it."""
    path = hub.local(path, hub.TRANSLATOR_SETTINGS, hub.TRANSLATOR_WEIGHTS)
    if not path.is_dir():
        raise InputError(f"{path} is not a directory: give that of an M2M100 or NLLB checkpoint")
    model, tokenizer = load_model(path, device, dtype), load_tokenizer(path)
    known, trained = tokenizer.languages, model.config.clo_languages
    if max(known.values()) >= model.config.vocab_size:
        raise InputError(f"{path}: the tokenizer has more ids than the vocab_size of config.json, "
                              f"{model.config.vocab_size}: files of different models?")
    for code in trained or []:
        if code not in known:
            raise InputError(f"{path}/config.json: clo_languages has {code!r}, the tokenizer has not")
    return Translator(model, tokenizer, sorted(known if trained is None else trained), fingerprint(path))


# ---- documents ----

# Set aside whole: fenced code, display formulas, HTML code.
BLOCK = re.compile(r"(```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)|\$\$.*?\$\$|\\\[.*?\\\]"
                   r"|\\begin\{[\w*]+\}.*?\\end\{[\w*]+\}|<(?:pre|code)\b.*?</(?:pre|code)>)", re.DOTALL)
# Set aside at the start of a line: indentation, quote marks, headings, list markers, check boxes, numbers.
MARKER = re.compile(r"\s*(?:(?:[-*+•–>]|#{1,6}|\(?\d{1,3}[.):]|\(?[A-Za-z][.)]|\[[ xX]\])(?:\s+|$))*")
# Set aside inside a sentence: inline code, links, mail addresses, formulas, tags, placeholders, emoji.
INLINE = re.compile(
    r"(`[^`\n]+`|(?:https?://|www\.)[^\s<>]*[^\s<>.,;:!?)\]'\"*]|\]\([^)\s]+\)|[\w.+-]+@[\w-]+(?:\.\w+)+"
    r"|\\\(.*?\\\)|(?<![\w$])\$[^\s$](?:[^$\n]*[^\s$])?\$(?![\w$])|<[^<>\s][^<>\n]*>"
    r"|\{\{?[\w .-]+\}?\}|\[\d+\]|%[sd]\b|[\U0001F000-\U0001FAFF\u2190-\u21FF\u2600-\u27BF\uFE0F\u200D]+)")
WORD = re.compile(r"[^\W\d_]")
# A piece beside a span keeps the spaces and the punctuation at its ends.
EDGES = re.compile(r"(P*)(.*?)(P*)".replace("P", r"[\s!-/:-@\[-`{-~«»‘-‟…、-〟！-／：-＠]"), re.DOTALL)
SENTENCE_END = re.compile(r"(?:[.!?…؟।]+[\"'”’)\]*]*(?=\s)|[。！？]+[”’」』）]*)\s*(?=\S)")
NOT_AN_END = set("Mr Mrs Ms Dr Prof St vs etc e.g i.e cf al No Fig Jr Sr Inc Ltd Co approx Vol pp".split())
CLAUSE_END, SPACE, ANYWHERE = re.compile(r"[;:,，、；：]\s*"), re.compile(r"\s+"), re.compile("")
TEXT, KEEP, GAP = "text", "keep", "gap"  # to translate; as it is; white space between sentences


def parse(text: str, fits: Callable[[str], bool]) -> list[tuple[str, str]]:
    """[(kind, string)], whose strings joined are `text`. fits(string): is a segment short enough?"""
    parts = []
    for i, block in enumerate(BLOCK.split(text)):
        for j, line in enumerate([block] if i % 2 else re.split(r"(\r?\n)", block)):
            if i % 2 or j % 2:
                parts.append((KEEP, line))
                continue
            table = line.lstrip().startswith("|") or line.count("|") > 1
            for cell in re.split(r"(\|)", line) if table else [line]:
                parts += parse_line(cell, fits)
    return [(kind, string) for kind, string in parts if string]


def parse_line(line: str, fits: Callable[[str], bool]) -> list[tuple[str, str]]:
    start = MARKER.match(line).end()
    end = max(start, len(line.rstrip()))
    parts = [(KEEP, line[:start])]
    for sentence in split_sentences(line[start:end]):
        for piece in cut(sentence, fits):
            body = piece.strip()
            before, _, after = piece.partition(body) if body else (piece, "", "")
            words = WORD.search(INLINE.sub("", body))
            parts += [(GAP, before), (TEXT if words else KEEP, body), (GAP, after)]
    return parts + [(KEEP, line[end:])]


def split_sentences(line: str) -> list[str]:
    """Sentences, each with the white space after it. None ends inside a protected span, after an abbreviation
    or an initial, or before a small letter."""
    spans = [match.span() for match in INLINE.finditer(line)]
    sentences, start = [], 0
    for match in SENTENCE_END.finditer(line):
        word = (line[start:match.start()].split() or [""])[-1].lstrip("\"'“‘([")
        initial = len(word) == 1 and word.isupper() and word != "I"
        short = match[0].strip() == "." and (initial or word in NOT_AN_END)
        small = line[match.end():].lstrip("\"'“‘([*¿¡")[:1].islower()
        if not (short or small or any(a < match.end() < b for a, b in spans)):
            sentences.append(line[start:match.end()])
            start = match.end()
    return sentences + [line[start:]]


def cut(sentence: str, fits: Callable[[str], bool]) -> list[str]:
    """The sentence, halved at the clause or word end nearest its middle until every part fits."""
    if fits(sentence):
        return [sentence]
    spans, middle = [match.span() for match in INLINE.finditer(sentence)], len(sentence) / 2
    for pattern, reach in ((CLAUSE_END, middle / 2), (SPACE, middle), (ANYWHERE, middle)):
        places = [match.end() for match in pattern.finditer(sentence) if abs(match.end() - middle) < reach
                  and not any(a < match.end() < b for a, b in spans)]
        if places:
            place = min(places, key=lambda p: abs(p - middle))
            return cut(sentence[:place], fits) + cut(sentence[place:], fits)
    return [sentence]


def hide(segment: str) -> tuple[str, list[str]]:
    """The segment with [0], [1], ... for its protected spans, and the spans. Most models copy such marks."""
    spans = INLINE.findall(segment)
    numbers = iter(range(len(spans)))
    return INLINE.sub(lambda match: f"[{next(numbers)}]", segment), spans


def show(text: str, spans: list[str]) -> str | None:
    """Put the spans back; None unless every mark is there exactly once."""
    parts = re.split(r"[\[［【]\s*(\d+)\s*[\]］】]", text) if spans else [text]
    if sorted(map(int, parts[1::2])) != list(range(len(spans))):
        return None
    return "".join(spans[int(part)] if i % 2 else part for i, part in enumerate(parts))


# ---- checks ----


def loops(ids: list[int]) -> bool:
    """Whether a stretch repeats itself: tokens equal to those n before, 2n of them in a row, at least 8."""
    for n in range(1, len(ids) // 3 + 1):
        run = 0
        for a, b in zip(ids, ids[n:]):
            run = run + 1 if a == b else 0
            if run >= max(8, 2 * n):
                return True
    return False


def wrong_script(text: str, language: str) -> bool:
    """Whether fewer than three letters in ten are of the language's script. Names may stay Latin."""
    script = script_of(language)
    names = [unicodedata.name(char, "") for char in text if char.isalpha()]
    right = sum(name.startswith(KANA if script == "KANA" else script) for name in names)
    return len(names) > 8 and right < 0.3 * len(names)


def copied(source: str, text: str) -> bool:
    """Whether four in five of the source's words, names left out, came back as they were."""
    words = [word for word in re.findall(r"[^\W\d_]{3,}", source) if word.islower()]
    there = set(re.findall(r"[^\W\d_]{3,}", text))
    return len(words) > 3 and sum(word in there for word in words) >= 0.8 * len(words)


def odd_length(source: str, text: str, languages: tuple[str, str]) -> bool:
    """Whether a translation is far shorter or longer than its language would have it."""
    own, other = (LENGTH_RATIO.get(code[:2]) or LENGTH_RATIO.get(script_of(code), 1.15) for code in languages)
    ratio = (len(text) + LENGTH_SLACK) / (len(source) * other / own + LENGTH_SLACK)
    return not LENGTH_BOUNDS[0] <= ratio <= LENGTH_BOUNDS[1]


# ---- translation ----

@dataclass
class Job:
    """How to translate: every function below needs most of it. progress(n) hears of n generated tokens."""
    translator: Translator
    source: str
    target: str
    beams: int = 5
    batch_tokens: int = 2048
    progress: Callable[[int], None] | None = None

    def language(self, code: str) -> int:
        languages = self.translator.tokenizer.languages
        if code not in languages:
            known = ", ".join(self.translator.languages)
            raise InputError(f"the translator does not know the language {code!r}; it knows {known}")
        return languages[code]

    def source_ids(self, text: str) -> list[int]:
        end = self.translator.model.config.eos_token_id
        return [self.language(self.source), *self.translator.tokenizer.encode(text), end]

    def fits(self, segment: str) -> bool:
        room = min(MAX_SOURCE, self.translator.model.config.max_position_embeddings)
        return len(self.source_ids(hide(segment)[0])) <= room

    def fault(self, source: str, source_ids: list[int], text: str, ids: list[int]) -> str | None:
        """Why a translation cannot be trusted, or None."""
        languages = self.source, self.target
        if source_ids.count(self.translator.tokenizer.unknown) > UNKNOWN_SHARE * len(source_ids):
            return "unknown words"
        if ids[-1] != self.translator.model.config.eos_token_id:
            return "cut at the limit"
        faults = {"empty": not text, "repetition": loops(ids) and not loops(source_ids),
                  "wrong script": wrong_script(text, self.target), "copied": copied(source, text),
                  "length": odd_length(source, text, languages)}
        return next((name for name, found in faults.items() if found), None)


def translate_sentences(texts: list[str], job: Job, beams: int, no_repeat: int = 0) -> list[tuple]:
    """(translation, its fault or None) of each text, in batches of like length."""
    model, tokenizer = job.translator.model, job.translator.tokenizer
    sources, target = [job.source_ids(text) for text in texts], job.language(job.target)
    order, results = sorted(range(len(texts)), key=lambda i: -len(sources[i])), [("", None)] * len(texts)
    while order:
        size = min(job.batch_tokens // len(sources[order[0]]), MAX_LOGITS // (beams * len(model.head)))
        batch, order = order[:max(1, size)], order[max(1, size):]
        limits = [min(2 * len(sources[i]) + 50, model.config.max_position_embeddings) for i in batch]
        outputs = beam_search(model, [sources[i] for i in batch], target, limits, beams, no_repeat=no_repeat)
        for i, ids in zip(batch, outputs):
            text = tokenizer.decode(ids)
            results[i] = text, job.fault(texts[i], sources[i], text, ids)
        if job.progress:
            job.progress(sum(map(len, outputs)))
    return results


def translate_segments(segments: list[str], job: Job) -> dict[str, tuple[str, str | None]]:
    """{segment: (translation, its fault or None)}. What fails is tried again, greedily and without repeats;
    where the model loses a protected span, the texts around the spans are translated on their own."""
    hidden = [hide(segment) for segment in segments]
    drafts = translate_sentences([text for text, _ in hidden], job, job.beams)
    again = [i for i, (_, fault) in enumerate(drafts) if fault not in (None, "unknown words")]
    for i, draft in zip(again, translate_sentences([hidden[i][0] for i in again], job, 1, NO_REPEAT)):
        drafts[i] = drafts[i] if draft[1] else draft
    whole = {segment: (show(text, spans), fault)
             for segment, (_, spans), (text, fault) in zip(segments, hidden, drafts)}
    lost = {segment: [("", piece, "") if i % 2 else EDGES.fullmatch(piece).groups()
                      for i, piece in enumerate(INLINE.split(segment))]
            for segment, (text, _) in whole.items() if text is None}
    around = {core for pieces in lost.values() for _, core, _ in pieces[::2] if WORD.search(core)}
    known = translate_segments(sorted(around), job) if around else {}
    for segment, pieces in lost.items():
        drafts = [known.get(core, (core, None)) for _, core, _ in pieces]
        text = "".join(before + text + after for (before, _, after), (text, _) in zip(pieces, drafts))
        whole[segment] = text, next((fault for _, fault in drafts if fault), None)
    return whole


def translate_documents(texts: list[str], job: Job) -> list[tuple[str, Counter]]:
    """(translation, Counter of its segments' faults) of each document. A segment is translated once."""
    parsed = [parse(text, job.fits) for text in texts]
    known = translate_segments(sorted({s for parts in parsed for kind, s in parts if kind == TEXT}), job)
    unspaced = [script_of(code) in UNSPACED for code in (job.source, job.target)]
    documents = []
    for parts in parsed:
        out, faults, before = [], Counter(), KEEP
        for kind, string in parts:
            if kind == TEXT and before == TEXT and unspaced == [True, False]:
                out.append(" ")  # none follows 。 but one belongs behind its translation
            text, fault = known[string] if kind == TEXT else (string, None)
            out.append("" if kind == GAP and unspaced[1] else text)
            faults.update([fault] if fault else [])
            before = kind
        documents.append(("".join(out), faults))
    return documents


def translate(texts: list[str], source: str, target: str, translator: Translator, beams: int = 5,
              batch_tokens: int = 2048, progress: Callable[[int], None] | None = None) -> list[str]:
    """Each document in `target`, its lines, code, links and markup as they were."""
    job = Job(translator, source, target, beams, batch_tokens, progress)
    return [text for text, _ in translate_documents(texts, job)]


# ---- rows ----

def row_hash(row: dict, targets: list[str], job: Job) -> str:
    what = [row[job.source]["prompt"], row[job.source]["response"], job.source, targets, job.beams,
            job.translator.fingerprint, str(job.translator.model.head.dtype)]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def to_line(record: dict) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def file_failed_(record: dict, keep_failed: bool) -> bool:
    """Put failed translations beside the others, or under "clo", out of the way. True if one moved."""
    drafts = record["clo"]["drafts"]
    moving = [code for code in record["clo"]["failed"] if (code in drafts) == keep_failed]
    for code in moving:
        (record if keep_failed else drafts)[code] = (drafts if keep_failed else record).pop(code)
    return bool(moving)


def check_draft(record: dict, targets: list[str]) -> None:
    """KeyError, TypeError or AttributeError unless the record is as translate_chunk and file_failed_ leave
    it: a prompt and a response in every target, and how many segments failed why."""
    for code in targets:
        side = (record if code in record else record["clo"]["drafts"])[code]
        "".join([side["prompt"], side["response"]])
    for faults in record["clo"]["failed"].values():
        sum(faults.values())


def read_done(path: Path, keys: set[tuple[str, str]], targets: list[str],
              keep_failed: bool) -> dict[tuple[str, str], dict]:
    """{(row id, hash): record} of those rows in `path` that need no more work. InputError for a foreign file.

    The file is written anew if it holds half a line (after a kill) or rows whose text, model or settings have
    changed since, which are dropped.
    """
    raw = path.read_bytes() if path.exists() else b""
    whole, names, done = raw[:raw.rfind(b"\n") + 1], {name for name, _ in keys}, {}
    changed = len(raw) > len(whole)
    for number, line in enumerate(whole.decode("utf-8", "replace").split("\n")[:-1], 1):
        try:
            record = json.loads(line)
            key = identifier(record, str(path)), record["clo"]["hash"]
            changed |= file_failed_(record, keep_failed)
            if key in keys:
                check_draft(record, targets)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise InputError(f"{path}:{number}: not written by translate.py, or damaged: choose another file, "
                            f"or delete the line to have its row translated again") from None
        if key not in keys and key[0] in names or key in done:
            changed = True
        else:
            done[key] = record
    if changed:
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(map(to_line, done.values())), encoding="utf-8")
        os.replace(temporary, path)
    return done


def translate_chunk(rows: list[dict], keys: list[tuple], targets: list[str], job: Job) -> list[dict]:
    """The records of some rows. A translation that a row already has stays."""
    records = []
    for row, (name, own) in zip(rows, keys):
        rest = {key: value for key, value in row.items() if key not in ("row_id", "clo")}
        label = "row_id" if "id" in (*row, *targets) else "id"  # Indonesian is called "id"
        records.append({label: name, **rest, "clo": {"hash": own, "failed": {}, "drafts": {}}})
    for target in targets:
        todo = [record for row, record in zip(rows, records) if target not in row]
        texts = [record[job.source][part] for record in todo for part in ("prompt", "response")]
        pairs = iter(translate_documents(texts, replace(job, target=target)))
        for record, (prompt, faults), (response, more) in zip(todo, pairs, pairs):
            record[target] = {"prompt": prompt, "response": response}
            if faults + more:
                record["clo"]["failed"][target] = dict(faults + more)
    return records


def translate_rows(rows: list[dict], translator: Translator, source: str, target: str | list[str], path,
                   beams: int = 5, batch_tokens: int = 2048, keep_failed: bool = False,
                   chunk: int = 32) -> list[dict]:
    """The rows with their translation into `target` (a code or several), through the JSONL file `path`.

    Every `chunk` rows their lines are appended; a run killed at any moment goes on from there. Ranks take a
    chunk each and the first one writes: the file is that of one process. A row of which a segment failed is
    left out of the result, and its translation is filed under "clo", unless keep_failed.
    """
    path, targets = Path(path), [target] if isinstance(target, str) else list(target)
    rows, job = require_languages(rows, source), Job(translator, source, targets[0], beams, batch_tokens)
    job.language(next((code for code in targets if code not in translator.languages), source))
    keys = [(row["row_id"], row_hash(row, targets, job)) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    done = ranks.on_first(lambda: read_done(path, set(keys), targets, keep_failed))
    todo = [i for i, key in enumerate(keys) if key not in done]
    chunks = [todo[first:first + chunk] for first in range(0, len(todo), chunk)]
    title = f"{source} -> {','.join(targets)}"
    bar = tqdm(total=len(rows), initial=len(rows) - len(todo), desc=title, unit="row",
               disable=bool(ranks.rank()))
    start, tokens = time.perf_counter(), Counter()

    def progress(n: int) -> None:
        tokens["generated"] += n * ranks.size()  # the other ranks have as much to do
        bar.set_postfix_str(f"{tokens['generated'] / (time.perf_counter() - start):,.0f} tokens/s")

    job.progress = progress
    with bar:
        for first in range(0, len(chunks), ranks.size()):
            some = chunks[first:first + ranks.size()]
            own = [translate_chunk([rows[i] for i in part], [keys[i] for i in part], targets, job)
                   for part in some[ranks.rank()::ranks.size()]]
            for part, records in zip(some, ranks.gather(own)):
                for i, record in zip(part, records):
                    file_failed_(record, keep_failed)
                    done[keys[i]] = record
                if ranks.rank() == 0:
                    append(path, records)
                bar.update(len(part))
    print(describe_faults([done[key] for key in keys], targets, keep_failed))
    return [row | {code: done[key][code] for code in targets} for row, key in zip(rows, keys)
            if all(code in done[key] for code in targets)]


def translator_for(rows: list[dict], targets: list[str], path, device) -> Translator:
    """The translator at `path`; InputError when it does not know a target."""
    print(f"loading the translator {path}")
    translator = load(path, device)
    for target in targets:
        if target not in translator.languages:
            held = sorted({language for row in rows for language in languages_of(row)})
            raise InputError(f"--lang {target}: the data hold {', '.join(held)} and the translator {path} knows "
                             f"{', '.join(translator.languages)}")
    return translator


def translate_ahead(rows: list[dict], translator: Translator, source: str, targets: list[str],
                    beams: int) -> list[dict]:
    """The rows with their translations, checks left out and nothing written: to look at before a run."""
    texts = [row[source][part] for row in rows for part in ("prompt", "response")]
    for target in targets:
        done = translate(texts, source, target, translator, beams)
        rows = [row | {target: {"prompt": prompt, "response": response}}
                for row, prompt, response in zip(rows, done[::2], done[1::2])]
    return rows


def append(path: Path, records: list[dict]) -> None:
    """On the disk before anything else is done: a kill loses no more than the chunk at work."""
    with open(path, "ab") as file:
        file.write("".join(map(to_line, records)).encode("utf-8"))
        file.flush()
        os.fsync(file.fileno())


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


# ---- command line ----

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Translate a data set into the parallel format of clo.py.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("what").add_argument
    add("--lang", required=True, help="target language, or several: sw,yo")
    add("--source", default="en", help="language of the data")
    add("--data", default="demo/english.jsonl", help="rows in any format that data.py reads")
    add("--turns", choices=("first", "all"), default="first", help="exchanges of a conversation to take")
    add("--samples", type=int, default=0, help="how many rows, from the first; 0: all")
    add("--out", default="translated.jsonl", help="JSONL file; a run goes on with what is there")
    add("--text", help="a text to translate and print instead")
    add = parser.add_argument_group("translator").add_argument
    add("--translator", default="demo/m2m100", help="directory or hub id of an M2M100 or NLLB")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and arithmetic")
    add = parser.add_argument_group("decoding and checks").add_argument
    add("--beams", type=int, default=5, help="hypotheses of a sentence")
    add("--batch-tokens", type=int, default=2048, help="source tokens of a batch: fewer need less memory")
    add("--keep-failed", action="store_true", help="keep rows of which a segment failed its checks")
    return parser.parse_args(argv)


def main():
    args = parse_args()
    if args.beams < 1 or args.batch_tokens < 1 or args.samples < 0:
        raise InputError("--beams and --batch-tokens must be at least 1, --samples at least 0")
    device = ranks.start(ranks.pick_device(args.device))
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[args.dtype]
    targets = args.lang.split(",")
    if args.text:
        translator = load(args.translator, device, dtype)
        for target in targets:
            print(*translate([args.text], args.source, target, translator, args.beams, args.batch_tokens))
        return
    rows = read_rows(args.data, args.source, args.turns, targets=targets)[:args.samples or None]
    translator = load(args.translator, device, dtype)
    print(f"{args.data}: {len(rows)} rows; {args.translator} on {device} in {args.dtype}")
    translate_rows(rows, translator, args.source, targets, args.out, args.beams, args.batch_tokens,
                   args.keep_failed)
    print(f"{args.out} is written; next: python clo.py --lang {targets[0]} --data {args.out}")
    ranks.stop()


if __name__ == "__main__":
    ranks.run(main)
