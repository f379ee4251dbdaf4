"""Data: rows -> forks -> packed rows of tokens; and which rows train, validate and answer.

A *row* is one sample: {"row_id": str, "en": {"prompt": str, "response": str}, "sw": {...}, ...}.
A *fork* is one prompt with k continuations; continuation 0 is the right one, in the prompt's language.
A *batch* is rows of T tokens filled with forks, and everything a step asks about them: which position has to
name which token, which continuations form pairs, and after the reference pass their log-probs.

    python data.py FILE --model DIR --lang sw --show 2     # counts, packing, samples with their loss mask

Readers of public formats are in formats/records.py, chat templates in formats/chat.py.
"""

import contextlib
import sys
from bisect import bisect_left, insort
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import torch

from engine import flags
from engine.files import InputError, run
from engine.progress import progress
from formats.chat import load_tokenizer
from formats.languages import language_list, normal
from formats.records import (FORMATS, describe_counts, languages_of, read_rows, require_languages,
                             write_preferences)
from kernels.layers import Span

# ---- which rows train, validate and answer ----

@dataclass
class Split:
    """Rows by what a run does with them. Held-out rows steer choices (validation), answered rows are the report;
    where the evaluation data has no validation split, the first `apart` of the training rows are held out."""
    rows: list
    apart: int
    heldout: list
    answered: list

    def parts(self, path):
        """(rows to train on, rows to hold out, rows to answer); InputError when one has none."""
        rows, heldout = self.rows[self.apart:], self.heldout or self.rows[:self.apart]
        if not rows or not heldout:
            raise InputError(f"{path}: {len(rows)} rows are left to train on and {len(heldout)} to hold out, "
                             f"one of each is needed: give more rows, or --keep-failed if the translation "
                             f"checks dropped them")
        return rows, heldout, self.answered or heldout


@contextlib.contextmanager
def naming(path):
    """Errors about rows get the name of the file they come from."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error) if str(path) in str(error) else f"{path}: {error}") from None


def read_counted(path, source, turns, targets, unique=False):
    """read_rows, saying what was read and left out."""
    counts = Counter()
    rows = read_rows(path, source, turns, counts, targets, unique)
    print(f"{path}: {describe_counts(counts)}")
    return rows


def training_rows(path, source, targets, turns="first"):
    """The rows of a file with the source and every target that any row holds; a target that none holds is left
    to the translator. InputError when no row is left."""
    rows = read_counted(path, source, turns, targets)
    held = [target for target in targets if any(target in languages_of(row) for row in rows)]
    with naming(path):
        usable = require_languages(rows, source, *held)
    if len(usable) < len(rows):
        print(f"{len(rows) - len(usable)} rows without {' or '.join([source, *held])} are left out")
    return usable


def evaluation_rows(path, source, targets, trained):
    """The rows of a file that hold every language. trained: the training rows; questions that are among them are
    counted and said. InputError when all are the same, or two rows have one identifier."""
    with naming(path):
        rows = require_languages(read_counted(path, source, "first", targets, unique=True), source, *targets)
    known = {row[source]["prompt"] for row in trained}
    shared = sum(row[source]["prompt"] in known for row in rows)
    if known == {row[source]["prompt"] for row in rows}:
        raise InputError(f"{path} asks the same questions as the training rows: the run would train on its "
                         f"test; leave it out, and rows are held out of the training rows")
    if shared:
        print(f"{shared} of its {len(rows)} questions are among the training rows, too: "
              f"what they score is no test of anything new")
    return rows


def holds_languages(path, source, targets):
    """Whether any row of a file that nobody named, an eval.jsonl beside the data, has all the languages: what
    follows from that is said."""
    languages = {source, *targets}
    for row in read_rows(path, source, targets=targets):
        if languages <= set(languages_of(row)):
            print(f"{path} lies beside the data: it is used for validation and answers (see --eval-data)")
            return True
    print(f"{path} lies beside the data, but no row of it holds {' and '.join(sorted(languages))}: "
          f"it is not used, rows are held out of --data")
    return False


def missing_targets(rows, targets):
    """The targets that not every row holds."""
    return [target for target in targets if not all(target in languages_of(row) for row in rows)]


def split_rows(rows, evaluated, samples, holdout, eval_split, seed):
    """The Split of training rows, drawn by seed, and of evaluation rows, by the "split" they name.

    samples: how many to train on, None for all. holdout: how many to hold out, a fifth of the rows at most.
    eval_split: the rows that are answered; those that name no split are. InputError when there is none.
    """
    heldout = [row for row in evaluated if row.get("split") == "validation"][:holdout]
    answered = [row for row in evaluated if row.get("split", eval_split) == eval_split]
    if evaluated and not answered:
        raise InputError(f"no row of split {eval_split!r}: see --eval-split")
    apart = 0 if heldout else min(holdout, len(rows) // 5)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    wanted = apart + (samples or len(rows))
    return Split([rows[i] for i in order[:wanted]], apart, heldout, answered)


# ---- rows -> forks ----

@dataclass
class Fork:
    """One prompt and its continuations, as ids; continuation 0 is the right one, in the prompt's language."""
    prompt: list
    continuations: list
    language: str
    row: str
    side: int = 0        # of the prompt's language: 0 the source, i the i-th target
    nll: bool = False    # whether the right continuation is under the NLL term

    @property
    def length(self):
        return len(self.prompt) + sum(map(len, self.continuations))

    @property
    def equal(self):
        """Another continuation has the right one's ids: such a pair says nothing about language."""
        return self.continuations[0] in self.continuations[1:]


