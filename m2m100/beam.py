"""Beam search over M2M100 and NLLB, as transformers does it. Ids in, ids out; tokenizer.py has the text.

    beam_search(model, sources=[[8215, 52, 907, 2]], language=8277, limits=[60])

    source: [lang] pieces [eos]      target: [eos] [lang] pieces [eos], the first two are given       (eq. 3)
    score of a finished hypothesis = sum of its log-probs / (its tokens after the first)^alpha        (eq. 4)

Nearly all of beam search's time is matrix products over B K rows, most of all the head's. So a sentence's
keys and values are kept once for all of its beams, beams that change their parent move nothing, and the
head's logits are made a part at a time, each read while it is in cache. Finished hypotheses stay on the
device: the CPU waits for it once a step, to learn which sentences go on.
"""

import math
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from m2m100.network import M2M100

HEAD_ROWS = 512        # of the head in one product on a CPU: their logits stay in the cores' caches
CAST_ROWS = 1 << 14    # on other devices: rows of a bf16 head that are fp32 at one time
BLOCK = 32             # tokens that are first compared by the largest of their logits alone
SPARE_SLOTS = 48       # that are free in a new cache, and again once slots that nobody sees were dropped


class Cache:
    """Keys and values of one decoder layer. Every token a beam tries has a slot: (2, B, heads, slots, D).

    Hypotheses form a tree. A beam that changes its parent copies nothing: a mask says which slots are its
    ancestors, and all beams of a sentence read the sentence's slots in one attention call.
    """

    def __init__(self, key: Tensor):
        """Room for tokens with keys like `key` (B, heads, any, D)."""
        B, heads, _, D = key.shape
        self.kept = key.new_empty(2, B, heads, SPARE_SLOTS, D)
        self.used = 0

    def append_(self, key: Tensor, value: Tensor) -> Tensor:
        """Take in key, value (B, heads, n, D) of n new tokens; give all so far, (2, B, heads, used, D)."""
        new = slice(self.used, self.used + key.shape[2])
        self.kept[0, :, :, new] = key
        self.kept[1, :, :, new] = value
        self.used = new.stop
        return self.kept[..., :self.used, :]

    def has_room(self, n: int) -> bool:
        return self.used + n <= self.kept.shape[3]

    def keep_(self, rows: Tensor, slots: Tensor) -> None:
        """Go on with these rows (B',) and, of each, these slots (B', n)."""
        _, _, heads, _, D = self.kept.shape
        B, self.used = slots.shape
        old = self.kept
        room = self.used + max(self.used, SPARE_SLOTS)
        self.kept = old.new_empty(2, B, heads, room, D)
        head = torch.arange(heads, device=rows.device)
        chosen = rows[:, None, None], head[:, None], slots[:, None]  # (B', heads, n)
        for side, kept in zip(old, self.kept):
            kept[:, :, :self.used] = side[chosen]


@dataclass
class Beams:
    """The hypotheses of B sentences, K of each (one before the first step); done sentences lose their row."""
    row: Tensor        # (B,) index of the sentence
    limit: Tensor      # (B,) most tokens it may have, the language token included
    history: Tensor    # (B, K, T) its tokens after the first
    visible: Tensor    # (B, K, slots) which of the cache's slots are ancestors of the hypothesis
    score: Tensor      # (B, K) sum of log-probs
    finished: Tensor   # (B,) how many of its hypotheses have ended; from K on the sentence is done
    best: Tensor       # (B,) eq. 4 of the best of those

    def keep(self, rows: Tensor, slots: Tensor) -> "Beams":
        """The hypotheses of some rows (B',), which see the cache through these of its slots (B', n)."""
        chosen = {field.name: getattr(self, field.name)[rows] for field in fields(self)}
        kept = Beams(**chosen)
        K = kept.visible.shape[1]
        seen = slots[:, None].expand(-1, K, -1)
        kept.visible = kept.visible.gather(2, seen)
        return kept

    def see_themselves_(self) -> None:
        """The next K slots of the cache are those of the K newest tokens."""
        B, K, _ = self.visible.shape
        own = torch.eye(K, dtype=torch.bool, device=self.visible.device)
        own = own.expand(B, -1, -1)
        self.visible = torch.cat([self.visible, own], dim=2)


# ---- a step ----

