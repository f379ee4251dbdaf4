"""Beam search over M2M100 and NLLB, as transformers does it. Ids in, ids out; tokenizer.py has the text.

    beam_search(model, sources=[[8215, 52, 907, 2]], language=8277, limits=[60])

    source: [lang] pieces [eos]      target: [eos] [lang] pieces [eos], the first two are given       (eq. 3)
    score of a finished hypothesis = sum of its log-probs / (its tokens after the first)^alpha        (eq. 4)

Nearly all of beam search's time is matrix products over B K rows, most of all the head's. So a sentence's
keys and values are kept once for all of its beams, beams that change their parent move nothing, and the
head's logits are made a part at a time, each read while it is in cache.
"""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from m2m100.network import M2M100

HEAD_ROWS = 512    # rows of the head in one product on a CPU: their logits stay in the cores' caches
BLOCK = 32         # tokens whose largest logit stands for them when the best are looked for
SPARE_SLOTS = 48   # a cache begins with this many slots, and has as many free again when it is tidied


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
        old, self.used = self.used, self.used + key.shape[2]
        self.key[:, :, old:self.used], self.value[:, :, old:self.used] = key, value
        return self.key[:, :, :self.used], self.value[:, :, :self.used]

    def has_room(self, n: int) -> bool:
        return self.used + n <= self.key.shape[2]

    def keep_(self, rows: Tensor, slots: Tensor) -> None:
        """Go on with these rows (B',) and, of each, these slots (B', n)."""
        _, heads, _, D = self.key.shape
        B, self.used = slots.shape
        places = rows[:, None, None], torch.arange(heads, device=rows.device)[:, None], slots[:, None]
        old, room = (self.key, self.value), self.used + max(self.used, SPARE_SLOTS)
        self.key, self.value = new = self.key.new_empty(2, B, heads, room, D)
        for source, target in zip(old, new):
            target[:, :, :self.used] = source[places]


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
        return cls(torch.tensor(rows, device=device), torch.tensor(limits, device=device),
                   torch.full((B, 1, 1), language, device=device),
                   torch.ones(B, 1, 1, dtype=torch.bool, device=device), score[:, None],
                   torch.zeros(B, dtype=torch.long, device=device), score - math.inf)

    def keep(self, rows: Tensor, slots: Tensor) -> "Beams":
        """The hypotheses of some rows (B',), which see the cache through these of its slots (B', n)."""
        kept = Beams(*(getattr(self, field.name)[rows] for field in fields(self)))
        kept.visible = kept.visible.gather(2, slots[:, None].expand(-1, kept.visible.shape[1], -1))
        return kept