def cut_to_fit(continuations, room):
    """The continuations, the longest cut until all fit into `room` tokens; None if no token of each does."""
    if room < len(continuations):
        return None
    longest = max(map(len, continuations))
    while sum(min(len(ids), longest) for ids in continuations) > room:
        longest -= 1
    return [ids[:longest] for ids in continuations]


def make_forks(rows, tokenizer, source="en", target="sw", row_tokens=1024, system=None):
    """([[source fork, target fork] a row], counts).

    A fork is a prompt, the response in its language, and the responses in the other ones.
    target: a language, or a list of them. A fork longer than row_tokens loses the ends of its responses, and
    with them the stop token; a row whose prompt leaves them no room is dropped. Raises InputError if no row
    has the languages, or none fits.
    """
    wanted = [source, *([target] if isinstance(target, str) else target)]
    usable, groups = require_languages(rows, *wanted), []
    counts = Counter({"rows": len(rows), f"without {' and '.join(wanted)}": len(rows) - len(usable)})
    for row in progress(usable, desc="tokenise", unit="row", leave=False):
        uncut = row_forks(row, tokenizer, wanted, system)
        group = [replace(fork, continuations=cut_to_fit(fork.continuations, row_tokens - len(fork.prompt)))
                 for fork in uncut]
        if any(fork.continuations is None for fork in group):
            counts[f"rows dropped: a prompt fills {row_tokens} tokens"] += 1
            continue
        groups.append(group)
        counts["forks"] += len(group)
        counts[f"forks cut to {row_tokens} tokens"] += sum(fork != long for fork, long in zip(group, uncut))
        counts["forks with equal continuations (no preference to learn)"] += sum(fork.equal for fork in group)
    if not groups:
        raise InputError(f"no row fits into {row_tokens} tokens: give a larger --row-tokens")
    return groups, counts


def row_forks(row, tokenizer, languages, system=None):
    """A fork for each of the languages: its prompt, the right response, then the other languages'."""
    responses = {own: tokenizer.response_ids(row[own]["response"]) for own in languages}
    forks = []
    for side, own in enumerate(languages):
        prompt = tokenizer.prompt_ids(row[own]["prompt"], system)
        wrong = [responses[other] for other in languages if other != own]
        forks.append(Fork(prompt, [responses[own], *wrong], own, row["row_id"], side))
    return forks


# ---- forks -> batches ----

def mean_tokens(packed, samples):
    """Row tokens that are no padding, per sample, of packed steps (lists of batches)."""
    return sum(batch.used for step in packed for batch in step) / samples