def fill_logits_(logits: Tensor, hidden: Tensor, head: Tensor) -> Tensor:
    """Logits (V, R), of at least fp32, of hidden (R, H); their log-sum-exp (R,).

    The sum is kept as in an online softmax: m = max so far, s = sum of exp(logit - m); a part with a higher
    maximum m' makes it s exp(m - m') + sum of exp(logit - m').
    """
    columns = hidden.T.contiguous().to(logits.dtype)
    mass = logits.new_zeros(len(hidden))
    peak = mass - math.inf
    rows = HEAD_ROWS if head.device.type == "cpu" else CAST_ROWS
    for weights, part in zip(head.split(rows), logits.split(rows)):
        torch.mm(weights.to(logits.dtype), columns, out=part)
        higher = torch.maximum(peak, part.amax(0))
        mass *= (peak - higher).exp_()
        shares = (part - higher).exp_()
        mass += shares.sum(0)
        peak = higher
    return peak + mass.log()


def best_tokens(hidden: Tensor, head: Tensor, count: int, room: Tensor,
                banned: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """The `count` largest log-probs of every row of hidden (R, H), and their tokens: two (R, count).

    Logits lie in `room` with a column for each row of hidden: on a CPU the product is faster this way round.
    banned: tokens (R, n) and which of them (R, n) may not be chosen; their share of the probability is not
    given to others.
    """
    R = len(hidden)
    V = len(head)
    blocks = -(-V // BLOCK)
    logits = room[:blocks * BLOCK * R].view(blocks * BLOCK, R)
    logits[V:] = -math.inf
    total = fill_logits_(logits[:V], hidden, head)
    row = torch.arange(R, device=hidden.device)[:, None]
    if banned is not None:
        tokens, bans = banned
        penalty = logits.new_zeros(bans.shape).masked_fill_(bans, -math.inf)
        places = tokens, row.expand_as(tokens)
        logits.index_put_(places, penalty, accumulate=True)
    # The best `count` tokens lie in the `count` blocks with the largest maxima.
    peaks = logits.view(blocks, BLOCK, R).amax(1)
    block = peaks.T.topk(min(count, blocks)).indices  # (R, count)
    inside = torch.arange(BLOCK, device=hidden.device)
    tokens = block[..., None] * BLOCK + inside
    tokens = tokens.flatten(1)
    top, which = logits[tokens, row].topk(count)
    return top - total[:, None], tokens.gather(1, which)


def extend(state: Beams, logp: Tensor, token: Tensor, alpha: float, end: int, answers: Tensor) -> Beams:
    """Hypotheses one token longer, given the 2K best of each, logp and token (B K, 2K); as transformers does
    with early_stopping=True.

    A sentence's 2K best extensions are looked at: those that end among the first K are finished hypotheses,
    the best of which goes to its row of `answers` (sentences, longest), over a shorter one. Of the others the
    best K go on. There are K: each parent has one extension by the end token, so at most K of the 2K end.
    """
    B, parents, T = state.history.shape
    most = logp.shape[1]
    K = most // 2
    sums = logp.view(B, parents, most) + state.score[..., None]
    total, place = sums.flatten(1).topk(most)
    parent = place // most  # (B, 2K)
    token = token.view(B, -1).gather(1, place)

    last = state.limit <= T + 1
    open_ = state.finished < K
    ends = (token == end) | last[:, None]
    ends = ends[:, :K] & open_[:, None]
    mean = total[:, :K] / (T + 1)**alpha  # eq. 4
    mean = mean.masked_fill(~ends, -math.inf)
    best, which = mean.max(1, keepdim=True)
    ended = longer(state, parent, token, which)[:, 0]
    before = answers[state.row, :T + 1]
    answers[state.row, :T + 1] = torch.where(best > state.best[:, None], ended, before)

    unended = total.masked_fill(token == end, -math.inf)
    score, alive = unended.topk(K)
    return replace(state,
                   history=longer(state, parent, token, alive),
                   visible=follow(state.visible, parent.gather(1, alive)),
                   score=score,
                   finished=state.finished + ends.sum(1) + K * last,  # at its limit a sentence is done
                   best=torch.maximum(state.best, best[:, 0]))


def longer(state: Beams, parent: Tensor, token: Tensor, which: Tensor) -> Tensor:
    """The tokens (B, any, T + 1) of some extensions: `which` (B, any) of parent and token (B, 2K)."""
    history = follow(state.history, parent.gather(1, which))
    newest = token.gather(1, which)
    return torch.cat([history, newest[..., None]], dim=2)


def follow(x: Tensor, parent: Tensor) -> Tensor:
    """x (B, K, n) in the order of parent (B, any)."""
    n = x.shape[2]
    return x.gather(1, parent[..., None].expand(-1, -1, n))


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

def encode(model: M2M100, sources: list[list[int]]) -> tuple[Tensor, Tensor]:
    """The sources, longest first, encoded (B, S, H), and their mask (B, S). In groups of like length, so that
    little of the work is padding."""
    S = len(sources[0])
    pad = model.config.pad_token_id
    hidden = []
    masks = []
    while sources:
        longest = len(sources[0])
        group = [torch.tensor(ids) for ids in sources if 4 * len(ids) >= 3 * longest]
        sources = sources[len(group):]
        tokens = pad_sequence(group, True, pad).to(model.head.device)
        mask = tokens != pad
        encoded = model.encode(tokens, mask)
        hidden.append(F.pad(encoded, (0, 0, 0, S - longest)))
        masks.append(F.pad(mask, (0, S - longest)))
    return torch.cat(hidden), torch.cat(masks)


class Search:
    """The sentences of a batch that still go on."""

    def __init__(self, model: M2M100, sources: list[list[int]], language: int, limits: list[int],
                 exact: torch.dtype):
        order = sorted(range(len(sources)), key=lambda i: -len(sources[i]))
        encoded, self.mask = encode(model, [sources[i] for i in order])
        self.model = model
        self.memory = model.memory(encoded)
        self.caches = [Cache(key) for key, _ in self.memory]
        B = len(sources)
        row = torch.tensor(order, device=encoded.device)
        limit = torch.tensor(limits, device=encoded.device)
        score = encoded.new_zeros(B, 1, dtype=exact)
        self.state = Beams(row=row,
                           limit=limit[row],
                           history=row.new_full((B, 1, 1), language),
                           visible=row.new_ones(B, 1, 1, dtype=torch.bool),
                           score=score,
                           finished=torch.zeros_like(row),
                           best=score[:, 0] - math.inf)
        start = torch.full_like(row, model.config.decoder_start_token_id)
        model.decode(start[:, None], 0, self.memory, self.mask, self.caches)

    def hidden(self) -> Tensor:
        """What the decoder makes of the newest token of every hypothesis, (B, K, H)."""
        state = self.state
        state.see_themselves_()
        place = state.history.shape[2]
        newest = state.history[:, :, -1]
        return self.model.decode(newest, place, self.memory, self.mask, self.caches, state.visible)

    def keep_(self, going: Tensor) -> None:
        """Drop all sentences but these rows (B',), and the slots that nobody sees."""
        if len(going) < len(self.mask):
            self.mask = self.mask[going]
            self.memory = [(key[going], value[going]) for key, value in self.memory]
        slots = used_slots(self.state.visible[going])
        self.state = self.state.keep(going, slots)
        for cache in self.caches:
            cache.keep_(going, slots)


@torch.inference_mode()
def beam_search(model: M2M100, sources: list[list[int]], language: int, limits: list[int], beams: int = 5,
                alpha: float = 1.0, no_repeat: int = 0) -> list[list[int]]:
    """The best translation of each source: ids that begin with `language` and end with the end token, unless
    limits[i] tokens did not suffice. What else is in the batch changes it by rounding alone.

    beams=1 is greedy; no_repeat=n allows no n-gram twice. Log-probs and their sums are of at least fp32,
    whatever the model's type.
    """
    end = model.config.eos_token_id
    head = model.head
    exact = torch.promote_types(head.dtype, torch.float32)
    search = Search(model, sources, language, limits, exact)
    answers = search.state.row.new_full((len(sources), max(limits) + 1), -1)  # -1 behind their ends
    columns = len(sources) * beams
    room = head.new_empty(columns * (len(head) + BLOCK), dtype=exact)
    while True:
        hidden = search.hidden()
        history = search.state.history.flatten(0, 1)
        banned = repeats(history, no_repeat) if no_repeat else None
        logp, token = best_tokens(hidden.flatten(0, 1), head, 2 * beams, room, banned)
        search.state = extend(search.state, logp, token, alpha, end, answers)

        going = (search.state.finished < beams).nonzero()[:, 0]  # waits for the device, once a step
        if len(going) == 0:
            return [ids[:ids.index(-1)] for ids in answers.tolist()]
        # To drop sentences copies the caches: that pays when an eighth of them is done, or no slot is free.
        few = 8 * len(going) <= 7 * len(search.mask)
        if few or not search.caches[0].has_room(beams):
            search.keep_(going)


def used_slots(visible: Tensor) -> Tensor:
    """The slots (B, n) that the hypotheses of a sentence see by visible (B, K, slots). A sentence with fewer
    of them than another gets some that it does not see."""
    used = visible.any(1)
    used_first = used.sort(descending=True, stable=True).indices
    most = int(used.sum(1).max())
    return used_first[:, :most]