def best_tokens(hidden: Tensor, head: Tensor, count: int, room: Tensor, banned=None) -> tuple[Tensor, Tensor]:
    """The `count` largest log-probs of every row of hidden (R, H), and their tokens: two (R, count).

    Logits lie in `room` with a column for each row of hidden: on a CPU the product is faster this way round.
    banned: (tokens, rows) that may not be chosen; their share of the probability is not given to others.
    """
    R, V, exact = len(hidden), len(head), torch.promote_types(hidden.dtype, torch.float32)
    blocks = -(-V // BLOCK)
    logits = room[:blocks * BLOCK * R].view(blocks * BLOCK, R)
    logits[V:] = -math.inf
    columns = hidden.T.contiguous()
    peak, mass = hidden.new_full((R,), -math.inf, dtype=exact), hidden.new_zeros(R, dtype=exact)
    for first in range(0, V, step := HEAD_ROWS if hidden.device.type == "cpu" else V):
        part = torch.mm(head[first:first + step], columns, out=logits[first:min(first + step, V)]).to(exact)
        higher = torch.maximum(peak, part.amax(0))
        mass = mass * (peak - higher).exp_() + (part - higher).exp_().sum(0)
        peak = higher
    if banned is not None:
        logits[banned] = -math.inf
    # The best `count` tokens lie in the `count` blocks with the largest maxima.
    block = logits.view(blocks, BLOCK, R).amax(1).T.topk(min(count, blocks)).indices            # (R, count)
    tokens = (block[..., None] * BLOCK + torch.arange(BLOCK, device=block.device)).flatten(1)
    top, which = logits[tokens, torch.arange(R, device=block.device)[:, None]].topk(count)
    return top - (peak + mass.log())[:, None], tokens.gather(1, which)


def extend(state: Beams, logp: Tensor, token: Tensor, alpha: float, end: int, answers: list) -> Beams:
    """Hypotheses one token longer, given the 2K best of each, logp and token (B, K, 2K); as transformers does
    with early_stopping=True.

    A sentence's 2K best extensions are looked at: those that end among the first K are finished hypotheses,
    the best of which goes to `answers`; of the others K go on, and there are K, since a parent ends but once.
    """
    T, K = state.history.shape[2] + 1, logp.shape[2] // 2
    total, place = (logp + state.score[..., None]).flatten(1).topk(2 * K)
    parent, token = place // (2 * K), token.flatten(1).gather(1, place)                       # (B, 2K)
    last = state.limit <= T
    ends = ((token == end) | last[:, None])[:, :K] & (state.finished < K)[:, None]
    best, which = (total[:, :K] / T**alpha).masked_fill(~ends, -math.inf).max(1)
    for i in (best > state.best).nonzero()[:, 0].tolist():
        j = which[i]
        answers[state.row[i]] = state.history[i, parent[i, j]].tolist() + [token[i, j].item()]
    score, alive = total.masked_fill(token == end, -math.inf).topk(K)
    parent, token = parent.gather(1, alive), token.gather(1, alive)                           # (B, K)
    return Beams(state.row, state.limit, torch.cat([follow(state.history, parent), token[..., None]], 2),
                 follow(state.visible, parent), score, state.finished + ends.sum(1) + K * last,
                 torch.maximum(state.best, best))


def follow(x: Tensor, parent: Tensor) -> Tensor:
    """x (B, K, n) in the order of parent (B, K)."""
    return x.gather(1, parent[..., None].expand(-1, -1, x.shape[2]))


def repeats(history: Tensor, n: int) -> tuple[list[int], list[int]]:
    """(tokens, rows) that would give a hypothesis of history (B, K, T) an n-gram it has already."""
    found = [(ids[i + n - 1], row) for row, ids in enumerate(history.flatten(0, 1).tolist())
             for i in range(len(ids) - n + 1) if ids[i:i + n - 1] == ids[len(ids) - n + 1:]]
    return [token for token, _ in found], [row for _, row in found]


def remember(model: M2M100, sources: list[list[int]]) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """The decoder's memory of the sources, longest first, and its mask (B, S). Encoded in groups of like
    length, so that little of the work is padding."""
    c, B, S, device = model.config, len(sources), len(sources[0]), model.head.device
    heads = c.decoder_attention_heads
    memory = [model.head.new_zeros(2, B, heads, S, c.d_model // heads) for _ in model.model.decoder.layers]
    mask, first = torch.zeros(B, S, dtype=torch.bool, device=device), 0
    while first < B:
        length = len(sources[first])
        some = [torch.tensor(ids, device=device) for ids in sources[first:] if 4 * len(ids) >= 3 * length]
        tokens = nn.utils.rnn.pad_sequence(some, True, c.pad_token_id)
        own = nn.utils.rnn.pad_sequence([torch.ones_like(ids, dtype=torch.bool) for ids in some], True)
        rows, first = slice(first, first + len(some)), first + len(some)
        mask[rows, :length] = own
        for whole, part in zip(memory, model.memory(model.encode(tokens, own))):
            whole[0, rows, :, :length], whole[1, rows, :, :length] = part
    return [tuple(whole) for whole in memory], mask


@torch.inference_mode()
def beam_search(model: M2M100, sources: list[list[int]], language: int, limits: list[int], beams: int = 5,
                alpha: float = 1.0, no_repeat: int = 0) -> list[list[int]]:
    """The best translation of each source: ids that begin with `language` and end with the end token, unless
    limits[i] tokens did not suffice. What else is in the batch changes it by rounding alone.

    beams=1 is greedy; no_repeat=n allows no n-gram twice.
    """
    c, head, B = model.config, model.head, len(sources)
    order, answers = sorted(range(B), key=lambda i: -len(sources[i])), [[]] * B
    memory, mask = remember(model, [sources[i] for i in order])
    caches, room = [Cache(key) for key, _ in memory], head.new_empty(B * beams * (len(head) + BLOCK))
    zeros = torch.zeros(B, dtype=torch.promote_types(head.dtype, torch.float32), device=head.device)
    state = Beams.start(order, language, [limits[i] for i in order], zeros)
    model.decode(torch.full((B, 1), c.decoder_start_token_id, device=head.device), 0, memory, mask, caches)
    while True:
        tokens, place = state.history[:, :, -1], state.history.shape[2]
        own = torch.eye(tokens.shape[1], dtype=torch.bool, device=head.device).expand(len(tokens), -1, -1)
        state.visible = torch.cat([state.visible, own], 2)
        hidden = model.decode(tokens, place, memory, mask, caches, state.visible)
        banned = repeats(state.history, no_repeat) if no_repeat else None
        logp, token = best_tokens(hidden.flatten(0, 1), head, 2 * beams, room, banned)
        shape = *tokens.shape, 2 * beams
        state = extend(state, logp.view(shape), token.view(shape), alpha, c.eos_token_id, answers)
        going = (state.finished < beams).nonzero()[:, 0]
        if len(going) == 0:
            return answers
        if 8 * len(going) > 7 * len(state.row) and caches[0].has_room(beams):
            continue  # tidying copies the caches: only when it pays
        used = state.visible[going].any(1)
        slots = used.sort(descending=True, stable=True).indices[:, :int(used.sum(1).max())]
        if len(going) < len(state.row):
            mask, memory = mask[going], [(key[going], value[going]) for key, value in memory]
        state = state.keep(going, slots)
        for cache in caches:
            cache.keep_(going, slots)