@dataclass(frozen=True)
class Packing:
    """How samples become micro-batches. trim: drop padding that all rows of one share; on CUDA rows keep one
    length, since its attention is compiled for a shape."""
    batch_size: int = 8
    row_tokens: int = 1024
    micro_rows: int = 1
    trim: bool = True


@dataclass
class Batch:
    """B packed rows of T tokens, their N predictions, and what is known of their S continuations and P pairs.

    Token q sees token k iff fork[q] == fork[k] and k <= q and (branch[k] == 0 or branch[k] == branch[q]).
    """
    tokens: torch.Tensor     # (B, T)
    positions: torch.Tensor  # (B, T), each continuation goes on at its prompt's length
    fork: torch.Tensor       # (B, T), index into forks; -1 padding
    branch: torch.Tensor     # (B, T), 0 prompt, i + 1 continuation i
    row_index: torch.Tensor  # (N,), the position in the flattened (B * T) hidden states that predicts
    targets: torch.Tensor    # (N,), the token it has to predict
    sequence: torch.Tensor   # (N,), the continuation this belongs to, counted over forks in order
    spans: list | None       # of layers.Span, where each fork lies; None on a GPU, whose attention takes a mask
    length: torch.Tensor     # (S,), tokens of every continuation
    side: torch.Tensor       # (S,), language of its prompt: 0 the source, i the i-th target
    right: torch.Tensor      # (F,), the right continuation of each fork
    chosen: torch.Tensor     # (P,), the right continuation of each pair
    rejected: torch.Tensor   # (P,), the wrong one
    nll: torch.Tensor        # the continuations under the NLL term
    english: torch.Tensor    # the right continuations in the source language, for the anchor
    forks: list              # of Fork, in the order of the rows
    order: list              # of int: forks[i] was number order[i] of the forks given to pack
    ref_logp: torch.Tensor | None = None  # (S,) summed log-probs under the reference, once its pass is done

    def to(self, device):
        """The same batch with its tensors on a device. A GPU copies from pinned memory while the program goes
        on; from other memory it would wait."""
        def send(x):
            x = x.pin_memory() if on_gpu else x
            return x.to(device, non_blocking=True)
        kind = torch.device(device).type
        on_gpu = kind == "cuda"
        spans = self.spans if kind == "cpu" else None
        tensors = {name: x for name, x in vars(self).items() if isinstance(x, torch.Tensor)}
        return replace(self, spans=spans, **{name: send(x) for name, x in tensors.items()})

    @property
    def used(self):
        """How many of the B * T tokens are no padding."""
        return int((self.fork >= 0).sum())

    @property
    def padding(self):
        """Share of the B * T tokens that is padding, 0 to 1."""
        return 1 - self.used / self.fork.numel()


def best_fit(lengths, row_tokens):
    """Rows, as lists of indices: longest first, each into the fullest row that has room. Deterministic."""
    rows, by_room = [], []  # by_room: sorted (room left, row)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        assert 0 < lengths[i] <= row_tokens, f"a fork of {lengths[i]} tokens for rows of {row_tokens}"
        at = bisect_left(by_room, (lengths[i], 0))
        if at == len(by_room):
            by_room.append((row_tokens, len(rows)))
            rows.append([])
        room, row = by_room.pop(at)
        rows[row].append(i)
        insort(by_room, (room - lengths[i], row))
    return rows


def laid_lengths(fork, ends):
    """Tokens that each continuation takes up in a row; see micro_batches."""
    return [len(ids) if ends else len(ids) - 1 for ids in fork.continuations]


def laid_length(fork, ends):
    """Tokens a fork takes up in a row."""
    return len(fork.prompt) + sum(laid_lengths(fork, ends))


