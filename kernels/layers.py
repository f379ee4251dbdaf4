"""What a block computes between its products, with gradients by hand: attention over packed forks on a CPU,
RoPE, RMSNorm and SwiGLU.

The products of a small model take half of a step on a CPU, and passes over its activations the rest. Autograd
makes many of them: it scatters what was gathered, keeps what can be computed again, and differentiates every
operation on its own. Written out, a gradient is a few passes more:

    RoPE       y = R x                         dx = R^T dy, the rotation back
    RMSNorm    y = w x r,  r = 1 / rms(x)      dx = r (w dy - x r^2 mean(w dy x)),  dw = sum of dy x r
    SwiGLU     y = silu(g) u                   dg = dy u silu'(g),  du = dy silu(g)

Attention of a fork, whose prompt and continuations lie side by side in a row, needs no copy, and a long one
no mask. Each of them sees itself causally, and the continuations see all of the prompt: two pieces, o_1 and
o_2 with log-sum-exps l_1 and l_2, are one attention by

    l = log(e^l_1 + e^l_2)    o = e^(l_1 - l) o_1 + e^(l_2 - l) o_2                                   (eq. 1)

and the gradient of a piece is what FlashAttention's backward gives for it with the merged o and l, since that
computes e^(score - l) again (arXiv 2307.08691, section 3.1.2).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

SHORT = 320              # most tokens of forks that are one piece of attention
flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


# -------------------------------------------------------------------------------------------------- attention

class Span(NamedTuple):
    """A fork in the flattened rows of a batch: where it starts, and how many tokens of its prompt and of each
    continuation, which follow one another, are in the row (a continuation's last one is not)."""
    start: int
    prompt: int
    continuations: tuple[int, ...]

    @property
    def stop(self) -> int:
        return self.start + self.prompt + sum(self.continuations)

    @property
    def longest(self) -> int:
        """Tokens that the last one of the longest continuation sees, itself included."""
        return self.prompt + max(self.continuations, default=0)


class Piece(NamedTuple):
    """Queries that see keys: causally, or as a mask says, or all of them."""
    queries: slice
    keys: slice
    causal: bool = False
    mask: Tensor | None = None   # (queries, keys), added to the scores
    merge: bool = False          # the queries saw other keys before: eq. 1


def pieces_of(spans: Sequence[Span], tokens: int, header: int = 0) -> list[Piece]:
    """The pieces of attention over rows of so many tokens, whose keys begin with a header of so many. Short
    forks that follow one another are one piece with a mask: calls would take longer than what it hides."""
    pieces = []
    for group in groups_of(spans, tokens):
        row = group[0].start // tokens
        behind = header * (row + 1)                     # keys of a row stand behind its own header
        asked = slice(group[0].start, group[-1].stop)
        if len(group) > 1 or asked.stop - asked.start <= SHORT:
            pieces.append(Piece(asked, shifted(asked, behind), mask=group_mask(group)))
        else:
            pieces += long_pieces(group[0], behind)
        if header:
            first = row * (header + tokens)
            pieces.append(Piece(asked, slice(first, first + header), merge=True))
    return pieces


def groups_of(spans: Sequence[Span], tokens: int) -> list[list[Span]]:
    """Forks that follow one another in a row, SHORT tokens together at most, or a longer one alone."""
    groups = []
    for span in spans:
        last = groups[-1] if groups else None
        follows = last and last[-1].stop == span.start and span.start % tokens > 0
        if follows and span.stop - last[0].start <= SHORT:
            last.append(span)
        else:
            groups.append([span])
    return groups


def long_pieces(span: Span, behind: int) -> list[Piece]:
    """Prompt and continuations see themselves, the continuations the prompt."""
    pieces, first = [], span.start
    for length in filter(None, (span.prompt, *span.continuations)):
        own = slice(first, first + length)
        pieces.append(Piece(own, shifted(own, behind), causal=True))
        first += length
    prompt = slice(span.start, span.start + span.prompt)
    if prompt.stop < span.stop:
        pieces.append(Piece(slice(prompt.stop, span.stop), shifted(prompt, behind), merge=True))
    return pieces


def fork_predicate(fork, branch, positions=None, window=None):
    """Eq. 1 of model.py in the form FlexAttention asks: (row, head, query, key) -> may see. On grids of
    indices it is the dense mask. Padding sees itself, so that no softmax is empty."""
    def sees(b, _, q, k):
        same_fork = fork[b, q] == fork[b, k]
        in_prompt = branch[b, k] == 0
        same_branch = branch[b, k] == branch[b, q]
        padding = fork[b, q] < 0
        seen = same_fork & (k <= q) & (in_prompt | same_branch) & (~padding | (q == k))
        if window is not None:
            seen = seen & (positions[b, q] - positions[b, k] < window)
        return seen
    return sees


def group_mask(group: list[Span]) -> Tensor:
    """0 where a token of these forks sees another one, else -inf; fp32."""
    lengths, branches = [], []
    for fork, (_, prompt, continuations) in enumerate(group):
        lengths += [prompt, *continuations]
        branches += [(fork, branch) for branch in range(1 + len(continuations))]
    tokens = torch.tensor(branches).repeat_interleave(torch.tensor(lengths), dim=0)
    fork, branch = tokens.T[:, None]                                             # (1, T) each
    order = torch.arange(fork.shape[1])
    seen = fork_predicate(fork, branch)(0, None, order[:, None], order)
    return torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)


