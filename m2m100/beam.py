"""Beam search over M2M100 and NLLB, as transformers does it. Ids in, ids out; tokenizer.py has the text.

    beam_search(model, sources=[[8215, 52, 907, 2]], language=8277, limits=[60])

    source: [lang] pieces [eos]      target: [eos] [lang] pieces [eos], the first two are given       (eq. 3)
    score of a finished hypothesis = sum of its log-probs / (its tokens after the first)^alpha        (eq. 4)

Nearly all of beam search's time is matrix products over B K rows, most of all the head's. So a sentence's
keys and values are kept once for all of its beams, beams that change their parent move nothing, and the
head's logits are made a part at a time, each read while it is in cache. Finished hypotheses stay on the
device: a step asks it one thing, which sentences go on.
"""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from m2m100.network import M2M100

HEAD_ROWS = 512        # rows of the head in one product on a CPU: their logits stay in the cores' caches
CAST_ROWS = 1 << 14    # the same of a head in less than fp32, which is cast part by part
BLOCK = 32             # tokens whose largest logit stands for them when the best are looked for
SPARE_SLOTS = 48       # a cache begins with this many slots, and has as many free again when it is tidied


class Cache:
    """Keys and values of one decoder layer. Every token a beam tries has a slot: (B, heads, slots, D).

    Hypotheses form a tree. A beam that changes its parent copies nothing: a mask says which slots are its
    ancestors, and all beams of a sentence read the sentence's slots in one attention call.
    """

    def __init__(self, key: Tensor):
        """Room for tokens with keys like `key` (B, heads, any, D)."""
        B, heads, _, D = key.shape
        self.key, self.value = key.new_empty(2, B, heads, SPARE_SLOTS, D)
        self.used = 0

    def append_(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Take in key, value (B, heads, n, D) of n new tokens; give all so far, (B, heads, used, D)."""
        first = self.used
        self.used += key.shape[2]
        self.key[:, :, first:self.used] = key
        self.value[:, :, first:self.used] = value
        return self.key[:, :, :self.used], self.value[:, :, :self.used]

    def has_room(self, n: int) -> bool:
        return self.used + n <= self.key.shape[2]

    def keep_(self, rows: Tensor, slots: Tensor) -> None:
        """Go on with these rows (B',) and, of each, these slots (B', n)."""
        _, heads, _, D = self.key.shape
        old_key, old_value = self.key, self.value
        B, self.used = slots.shape
        room = self.used + max(self.used, SPARE_SLOTS)
        self.key, self.value = old_key.new_empty(2, B, heads, room, D)
        head = torch.arange(heads, device=rows.device)
        kept = rows[:, None, None], head[:, None], slots[:, None]  # (B', heads, n)
        self.key[:, :, :self.used] = old_key[kept]
        self.value[:, :, :self.used] = old_value[kept]


@dataclass
class Beams:
    """The hypotheses of B sentences, K of each (one before the first step); done sentences lose their row."""
    row: Tensor        # (B,) index of the sentence
    limit: Tensor      # (B,) most tokens it may have, the language token included
    history: Tensor    # (B, K, T) its tokens after the first
    visible: Tensor    # (B, K, slots) which of the cache's slots are ancestors of the hypothesis
    score: Tensor      # (B, K) sum of log-probs
    finished: Tensor   # (B,) hypotheses that have ended; K are enough
    best: Tensor       # (B,) eq. 4 of the best of those

    @classmethod
    def start(cls, rows: list[int], language: int, limits: list[int], score: Tensor) -> "Beams":
        """score: zeros (B,), of the type that sums are kept in."""
        B, device = len(rows), score.device
        return cls(row=torch.tensor(rows, device=device),
                   limit=torch.tensor(limits, device=device),
                   history=torch.full((B, 1, 1), language, device=device),
                   visible=torch.ones(B, 1, 1, dtype=torch.bool, device=device),
                   score=score[:, None],
                   finished=torch.zeros(B, dtype=torch.long, device=device),
                   best=score - math.inf)

    def keep(self, rows: Tensor, slots: Tensor) -> "Beams":
        """The hypotheses of some rows (B',), which see the cache through these of its slots (B', n)."""
        kept = Beams(*(getattr(self, field.name)[rows] for field in fields(self)))
        K = kept.visible.shape[1]
        kept.visible = kept.visible.gather(2, slots[:, None].expand(-1, K, -1))
        return kept

    def see_themselves_(self) -> None:
        """The next K slots of the cache are those of the K newest tokens."""
        B, K, _ = self.visible.shape
        own = torch.eye(K, dtype=torch.bool, device=self.visible.device)
        self.visible = torch.cat([self.visible, own.expand(B, -1, -1)], dim=2)


@dataclass
class Answers:
    """The best finished hypothesis of every sentence so far, on the device."""
    ids: Tensor      # (sentences, longest)
    length: Tensor   # (sentences,)

    @classmethod
    def start(cls, sentences: int, longest: int, device) -> "Answers":
        return cls(ids=torch.zeros(sentences, longest, dtype=torch.long, device=device),
                   length=torch.zeros(sentences, dtype=torch.long, device=device))

    def replace_(self, row: Tensor, better: Tensor, ids: Tensor) -> None:
        """ids (B, T) become the answers of sentences row (B,) where better (B,)."""
        T = ids.shape[1]
        self.ids[row, :T] = torch.where(better[:, None], ids, self.ids[row, :T])
        self.length[row] = self.length[row].masked_fill(better, T)

    def as_lists(self) -> list[list[int]]:
        return [ids[:length] for ids, length in zip(self.ids.tolist(), self.length.tolist())]


# ---- a step ----

def head_parts(head: Tensor) -> list[slice]:
    """Which rows of the head are multiplied at a time."""
    V = len(head)
    rows = HEAD_ROWS if head.device.type == "cpu" else V
    if head.dtype.itemsize < 4:
        rows = min(rows, CAST_ROWS)
    return [slice(first, min(first + rows, V)) for first in range(0, V, rows)]


def fill_logits_(logits: Tensor, hidden: Tensor, head: Tensor) -> Tensor:
    """Logits (V, R), of at least fp32, of hidden (R, H); their log-sum-exp (R,).

    The sum is kept as in an online softmax: m = max so far, s = sum of exp(logit - m); a part with a higher
    maximum m' makes it s exp(m - m') + sum of exp(logit - m').
    """
    columns = hidden.T.contiguous().to(logits.dtype)
    peak = logits.new_full((len(hidden),), -math.inf)
    mass = torch.zeros_like(peak)
    for rows in head_parts(head):
        part = torch.mm(head[rows].to(logits.dtype), columns, out=logits[rows])
        higher = torch.maximum(peak, part.amax(0))
        mass *= (peak - higher).exp_()
        mass += (part - higher).exp_().sum(0)
        peak = higher
    return peak + mass.log()


def best_tokens(hidden: Tensor, head: Tensor, count: int, room: Tensor,
                banned: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """The `count` largest log-probs of every row of hidden (R, H), and their tokens: two (R, count).

    Logits lie in `room` with a column for each row of hidden: on a CPU the product is faster this way round.
    banned: tokens (R, n) and which of them (R, n) may not be chosen; their share of the probability is not
    given to others.
    """
    R, V = len(hidden), len(head)
    blocks = -(-V // BLOCK)
    logits = room[:blocks * BLOCK * R].view(blocks * BLOCK, R)
    logits[V:] = -math.inf
    total = fill_logits_(logits[:V], hidden, head)
    row = torch.arange(R, device=hidden.device)[:, None]
    if banned is not None:
        tokens, bans = banned
        penalty = logits.new_zeros(bans.shape).masked_fill_(bans, -math.inf)
        logits.index_put_((tokens, row.expand_as(tokens)), penalty, accumulate=True)
    # The best `count` tokens lie in the `count` blocks with the largest maxima.
    peaks = logits.view(blocks, BLOCK, R).amax(1)
    block = peaks.T.topk(min(count, blocks)).indices  # (R, count)
    inside = torch.arange(BLOCK, device=hidden.device)
    tokens = (block[..., None] * BLOCK + inside).flatten(1)
    top, which = logits[tokens, row].topk(count)
    return top - total[:, None], tokens.gather(1, which)


def extend(state: Beams, logp: Tensor, token: Tensor, alpha: float, end: int, answers: Answers) -> Beams:
    """Hypotheses one token longer, given the 2K best of each, logp and token (B, K, 2K); as transformers does
    with early_stopping=True.

    A sentence's 2K best extensions are looked at: those that end among the first K are finished hypotheses,
    the best of which goes to `answers`; of the others K go on, and there are K, since a parent ends but once.
    """
    T = state.history.shape[2] + 1
    K = logp.shape[2] // 2
    sums = logp + state.score[..., None]
    total, place = sums.flatten(1).topk(2 * K)
    parent = place // (2 * K)  # (B, 2K)
    token = token.flatten(1).gather(1, place)

    last = state.limit <= T
    ends = (token == end) | last[:, None]
    ends = ends[:, :K] & (state.finished < K)[:, None]
    mean = total[:, :K] / T**alpha  # eq. 4
    best, which = mean.masked_fill(~ends, -math.inf).max(1)
    which = which[:, None]
    ended = follow(state.history, parent.gather(1, which))[:, 0]  # (B, T - 1)
    ended = torch.cat([ended, token.gather(1, which)], dim=1)
    answers.replace_(state.row, best > state.best, ended)

    score, alive = total.masked_fill(token == end, -math.inf).topk(K)
    parent = parent.gather(1, alive)  # (B, K)
    token = token.gather(1, alive)
    history = follow(state.history, parent)
    return Beams(row=state.row,
                 limit=state.limit,
                 history=torch.cat([history, token[..., None]], dim=2),
                 visible=follow(state.visible, parent),
                 score=score,
                 finished=state.finished + ends.sum(1) + K * last,
                 best=torch.maximum(state.best, best))


def follow(x: Tensor, parent: Tensor) -> Tensor:
    """x (B, K, n) in the order of parent (B, any)."""
    return x.gather(1, parent[..., None].expand(-1, -1, x.shape[2]))


def repeats(history: Tensor, n: int) -> tuple[Tensor, Tensor] | None:
    """The tokens that have followed an (n - 1)-gram of a hypothesis of history (R, T), and which of them
    would follow it again, since the hypothesis ends in it: two (R, T - n + 1), or None. n > 1."""
    R, T = history.shape
    if T < n:
        return None
    grams = history.unfold(1, n - 1, 1)  # (R, T - n + 2, n - 1)
    again = grams[:, :-1] == grams[:, -1:]
    return history[:, n - 1:], again.all(2)


# ---- the search ----

def remember(model: M2M100, sources: list[list[int]]) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """The decoder's memory of the sources, longest first, and its mask (B, S). Encoded in groups of like
    length, so that little of the work is padding."""
    c = model.config
    device = model.head.device
    B, S = len(sources), len(sources[0])
    heads = c.decoder_attention_heads
    D = c.d_model // heads
    memory = [model.head.new_zeros(2, B, heads, S, D) for _ in model.model.decoder.layers]
    mask = torch.zeros(B, S, dtype=torch.bool, device=device)
    first = 0
    while first < B:
        length = len(sources[first])
        group = [ids for ids in sources[first:] if 4 * len(ids) >= 3 * length]
        padded = [ids + [c.pad_token_id] * (length - len(ids)) for ids in group]
        lengths = torch.tensor([len(ids) for ids in group], device=device)
        group_mask = torch.arange(length, device=device) < lengths[:, None]
        rows = slice(first, first + len(group))
        mask[rows, :length] = group_mask
        encoded = model.encode(torch.tensor(padded, device=device), group_mask)
        for layer_memory, (key, value) in zip(memory, model.memory(encoded)):
            layer_memory[0, rows, :, :length] = key
            layer_memory[1, rows, :, :length] = value
        first += len(group)
    return [(key, value) for key, value in memory], mask


@torch.inference_mode()
def beam_search(model: M2M100, sources: list[list[int]], language: int, limits: list[int], beams: int = 5,
                alpha: float = 1.0, no_repeat: int = 0) -> list[list[int]]:
    """The best translation of each source: ids that begin with `language` and end with the end token, unless
    limits[i] tokens did not suffice. What else is in the batch changes it by rounding alone.

    beams=1 is greedy; no_repeat=n allows no n-gram twice. Log-probs and their sums are of at least fp32,
    whatever the model's type.
    """
    c = model.config
    head = model.head
    B = len(sources)
    exact = torch.promote_types(head.dtype, torch.float32)
    order = sorted(range(B), key=lambda i: -len(sources[i]))
    memory, mask = remember(model, [sources[i] for i in order])
    caches = [Cache(key) for key, _ in memory]
    room = head.new_empty(B * beams * (len(head) + BLOCK), dtype=exact)
    answers = Answers.start(B, max(limits), head.device)
    zeros = head.new_zeros(B, dtype=exact)
    state = Beams.start(order, language, [limits[i] for i in order], zeros)
    start = torch.full((B, 1), c.decoder_start_token_id, device=head.device)
    model.decode(start, 0, memory, mask, caches)
    while True:
        B, K, place = state.history.shape
        state.see_themselves_()
        newest = state.history[:, :, -1]
        hidden = model.decode(newest, place, memory, mask, caches, state.visible)
        banned = repeats(state.history.flatten(0, 1), no_repeat) if no_repeat else None
        logp, token = best_tokens(hidden.flatten(0, 1), head, 2 * beams, room, banned)
        shape = B, K, 2 * beams
        state = extend(state, logp.view(shape), token.view(shape), alpha, c.eos_token_id, answers)

        going = (state.finished < beams).nonzero()[:, 0]  # waits for the device, once a step
        if len(going) == 0:
            return answers.as_lists()
        if 8 * len(going) > 7 * B and caches[0].has_room(beams):
            continue  # tidying copies the caches: only when it pays
        if len(going) < B:
            mask = mask[going]
            memory = [(key[going], value[going]) for key, value in memory]
        slots = used_slots(state.visible[going])
        state = state.keep(going, slots)
        for cache in caches:
            cache.keep_(going, slots)


def used_slots(visible: Tensor) -> Tensor:
    """The slots (B, n) that a sentence's hypotheses see by visible (B, K, slots), and others to fill up."""
    used = visible.any(1)
    used_first = used.sort(descending=True, stable=True).indices
    most = int(used.sum(1).max())
    return used_first[:, :most]
