"""The walk over tiles of logits that every op shares, and the step on one tile in plain PyTorch.

The whole difficulty is V. A row of logits is as long as the vocabulary, so (N, V) never exists here: a tile
of C rows and U words of the vocabulary is multiplied out, turned in place into the gradient of its log-probs,
used, and overwritten by the next tile.

The math, for one row z with target y. Split the vocabulary into the target and *the others*:

    a = max_{v != y} z_v          s = sum_{v != y} exp(z_v - a)
    log_odds = (z_y - a) - log s  = log( p_y / (1 - p_y) )                                            (1)
    logp     = logsigmoid(log_odds)                                                                   (2)
    1 - p_y  = -expm1(logp)                                                                           (3)
    d logp / dz_v = (1 - p_y) * { +1 if v = y, -q_v otherwise },   q_v = exp(z_v - a) / s, q_y = 0    (4)

So cross-entropy is logistic regression of the target against everybody else. Why not z_y - logsumexp(z), and
1 - exp(logp)? With p_y = 0.9999999 both subtract two nearly equal numbers and keep no digit; here the small
quantity is summed directly (s) and never comes from a difference. In (4) the braces hold an exact one and a
distribution that sums to one, so nothing cancels even when q is rounded to bf16.

    d logp_t / d hidden_t = (1 - p_y) * (weight[y] - q_t @ weight)                                    (5)

It does not depend on the gradient g_t that will arrive at logp_t, so it is computed at once, while the logits
are at hand, and the backward only scales it by g_t: two matrix products in all, none of them twice.

Two tiles of the same rows, (a, s, q) over some words and (b, t, r) over others, merge as if they were one:

    m = max(a, b)     s' = s exp(a - m),  t' = t exp(b - m)     share = t' / (s' + t')
    the whole:  (m, s' + t', [(1 - share) q, share r])                                                (6)

so q @ weight of the whole is the weighted mean of the tiles' products, and nobody needs two tiles at once.

How large is a tile? On a GPU it is as wide as the vocabulary (U = V, nothing to merge): matrix products want
many rows, and there is room. A CPU takes all rows, but few words at once: the tile, and the piece of `weight`
it came from, are then still in the cache when the second product wants them.
"""

from functools import lru_cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

GPU_CHUNK_BYTES = 1200 * 10**6  # of fp32 logits (C, V): 8,192 rows of 128,256 in four chunks
CPU_CHUNK_ROWS = 512
CPU_TILE_WORDS = 16384  # with CPU_CHUNK_ROWS and fp32: 32 MB
ROW_MULTIPLE = 8  # matrix products like round sizes


class Tile(NamedTuple):
    """What C rows of logits tell about the words `words` of the vocabulary; numbers are (C, 1)."""
    words: slice
    target_logit: Tensor  # -inf where the target is not among the words
    most: Tensor  # a of eq. 1
    total: Tensor  # s of eq. 1
    q: Tensor | None  # (C, U), eq. 4, in the memory where the logits were; None where nobody wants it
    norm: Tensor | None  # what q has still to be divided by; None: nothing


def accumulation_dtype(dtype):
    """float64 stays float64 (exactness tests); everything else computes logits and sums in fp32."""
    return torch.promote_types(dtype, torch.float32)