def shifted(places: slice, by: int) -> slice:
    return slice(places.start + by, places.stop + by)


def heads_first(x: Tensor) -> Tensor:
    """(tokens, heads, D) as the kernel takes it: (1, heads, tokens, D); sums (tokens, heads) likewise."""
    return x.transpose(0, 1)[None]


class ForkAttention(Function):
    """q (B T, Q, D) over k and v (B K, G, D) in pieces; G kv heads serve Q / G query heads each. Returns
    (B T, Q, D), zeros where no piece has the query (padding)."""

    @staticmethod
    def forward(ctx, q, k, v, pieces):
        wide = torch.promote_types(q.dtype, torch.float32)
        result = torch.zeros_like(q)
        lse = torch.zeros(q.shape[:2], dtype=wide)
        for queries, keys, causal, mask, merge in pieces:
            given = [q[queries], k[keys], v[keys]]
            mask = None if mask is None else mask.to(q.dtype)
            found, sums = flash(*map(heads_first, given), 0.0, causal, attn_mask=mask)
            found = found[0].transpose(0, 1)                                     # (queries, Q, D)
            sums = sums[0].T                                                     # (queries, Q)
            if merge:                                                            # eq. 1
                before = lse[queries]
                total = torch.logaddexp(before, sums)
                found = found * (sums - total).exp()[..., None].to(q.dtype)
                found += result[queries] * (before - total).exp()[..., None].to(q.dtype)
                sums = total
            result[queries] = found
            lse[queries] = sums
        ctx.save_for_backward(q, k, v, result, lse)
        ctx.pieces = pieces
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        *saved, lse = ctx.saved_tensors
        dtype = grad.dtype
        # In at least fp32: over bf16 the kernel is slower.
        q, k, v, result, grad = (x.to(lse.dtype) for x in (*saved, grad))
        dq = torch.zeros_like(q)
        dk = torch.zeros_like(k)
        dv = torch.zeros_like(v)
        for queries, keys, causal, mask, _ in ctx.pieces:
            given = [grad[queries], q[queries], k[keys], v[keys], result[queries], lse[queries]]
            mask = None if mask is None else mask.to(q.dtype)
            found = flash_backward(*map(heads_first, given), 0.0, causal, attn_mask=mask)
            for total, at, part in zip((dq, dk, dv), (queries, keys, keys), found):
                total[at] += part[0].transpose(0, 1)
        return dq.to(dtype), dk.to(dtype), dv.to(dtype), None


# --------------------------------------------------------------------------------------------------- the rest
# No Function below writes in place: torch.compile would give the inputs of one that does a gradient of zero,
# without a word (torch 2.11; its issue 180642).

class NoContext:
    """What `forward` is given where no gradient is wanted."""

    def save_for_backward(self, *tensors: Tensor) -> None:
        pass


class LayerFunction(Function):
    """A Function that autograd hears of only where a gradient is wanted: `apply` takes longer than what is
    computed for one token."""

    @classmethod
    def call(cls, *inputs):
        if torch.is_grad_enabled():
            return cls.apply(*inputs)
        return cls.forward(NoContext(), *inputs)


class Rotate(LayerFunction):
    """RoPE of x (B, T, heads, D): channel i turns with channel i + D/2. cos, sin (B, T, 1, D), the first half
    of sin negated. D is even: a roll by half of it swaps the halves."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return torch.addcmul(grad * cos, grad.roll(grad.shape[-1] // 2, dims=-1), -sin), None, None


class RMSNormFunction(LayerFunction):
    """x / rms(x) * weight over the last axis, the mean square in at least fp32 (arXiv 1910.07467), rounded as
    transformers rounds: before the weight. Keeps x and 1 / rms(x)."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        inverse = torch.rsqrt(norm * norm / x.shape[-1] + eps)
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).to(x.dtype) * weight

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, inverse = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            weighted = grad * weight.to(inverse.dtype)
            slope = (weighted * x).mean(-1, keepdim=True) * inverse ** 3
            grad_x = torch.addcmul(weighted * inverse, x, -slope).to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * (x * inverse)).flatten(0, -2).sum(0).to(weight.dtype)
        return grad_x, grad_weight, None


class SwiGLU(LayerFunction):
    """silu(gate) * up, any equal shapes. Keeps its two inputs and nothing else: plain autograd keeps
    silu(gate) as well, a fifth of all that a block keeps."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)