def lay_out(forks, rows, width, ends=True):
    """The Batch of `rows` (lists of indices into forks), each `width` tokens long."""
    grids = np.zeros((4, len(rows) * width), np.int64)      # tokens, positions, fork, branch
    grids[2] = -1
    row_index, targets, sequence, order, spans = [], [], [], [], []
    continuations = 0
    for b, row in enumerate(rows):
        cursor = b * width
        for i in row:
            prompt = forks[i].prompt
            prompt_at = range(cursor, cursor + len(prompt))
            spans.append(Span(cursor, len(prompt), tuple(laid_lengths(forks[i], ends))))
            for branch, ids in enumerate([prompt, *forks[i].continuations]):
                assert ids, f"row {forks[i].row}: empty prompt or continuation"
                first = len(prompt) if branch else 0
                laid = ids if ends or not branch else ids[:-1]
                here, cursor = cursor, cursor + len(laid)
                grids[0, here:cursor] = laid
                grids[1, here:cursor] = range(first, first + len(laid))
                grids[2, here:cursor] = len(order)
                grids[3, here:cursor] = branch
                if branch:  # the shift by one: the prompt's last token predicts the first, then each the next
                    row_index += [prompt_at[-1], *range(here, here + len(ids) - 1)]
                    targets += ids
                    sequence += [continuations] * len(ids)
                    continuations += 1
            order.append(i)
    laid_out = [forks[i] for i in order]
    predictions = [torch.tensor(x, dtype=torch.int64) for x in (row_index, targets, sequence)]
    return Batch(*torch.from_numpy(grids).view(4, len(rows), width), *predictions,
                 spans, **pair_up(laid_out), forks=laid_out, order=order)


def pair_up(forks):
    """What a Batch says of the continuations of its forks, in their order."""
    known = {name: [] for name in ("length", "side", "right", "chosen", "rejected", "nll", "english")}
    for fork in forks:
        right = len(known["length"])
        known["length"] += [len(ids) for ids in fork.continuations]
        known["side"] += [fork.side] * len(fork.continuations)
        wrong = range(right + 1, len(known["length"]))
        known["right"].append(right)
        known["chosen"] += [right] * len(wrong)
        known["rejected"] += wrong
        known["nll"] += [right] * fork.nll
        known["english"] += [right] * (fork.side == 0)
    return {name: torch.tensor(numbers, dtype=torch.int64) for name, numbers in known.items()}


def micro_batches(forks, row_tokens, rows, trim=True, ends=True):
    """[Batch]: forks packed into rows of row_tokens, `rows` of them a batch.

    trim drops padding that all rows share; without it every batch has one shape, in the last one with empty
    rows if need be. ends=False leaves each continuation's last token out of the row: it is a target, but
    predicts nothing.
    """
    assert forks and rows > 0, f"{len(forks)} forks in batches of {rows} rows"
    packed = best_fit([laid_length(fork, ends) for fork in forks], row_tokens)
    batches = []
    for first in range(0, len(packed), rows):
        part = packed[first:first + rows]
        longest = max(sum(laid_length(forks[i], ends) for i in row) for row in part)
        if not trim:
            longest, part = row_tokens, part + [[]] * (rows - len(part))
        batches.append(lay_out(forks, part, longest, ends))
    return batches


def stage_forks(group, prefers, nll):
    """What a stage of training reads of one row's forks: the right continuation and, if it prefers, the wrong
    ones that differ from it. nll: the prompts ("en", "tgt") whose right continuations are under the NLL. A fork
    that serves neither term is left out."""
    forks = []
    for fork in group:
        right, others = fork.continuations[0], fork.continuations[1:] if prefers else []
        wrong = [ids for ids in others if ids != right]
        under_nll = ("tgt" if fork.side else "en") in nll
        if wrong or under_nll:
            forks.append(replace(fork, continuations=[right, *wrong], nll=under_nll))
    return forks


def make_steps(groups, objective, packing, seed):
    """Optimiser steps of packing.batch_size samples (groups of forks), each a list of micro-batches: what an
    objective (clo.Objective) reads. Packed once: reference and training see the same rows (a GEMM row's bits
    depend on the row count). seed None keeps the order."""
    order = list(range(len(groups)))
    if seed is not None:
        order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    steps = []
    for first in range(0, len(order), packing.batch_size):
        forks = []
        for i in order[first:first + packing.batch_size]:
            forks += stage_forks(groups[i], objective.prefers, objective.nll)
        if forks:
            steps.append(micro_batches(forks, packing.row_tokens, packing.micro_rows, packing.trim, ends=False))
    return steps


