"""Data: rows -> forks -> packed rows of tokens; and which rows train, validate and answer.

A *row* is one sample: {"row_id": str, "en": {"prompt": str, "response": str}, "sw": {...}, ...}.
A *fork* is one prompt with k continuations; continuation 0 is the right one, in the prompt's language.
A *batch* is packed rows, T tokens each, and everything a step asks about them: which position has to name
which token, which continuations form pairs, and after the reference pass their log-probs.

    python data.py FILE --model DIR --lang sw --show 2     # counts, packing, samples with their loss mask

Readers of public formats are in formats/conversations.py, chat templates in formats/chat.py.
"""

import contextlib
import math
from bisect import bisect_left, insort
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import torch

from engine import flags
from engine.files import InputError, check_overwrite, run
from engine.progress import progress
from formats.chat import load_tokenizer
from formats.languages import language_list, normal
from formats.records import (FORMATS, describe_counts, languages_of, read_rows, require_languages,
                             write_preferences)
from kernels.layers import Span

# ---- which rows train, validate and answer ----

@dataclass
class Split:
    """Rows by what a run does with them. Held-out rows steer choices (validation), answered rows are the
    report; without a validation split in the evaluation data the first `apart` training rows are held out."""
    rows: list
    apart: int
    heldout: list
    answered: list

    def parts(self, path):
        """(rows to train on, rows to hold out, rows to answer); InputError when one has none: before the
        translation, which may take hours, and after it, which may have dropped rows."""
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


def holders(rows, language):
    """How many rows hold a language."""
    return sum(language in languages_of(row) for row in rows)


def training_rows(path, source, targets, turns="first"):
    """The rows of a file with the source and every target that any row holds; a target that none holds is
    left to the translator. InputError when no row is left."""
    rows = read_counted(path, source, turns, targets)
    return complete_rows(path, rows, source, *(target for target in targets if holders(rows, target)))


def complete_rows(path, rows, *wanted):
    """The rows of a file that hold all wanted languages; others are counted. InputError when none does."""
    with naming(path):
        usable = require_languages(rows, *wanted)
    if len(usable) < len(rows):
        print(f"{len(rows) - len(usable)} rows without {' or '.join(wanted)} are left out")
    return usable


def evaluation_rows(path, source, targets, trained):
    """The rows of a file that hold every language. trained: the training rows; questions that are among them
    are counted and said. InputError when all are the same, or two rows have one identifier."""
    rows = complete_rows(path, read_counted(path, source, "first", targets, unique=True), source, *targets)
    known = {row[source]["prompt"] for row in trained}
    asked = [row[source]["prompt"] for row in rows]
    shared = sum(question in known for question in asked)
    if known == {*asked}:
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
    return [target for target in targets if holders(rows, target) < len(rows)]


def split_rows(rows, evaluated, samples, holdout, eval_split, seed):
    """The Split of training rows, drawn by seed, and of evaluation rows, by the "split" they name.

    samples: how many to train on, None for all. holdout: how many to hold out, a fifth of the rows at most.
    eval_split: the rows that are answered; those that name no split are. InputError when there is none.
    """
    heldout = [row for row in evaluated if row.get("split") == "validation"][:holdout]
    answered = [row for row in evaluated if (row.get("split") or eval_split) == eval_split]
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
    def packed_length(self):
        """Tokens it takes of a row: of every continuation the last one is only predicted (lay_out)."""
        return self.length - len(self.continuations)

    @property
    def equal(self):
        """All other continuations have the right one's ids: they say nothing about language."""
        right, others = self.continuations[0], self.continuations[1:]
        return bool(others) and all(ids == right for ids in others)


