"""Data: public formats -> rows -> forks -> packed rows of tokens.

A *row* is one sample: {"row_id": str, "en": {"prompt": str, "response": str}, "sw": {...}, ...}.
A *fork* is one prompt with k continuations. A *batch* is rows of T tokens filled with forks, and the list
of its predictions: which position has to name which token.

What is kept of public data (every decision is counted, `describe` prints the counts):
- A conversation gives its first exchange; with turns="all" every user message and the reply right after it
  become a row of their own, without the turns before them.
- OpenAssistant trees follow Open-Assistant's own top-1 rule (oasst_dataset.py): reviewed trees in the
  language, no deleted or synthetic message in the thread, replies of rank 0 or without a sibling.
- System prompts in the data are left out, as nothing translates them; `system=` gives every prompt one.
- Rows with an empty prompt or response are dropped.

Templates are the checkpoint's own. Only a template may make added tokens: "</s>" in user text stays text.

    python data.py FILE --model DIR --lang sw --show 2     # counts, packing, samples with their loss mask
"""

import argparse
import sys
from bisect import bisect_left, insort
from collections import Counter
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from engine.files import InputError, run
from formats.chat import load_tokenizer
from formats.records import (FORMATS, describe_counts, languages_of, read_rows, require_languages,
                             write_preferences)

# ---- files -> records ----


# ---- records -> rows ----


# ---- text -> ids ----


# ---- rows -> forks ----

@dataclass
class Fork:
    """One prompt and its continuations, as ids; continuation 0 is the right one, in the prompt's language."""
    prompt: list
    continuations: list
    language: str
    row: str

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


def make_forks(rows, tokenizer, source="en", target="sw", row_tokens=1024, system=None, continuations="pair"):
    """([[source fork, target fork] a row], counts).

    A fork is a prompt, the response in its language, and the responses in the other ones.
    target: a language, or a list of them. continuations: "pair", or "chosen" for the right response alone.
    A fork longer than row_tokens loses the ends of its responses, and with them the stop token; a row whose
    prompt leaves them no room is dropped. Raises InputError if no row has the languages, or none fits.
    """
    assert continuations in ("pair", "chosen"), f"continuations {continuations!r} is neither pair nor chosen"
    wanted = [source, *([target] if isinstance(target, str) else target)]
    usable, groups = require_languages(rows, *wanted), []
    counts = Counter({"rows": len(rows), f"without {' and '.join(wanted)}": len(rows) - len(usable)})
    for row in usable:
        prompts = {own: tokenizer.prompt_ids(row[own]["prompt"], system) for own in wanted}
        replies = {own: tokenizer.response_ids(row[own]["response"]) for own in wanted}
        whole = [Fork(prompts[own], [replies[own], *(replies[other] for other in wanted
                                                     if other != own and continuations == "pair")],
                      own, row["row_id"]) for own in wanted]
        group = [replace(fork, continuations=cut_to_fit(fork.continuations, row_tokens - len(fork.prompt)))
                 for fork in whole]
        if any(fork.continuations is None for fork in group):
            counts[f"rows dropped: a prompt fills {row_tokens} tokens"] += 1
            continue
        groups.append(group)
        counts["forks"] += len(group)
        counts[f"forks cut to {row_tokens} tokens"] += sum(fork != uncut for fork, uncut in zip(group, whole))
        counts["forks with equal continuations (no preference to learn)"] += sum(fork.equal for fork in group)
    if not groups:
        raise InputError(f"no row fits into {row_tokens} tokens; make the rows longer")
    return groups, counts


# ---- forks -> batches ----