def chunk_rows(n_rows, n_vocab, dtype, device, chunk_bytes):
    """Rows C of a chunk: logits (C, V) would fit `chunk_bytes` (0: the device's default), chunks are even.

    Narrower tiles would leave room for more rows, but C decides the last bits of a row's log-prob, and these
    must not depend on which gradients are wanted (a trainable head's alone needs all tiles at once).
    """
    row_bytes = n_vocab * accumulation_dtype(dtype).itemsize
    default = GPU_CHUNK_BYTES // row_bytes if device.type == "cuda" else CPU_CHUNK_ROWS
    most = max(1, (chunk_bytes // row_bytes if chunk_bytes else default) // ROW_MULTIPLE) * ROW_MULTIPLE
    n_chunks = max(1, -(-n_rows // most))
    return -(-max(1, n_rows) // (ROW_MULTIPLE * n_chunks)) * ROW_MULTIPLE


def tile_words(n_vocab, device):
    """The slices of the vocabulary that the tiles take: all of it on a GPU, even pieces on a CPU."""
    n_tiles = 1 if device.type == "cuda" else -(-n_vocab // CPU_TILE_WORDS)
    edges = [n_vocab * i // n_tiles for i in range(n_tiles + 1)]
    return [slice(start, stop) for start, stop in zip(edges, edges[1:])]


@lru_cache
def cpu_multiplies_bf16():
    """Whether the CPU has units for matrices of bf16 (AMX), which are much faster than fp32."""
    return torch.backends.mkldnn.is_available() and torch.cpu._is_amx_tile_supported()


def rounds(a):
    """Whether matmul_into sums products with `a` in fp32 and rounds the sums to bf16: a CPU's units for bf16
    give nothing else."""
    return a.dtype == torch.bfloat16 and a.device.type == "cpu" and cpu_multiplies_bf16()


def matmul_into(out, a, b):
    """out (fp32 or float64) <- a @ b. On a GPU the product of bf16 matrices is never rounded to bf16."""
    if rounds(a):
        return out.copy_(a @ b)
    if a.is_cuda and a.dtype != out.dtype:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def matmul_add_(total, a, b):
    """total (fp32 or float64) += a @ b, not rounded on the way: a sum of chunks in bf16 stops growing."""
    if a.is_cuda and a.dtype != total.dtype:
        return torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    return total.addmm_(a.to(total.dtype), b.to(total.dtype))


def column_of(targets, n_words):
    """(column (C, 1), inside (C, 1)): where each target lies in a tile; any column where it does not."""
    inside = (targets >= 0) & (targets < n_words)
    return targets.clamp(0, n_words - 1)[:, None], inside[:, None]


def row_step_(logits, targets, dtype, gradient):
    """Overwrites a tile of logits (C, U); returns (target_logit, most, total, q, norm) as `Tile` has them.

    `targets` (C,) count from the tile's first word and may lie outside. q is of `dtype`, and there only if a
    `gradient` is wanted; the other three have the same bits either way.
    """
    column, inside = column_of(targets, logits.shape[1])
    logit = logits.gather(1, column)
    logits.scatter_(1, column, logit.masked_fill(inside, -torch.inf))  # leaves the others only
    most = logits.amax(1, keepdim=True)
    torch.softmax(logits, 1, out=logits)
    total = logits.amax(1, keepdim=True).reciprocal()  # the largest q is exp(a - a) / s
    target_logit = logit.masked_fill(~inside, -torch.inf)
    return target_logit, most, total, logits.to(dtype) if gradient else None, None


def merge(rows, tile):
    """Eq. 6: (what `rows`, the tiles so far, and one more tell together; the share of the new one (C, 1))."""
    most = torch.maximum(rows.most, tile.most)
    old = rows.total * (rows.most - most).exp()
    new = tile.total * (tile.most - most).exp()
    words = slice(rows.words.start, tile.words.stop)
    target_logit = torch.maximum(rows.target_logit, tile.target_logit)
    return Tile(words, target_logit, most, old + new, None, None), new / (old + new)


def softmax_product(tile, weight):
    """q @ weight of a tile (C, H), with q's division by `norm` where it still has to come."""
    product = tile.total.new_empty(len(tile.q), weight.shape[1])
    matmul_into(product, tile.q, weight[tile.words])
    return product if tile.norm is None else product.div_(tile.norm)


def signs_(tile, rows, targets):
    """Minus the braces of eq. 4 for a tile of `rows`, (C, U), written over the tile's own q."""
    if tile.words != rows.words:
        tile.q.mul_(tile.total * (tile.most - rows.most).exp() / rows.total)
    if tile.norm is not None:
        tile.q.div_(tile.norm)
    column, inside = column_of(targets - tile.words.start, tile.q.shape[1])
    return tile.q.scatter_(1, column, tile.q.gather(1, column).masked_fill(inside, -1.0))


def chunk(x, weight, targets, memory, step, hidden_grad, weight_grad):
    """One chunk, x (C, H), tile by tile: (the whole rows as a `Tile`; q @ weight (C, H) if hidden_grad, else
    None; its tiles if weight_grad, else an empty list).

    Tiles lie at the beginning of `memory`, one over the other; those to be returned one after the other.
    """
    C = len(x)
    rows, product, kept = None, None, []
    for words in tile_words(len(weight), x.device):
        start = C * words.start if weight_grad else 0
        logits = memory[start:start + C * (words.stop - words.start)].view(C, -1)  # (C, U)
        matmul_into(logits, x, weight[words].T)
        tile = Tile(words, *step(logits, targets - words.start))
        part = softmax_product(tile, weight) if hidden_grad else None
        if rows is None:
            rows, product = tile, part
        else:
            rows, share = merge(rows, tile)
            product = product.lerp_(part, share) if hidden_grad else None
        if weight_grad:
            kept.append(tile)
    return rows, product, kept


def row_step_of(backend):
    """The row step of "torch" or "triton"."""
    if backend == "torch":
        return row_step_
    from . import rows  # needs triton, which not every machine has
    return rows.row_step_


def chunks(hidden, weight, targets, n_rows, backend, hidden_grad, weight_grad):
    """Yield (part, logp, product, signs) for each chunk, a slice `part` of the N rows.

    logp (C,) is eq. 2; product (C, H), if hidden_grad, the q @ weight of eq. 5; signs, if weight_grad, a list
    of (words, (C, U)) in one memory for all chunks: use them before asking for the next. A short last chunk
    is padded, because the bits of a row of a matrix product depend on how many rows are multiplied.
    """
    N, V = len(hidden), len(weight)
    step = partial(row_step_of(backend), dtype=weight.dtype, gradient=hidden_grad or weight_grad)
    widest = max(words.stop - words.start for words in tile_words(V, hidden.device))
    width = V if weight_grad else widest
    memory = hidden.new_empty(n_rows * width, dtype=accumulation_dtype(hidden.dtype))
    for start in range(0, N, n_rows):
        part = slice(start, min(start + n_rows, N))
        C = part.stop - part.start
        x = F.pad(hidden[part], (0, 0, 0, n_rows - C))
        y = F.pad(targets[part], (0, n_rows - C))
        rows, product, tiles = chunk(x, weight, y, memory, step, hidden_grad, weight_grad)
        target_logit = rows.target_logit
        if rounds(x):  # the errors of all others average out in their sum, this one would not
            target_logit = (x.float() * weight[y].float()).sum(1, keepdim=True)
        log_odds = (target_logit - rows.most) - rows.total.log()  # eq. 1
        signs = [(tile.words, signs_(tile, rows, y)[:C]) for tile in tiles]
        yield part, F.logsigmoid(log_odds)[:C, 0], product[:C] if hidden_grad else None, signs