def cut_to_fit(fork, row_tokens):
    """The fork, its longest continuations cut until it fits; None if no token of each does."""
    room, longest = row_tokens - len(fork.prompt), max(map(len, fork.continuations))
    if room < len(fork.continuations):
        return None
    while sum(min(len(ids), longest) for ids in fork.continuations) > room:
        longest -= 1
    return replace(fork, continuations=[ids[:longest] for ids in fork.continuations])


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
        group = [cut_to_fit(fork, row_tokens) for fork in uncut]
        if None in group:
            counts[f"rows dropped: a prompt fills {row_tokens} tokens"] += 1
            continue
        groups.append(group)
        counts["forks"] += len(group)
        counts[f"forks cut to {row_tokens} tokens"] += sum(fork != long for fork, long in zip(group, uncut))
        counts["forks with equal continuations (no preference to learn)"] += sum(fork.equal for fork in group)
    if not groups:
        raise InputError(f"no row fits into {row_tokens} tokens: give shorter prompts, or a larger "
                         f"--row-tokens where the model reads more")
    return groups, counts


def row_forks(row, tokenizer, languages, system=None):
    """A fork for each of the languages: its prompt, the right response, then the other languages'."""
    responses = {own: tokenizer.response_ids(row[own]["response"]) for own in languages}
    forks = []
    for side, own in enumerate(languages):
        first = sorted(languages, key=lambda language: language != own)
        forks.append(Fork(tokenizer.prompt_ids(row[own]["prompt"], system),
                          [responses[language] for language in first], own, row["row_id"], side))
    return forks


# ---- forks -> batches ----

def mean_tokens(packed, samples):
    """Row tokens that are no padding, per sample, of packed steps (lists of batches)."""
    return sum(batch.used for step in packed for batch in step) / samples


PASS_ROWS = 1       # what a forward and backward pass costs beside its rows, in rows


@dataclass(frozen=True)
class Packing:
    """How samples become micro-batches. micro_rows: the most rows of one; ranks: processes that share
    those of a step. trim: drop padding that all its rows share; on CUDA rows keep one length, since attention
    there is compiled for a shape."""
    batch_size: int = 8
    row_tokens: int = 1024
    micro_rows: int = 1
    trim: bool = True
    ranks: int = 1

    def rows_for(self, steps):
        """Rows of a micro-batch for steps of so many rows each: those with which the busiest rank computes
        the least, padding and what a pass costs by itself included."""
        def work(rows):
            passes = sum(math.ceil(step / (rows * self.ranks)) for step in steps)
            return passes * (rows + PASS_ROWS)
        return min(range(self.micro_rows, 0, -1), key=work)               # on a tie the most


def packing_for(device, batch_size, row_tokens, micro_rows, ranks=1):
    """The Packing of a device, "cpu" or "cuda:1". On a CPU attention walks the forks, wherever they lie: in
    one process the rows of a micro-batch are one long row there, with less padding."""
    kind = torch.device(device).type
    if kind == "cpu" and ranks == 1:
        return Packing(batch_size, row_tokens * micro_rows)
    return Packing(batch_size, row_tokens, micro_rows, kind != "cuda", ranks)


@dataclass
class Batch:
    """B packed rows of T tokens, their N predictions, and what is known of their S continuations and P pairs.

    Which token sees which: eq. 1 of model.py.
    """
    tokens: torch.Tensor     # (B, T)
    positions: torch.Tensor  # (B, T), each continuation goes on at its prompt's length
    fork: torch.Tensor       # (B, T), index into forks; -1 padding
    branch: torch.Tensor     # (B, T), 0 prompt, i + 1 continuation i
    row_index: torch.Tensor  # (N,), the position in the flattened (B * T) hidden states that predicts
    targets: torch.Tensor    # (N,), the token it has to predict
    sequence: torch.Tensor   # (N,), the continuation this belongs to, counted over forks in order
    spans: list | None       # of layers.Span, where each fork lies; None on a GPU, where a mask says it
    length: torch.Tensor     # (S,), tokens of every continuation
    side: torch.Tensor       # (S,), language of its prompt: 0 the source, i the i-th target
    right: torch.Tensor      # the right continuation of each fork
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
        kind, moved = torch.device(device).type, {}
        if kind == "cpu":
            return self
        for name, x in vars(self).items():
            if isinstance(x, torch.Tensor):
                moved[name] = (x.pin_memory() if kind == "cuda" else x).to(device, non_blocking=True)
        return replace(self, spans=None, **moved)

    @property
    def used(self):
        """How many of the B * T tokens are no padding."""
        return int((self.fork >= 0).sum())