@dataclass
class Batch:
    """B packed rows of T tokens and their N predictions.

    Token q sees token k iff fork[q] == fork[k] and k <= q and (branch[k] == 0 or branch[k] == branch[q]).
    """
    tokens: torch.Tensor     # (B, T)
    positions: torch.Tensor  # (B, T), each continuation goes on at its prompt's length
    fork: torch.Tensor       # (B, T), index into forks; -1 padding
    branch: torch.Tensor     # (B, T), 0 prompt, i + 1 continuation i
    row_index: torch.Tensor  # (N,), the position in the flattened (B * T) hidden states that predicts
    targets: torch.Tensor    # (N,), the token it has to predict
    sequence: torch.Tensor   # (N,), the continuation this belongs to, counted over forks in order
    forks: list              # of Fork, in the order of the rows
    order: list              # of int: forks[i] was number order[i] of the forks given to pack

    def to(self, device):
        """The same batch with its tensors on a device."""
        return replace(self, **{field.name: getattr(self, field.name).to(device) for field in fields(self)
                                if field.name not in ("forks", "order")})

    @property
    def padding(self):
        """Share of the B * T tokens that is padding, 0 to 1."""
        return (self.fork < 0).double().mean().item()


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


def laid_length(fork, ends):
    """Tokens a fork takes up in a row; see micro_batches."""
    return fork.length - (0 if ends else len(fork.continuations))


def lay_out(forks, rows, width, ends=True):
    """The Batch of `rows` (lists of indices into forks), each `width` tokens long."""
    grids = np.zeros((4, len(rows), width), np.int64)  # tokens, positions, fork, branch
    grids[2] = -1
    row_index, targets, sequence, order = [], [], [], []
    for b, row in enumerate(rows):
        cursor = 0
        for i in row:
            size, last = len(forks[i].prompt), b * width + cursor + len(forks[i].prompt) - 1
            for branch, ids in enumerate([forks[i].prompt, *forks[i].continuations]):
                assert ids, f"row {forks[i].row}: empty prompt or continuation"
                first, laid = size if branch else 0, ids if ends or not branch else ids[:-1]
                grids[:, b, cursor:cursor + len(laid)] = (laid, range(first, first + len(laid)),
                                                          [len(order)] * len(laid), [branch] * len(laid))
                if branch:  # the shift by one: the prompt's last token predicts the first, then each the next
                    here = b * width + cursor
                    row_index += [last, *range(here, here + len(ids) - 1)]
                    sequence += [sequence[-1] + 1 if sequence else 0] * len(ids)
                    targets += ids
                cursor += len(laid)
            order.append(i)
    return Batch(*torch.from_numpy(grids), *map(torch.tensor, (row_index, targets, sequence)),
                 [forks[i] for i in order], order)


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
    groups, counts = make_forks(rows, tokenizer, args.source, args.lang or [], args.row_tokens, args.system)
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
    parser = argparse.ArgumentParser(description="Count a data file and show what training would see of it.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("file", help=f"{FORMATS}; JSONL or one JSON list, .gz too")
    parser.add_argument("--source", default="en", help="source language, and that of one-language files")
    parser.add_argument("--lang", help="target language; without it each prompt has its own response only")
    parser.add_argument("--turns", choices=("first", "all"), default="first", help="turns of a conversation")
    parser.add_argument("--model", help="Hugging Face directory whose tokenizer and template make the forks")
    parser.add_argument("--system", help="system prompt before every prompt")
    parser.add_argument("--template-args", help="variables of the chat template, as JSON: "
                                                '{"enable_thinking": false}')
    parser.add_argument("--row-tokens", type=int, default=1024, help="length of a packed row, in tokens")
    parser.add_argument("--show", type=int, default=0, help="rows to print as forks (needs --model)")
    parser.add_argument("--trl", metavar="OUT", help="write TRL preference rows here (needs --lang)")
    return parser.parse_args(argv)


def main(argv=None):
    args, counts = parse_args(argv), Counter()
    for given, other, needed in ((args.show, args.model, "--show needs --model DIR"),
                                 (args.template_args, args.model, "--template-args needs --model DIR"),
                                 (args.trl, args.lang, "--trl needs --lang CODE")):
        if given and not other:
            raise InputError(needed)
    rows = read_rows(args.file, args.source, args.turns, counts)
    print(f"{args.file}: {describe_counts(counts)}")
    print("languages: " + describe_counts(Counter(language for row in rows for language in languages_of(row))))
    if args.trl:
        print(f"{args.trl}: {write_preferences(args.trl, rows, args.source, args.lang):,} preference rows")
    if args.model:
        show_forks(rows, load_tokenizer(args.model, args.template_args), args)


if __name__ == "__main__":
    run(main)