def pack(forks, row_tokens, trim=True):
    """All forks in one Batch."""
    rows = len(best_fit([fork.length for fork in forks], row_tokens))
    return micro_batches(forks, row_tokens, rows, trim)[0]


# ---- command line ----

def show(fork, tokenizer, colour):
    """A fork as text: the prompt, then each continuation, which the loss reads, marked."""
    before, after = ("\033[32m", "\033[0m") if colour else ("[[", "]]")
    lines = [f"row {fork.row}, {fork.language} prompt, {len(fork.prompt)} tokens:",
             tokenizer.decode(fork.prompt, special=True)]
    for i, ids in enumerate(fork.continuations):
        name = "right" if i == 0 else "equal to the right one" if ids == fork.continuations[0] else "wrong"
        lines += [f"continuation {i}, {name}, {len(ids)} tokens:",
                  before + tokenizer.decode(ids, special=True) + after]
    return "\n".join(lines)


def show_forks(rows, tokenizer, args):
    """Print what training would see of the rows: counts, packing, unknown tokens, samples."""
    for note in tokenizer.chat.notes:
        print(note)
    groups, counts = make_forks(rows, tokenizer, args.source, args.targets, args.row_tokens, args.system)
    forks = [fork for group in groups for fork in group]
    batch = pack(forks, args.row_tokens)
    rows, width = batch.tokens.shape
    print(f"forks: {describe_counts(counts)}")
    print(f"packed: {rows:,} rows of {width} tokens, {batch.padding:.1%} padding, "
          f"{len(batch.targets):,} predictions")
    for language in dict.fromkeys(fork.language for fork in forks) if tokenizer.unk_id is not None else []:
        ids = [token for fork in forks if fork.language == language for token in fork.continuations[0]]
        print(f"unknown to the tokenizer: {ids.count(tokenizer.unk_id) / len(ids):.1%} of {language} tokens")
    for group in groups[:args.show]:
        for fork in group:
            print("\n" + show(fork, tokenizer, sys.stdout.isatty()))


def parse_args(argv=None):
    parser = flags.Parser(description="Count a data file and show what training would see of it.")
    parser.add_argument("file", help=f"{FORMATS}; JSONL or one JSON list, .gz too")
    parser.add_argument("--source", type=normal, default="en",
                        help="source language, and that of one-language files")
    parser.add_argument("--lang",
                        help="target language, or several: sw,yo; without it each prompt has its own response")
    parser.add_argument("--turns", choices=("first", "all"), default="first", help="turns of a conversation")
    parser.add_argument("--model", help="Hugging Face directory whose tokenizer and template make the forks")
    parser.add_argument("--system", help="system prompt before every prompt")
    parser.add_argument("--template-args", help="variables of the chat template, as JSON: "
                                                '{"enable_thinking": false}')
    parser.add_argument("--row-tokens", type=flags.positive_int, default=1024, help="length of a packed row, in tokens")
    parser.add_argument("--show", type=flags.count, default=0, help="rows to print as forks (needs --model)")
    parser.add_argument("--trl", metavar="OUT", help="write TRL preference rows here (needs --lang)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    for given, other, needed in ((args.show, args.model, "--show needs --model DIR"),
                                 (args.template_args, args.model, "--template-args needs --model DIR"),
                                 (args.trl, args.lang, "--trl needs --lang CODE")):
        if given and not other:
            raise InputError(needed)
    args.targets = language_list(args.lang) if args.lang else []
    rows = read_counted(args.file, args.source, args.turns, args.targets)
    print("languages: " + describe_counts(Counter(language for row in rows for language in languages_of(row))))
    if args.trl:
        print(f"{args.trl}: {write_preferences(args.trl, rows, args.source, args.targets):,} preference rows")
    if args.model:
        show_forks(rows, load_tokenizer(args.model, args.template_args), args)


if __name__ == "__main__":
    run(main)