def best_fit(lengths, row_tokens):
    """Rows, as lists of indices: longest first, each into the fullest row that has room. Deterministic."""
    rows, by_room = [], []  # by_room: sorted (room left, row)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        assert 0 < lengths[i] <= row_tokens, f"a fork of {lengths[i]} tokens for rows of {row_tokens}"
        at = bisect_left(by_room, (lengths[i], 0))
        room, row = by_room.pop(at) if at < len(by_room) else (row_tokens, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        insort(by_room, (room - lengths[i], row))
    return rows


def lay_out(forks, rows, width):
    """The Batch of `rows` (lists of indices into forks), each `width` tokens long. The last token of a
    continuation is a target, but predicts nothing: it is left out of the row."""
    grids = np.zeros((4, len(rows) * width), np.int64)      # tokens, positions, fork, branch
    grids[2] = -1
    laid_out, spans, row_index = [], [], []
    for b, row in enumerate(rows):
        cursor = b * width
        for fork in (forks[i] for i in row):
            size, start = len(fork.prompt), cursor
            for branch, ids in enumerate([fork.prompt, *fork.continuations]):
                laid, first = (ids[:-1], size) if branch else (ids, 0)
                here = range(cursor, cursor + len(laid))
                cursor = here.stop
                positions = range(first, first + len(laid))
                grids[:, here.start:cursor] = np.broadcast_arrays(laid, positions, len(laid_out), branch)
                if branch:  # the shift by one: the prompt's last token predicts the first, then each the next
                    row_index += [start + size - 1, *here]
            spans.append(Span(start, size, tuple(len(ids) - 1 for ids in fork.continuations)))
            laid_out.append(fork)
    return Batch(*torch.from_numpy(grids).view(4, len(rows), width), torch.tensor(row_index),
                 spans=spans, **pair_up(laid_out), forks=laid_out, order=[i for row in rows for i in row])


def pair_up(forks):
    """What a Batch says of the continuations of its forks, in their order."""
    continuations = [ids for fork in forks for ids in fork.continuations]
    length = torch.tensor([len(ids) for ids in continuations])
    sizes = torch.tensor([len(fork.continuations) for fork in forks])
    side = torch.tensor([fork.side for fork in forks])
    under_nll = torch.tensor([fork.nll for fork in forks], dtype=torch.bool)
    right, every = sizes.cumsum(0) - sizes, torch.arange(len(length))
    return {"targets": torch.tensor([token for ids in continuations for token in ids]),
            "sequence": every.repeat_interleave(length),
            "length": length, "side": side.repeat_interleave(sizes), "right": right,
            "chosen": right.repeat_interleave(sizes - 1), "rejected": every[~torch.isin(every, right)],
            "nll": right[under_nll], "english": right[side == 0]}


def fill_rows(forks, row_tokens):
    """Rows of so many tokens, as lists of indices into forks."""
    return best_fit([fork.packed_length for fork in forks], row_tokens)


def micro_batches(forks, row_tokens, rows, trim=True):
    """[Batch]: forks packed into rows of row_tokens, `rows` of them a batch.

    trim drops padding that all rows share; without it every batch has one shape, in the last one with empty
    rows if need be.
    """
    lengths, batches = np.array([fork.packed_length for fork in forks]), []
    filled = fill_rows(forks, row_tokens)
    for first in range(0, len(filled), rows):
        part, width = filled[first:first + rows], row_tokens
        if trim:
            width = max(lengths[row].sum() for row in part)
        else:
            part += [[]] * (rows - len(part))
        batches.append(lay_out(forks, part, width))
    return batches


def cut_steps(steps, packing):
    """The micro-batches of every step (a list of forks), all of as many rows."""
    rows = packing.rows_for([len(fill_rows(forks, packing.row_tokens)) for forks in steps])
    return [micro_batches(forks, packing.row_tokens, rows, packing.trim) for forks in steps]


def stage_forks(group, prefers, nll):
    """What a stage of training reads of one row's forks: the right continuation and, if it prefers, the wrong
    ones that differ from it. nll: the prompts ("en", "tgt") whose right continuations are under the NLL. A
    fork that serves neither term is left out."""
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
    depend on how many rows are multiplied, and first rewards have to be 0). seed None keeps the order."""
    order = list(range(len(groups)))
    if seed is not None:
        order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    steps = []
    for first in range(0, len(order), packing.batch_size):
        forks = []
        for i in order[first:first + packing.batch_size]:
            forks += stage_forks(groups[i], objective.prefers, objective.nll)
        if forks:
            steps.append(forks)
    return cut_steps(steps, packing)


def pack(forks, row_tokens):
    """All forks in one Batch."""
    return micro_batches(forks, row_tokens, len(forks))[0]


# ---- command line ----

def print_notes(tokenizer, file=None):
    """Where prompts and replies differ from the text the chat template itself would write."""
    for note in tokenizer.chat.notes:
        print(note, file=file)


def fork_text(fork, tokenizer):
    """A fork to be read: the prompt, then each continuation, which the loss reads, in [[ ]]."""
    lines = [f"row {fork.row}, {fork.language} prompt, {len(fork.prompt)} tokens:",
             tokenizer.decode(fork.prompt, special=True)]
    for i, ids in enumerate(fork.continuations):
        name = "right" if ids == fork.continuations[0] else "wrong"
        text = tokenizer.decode(ids, special=True)
        lines.append(f"continuation {i}, {name}, {len(ids)} tokens:\n[[{text}]]")
    return "\n".join(lines)


def show_forks(groups, counts, row_tokens, tokenizer, samples):
    """Print what training would see of the rows: counts, packing, and so many of them."""
    print_notes(tokenizer)
    batch = pack([fork for group in groups for fork in group], row_tokens)
    rows, width = batch.tokens.shape
    print(f"forks: {describe_counts(counts)}")
    print(f"packed: {rows:,} rows of {width} tokens, {1 - batch.used / batch.tokens.numel():.1%} padding, "
          f"{len(batch.targets):,} predictions")
    for group in groups[:samples]:
        for fork in group:
            print("\n" + fork_text(fork, tokenizer))


def parse_args(argv=None):
    parser = flags.Parser(description="Count a data file and show what training would see of it.")
    parser.add_argument("file", help=f"{FORMATS}; JSONL, JSON or a table, .gz too")
    add = flags.group(parser, "rows")
    add("--source", normal, "en", "source language, and that of one-language files")
    add("--lang", str, None, "target language, or several: sw,yo; else each prompt has its own response")
    add("--turns", ["first", "all"], "first", "turns of a conversation")
    add("--trl", str, None, "write TRL preference rows into this file (needs --lang)")
    add = flags.group(parser, "forks")
    add("--model", str, None, "Hugging Face directory whose tokenizer and template make the forks")
    add("--system", str, None, "system prompt before every prompt")
    add("--template-args", str, None, "variables of the chat template: '{\"enable_thinking\": false}'")
    add("--row-tokens", flags.positive_int, 1024, "length of a packed row, in tokens")
    add("--show", flags.count, 0, "rows to print as forks (needs --model)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if (args.show or args.template_args) and not args.model:
        raise InputError("--show and --template-args need --model DIR")
    if args.trl and not args.lang:
        raise InputError("--trl needs --lang CODE")
    if args.trl:
        check_overwrite("--trl", args.trl, args.file)
    targets = language_list(args.lang) if args.lang else []
    rows = read_counted(args.file, args.source, args.turns, targets)
    held = Counter(language for row in rows for language in languages_of(row))
    print(f"languages: {describe_counts(held)}")
    if args.trl:
        pairs = write_preferences(args.trl, rows, args.source, *targets)
        print(f"{args.trl}: {pairs:,} preference rows")
    if args.model:
        tokenizer = load_tokenizer(args.model, args.template_args)
        groups, counts = make_forks(rows, tokenizer, args.source, targets, args.row_tokens, args.system)
        show_forks(groups, counts, args.row_tokens, tokenizer, args.show)


if __name__ == "__main__":
    run(main)
