"""The two ops as PyTorch sees them: custom ops, opaque to torch.compile, and their gradients.

Cost, in matrix products of 2NHV FLOPs each, forward + backward:

                          no gradient   frozen head   trainable head
    token_logp                 1             2        3; 4 where the signs (N, V) pass `keep_bytes`
    linear_cross_entropy       1             2        3
    reference.py               1             2        3, with several (N, V) tensors in memory

A trainable head is dearer in `token_logp` because its gradient sums over tokens, each times a gradient that
is not known before the backward. `linear_cross_entropy` knows it beforehand (-1/n), and needs to keep
nothing.

Each op is three functions: the computation, its shapes for the compiler ("fake"), its gradient. An empty
tensor stands for a gradient that nobody wants, since an op must return the same number of tensors every time.
"""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from .chunks import accumulation_dtype, chunk_rows, chunks, matmul_add_, matmul_into, tile_words

KEEP_BYTES = 2500 * 10**6  # of signs, for the gradient of a trainable head: 8,192 rows of 151,936 in bf16


@cache
def backend_for(device_type, dtype=torch.float32):
    """The row step for a device type ("cpu", "cuda", ...) and a dtype of hidden: "triton" or "torch".

    Triton where there is a GPU and Triton; float64, which is for checks, is left to torch.
    """
    if device_type == "cuda" and dtype != torch.float64 and find_spec("triton"):
        return "triton"
    return "torch"


def token_logp(hidden, weight, targets, *, chunk_bytes=0, keep_bytes=KEEP_BYTES, backend=""):
    """Log-prob of each target: hidden (N, H), weight (V, H), targets (N,) int64 -> (N,), fp32 or float64.

    Differentiable in hidden and weight, with any upstream gradient (N,). `chunk_bytes` bounds the buffer of
    logits (0: the default of the device; 240 * 10**6 on a GPU keeps all that 8,192 rows of width 4,096 take
    below 320 MB), `keep_bytes` what a trainable head keeps for its backward. `backend` "" is what
    `backend_for` says. A target outside 0..V-1 raises RuntimeError (on a GPU, a device-side assertion).
    """
    check(hidden, weight, targets)
    sign_bytes = hidden.shape[0] * weight.shape[0] * weight.dtype.itemsize
    hidden_grad = wants_gradient(hidden)
    keep = wants_gradient(weight) and sign_bytes <= keep_bytes
    logp, _, _ = logp_op(hidden, weight, targets, hidden_grad, keep, chunk_bytes, backend)
    return logp


def linear_cross_entropy(hidden, weight, targets, ignore_index=-100, *, chunk_bytes=0, backend=""):
    """Mean of -token_logp over the targets that differ from `ignore_index`; nan when there are none.

    Ignored rows cost as much time as the others: leave them out beforehand where you can.
    """
    check(hidden, weight, targets)
    hidden_grad = wants_gradient(hidden)
    weight_grad = wants_gradient(weight)
    loss, _, _ = mean_nll_op(hidden, weight, targets, ignore_index,
                             hidden_grad, weight_grad,
                             chunk_bytes, backend)
    return loss


def check(hidden, weight, targets):
    assert hidden.ndim == 2 and weight.ndim == 2 and hidden.shape[1] == weight.shape[1], (
        f"hidden must be (N, H) and weight (V, H), got {tuple(hidden.shape)} and {tuple(weight.shape)}")
    assert weight.shape[0] > 1, "a vocabulary of one token leaves nothing to predict"
    assert hidden.dtype == weight.dtype, f"hidden is {hidden.dtype}, weight {weight.dtype}: cast one"
    assert targets.shape == hidden.shape[:1] and targets.dtype == torch.int64, (
        f"targets must be ({hidden.shape[0]},) int64, got {tuple(targets.shape)} {targets.dtype}")


def wants_gradient(tensor):
    return torch.is_grad_enabled() and tensor.requires_grad


def walk(hidden, weight, targets, hidden_grad, weight_grad, chunk_bytes, backend):
    """`chunks`, after a check of the targets without a host sync: on a GPU it fails in the stream."""
    N = hidden.shape[0]
    V = weight.shape[0]
    inside = (targets >= 0) & (targets < V)
    torch._assert_async(inside.all(), f"a target is outside 0..{V - 1}")
    rows = chunk_rows(N, V, hidden.dtype, hidden.device, chunk_bytes)
    backend = backend or backend_for(hidden.device.type, hidden.dtype)
    return chunks(hidden, weight, targets, rows, backend, hidden_grad, weight_grad)


def direction_into(out, scale, weight, targets, product):
    """out (C, H) <- scale (C,) * (weight[y] - product), eq. 5 where scale = 1 - p_y; rounded once."""
    torch.sub(weight[targets], product, out=product)  # product is used up
    torch.mul(product, scale[:, None], out=out)


def operator(name):
    """`torch.library.custom_op` without the wrapper that imports the compiler at the first call:
    2 s, 150 MB."""
    def register(function):
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(f"clo::{name}", schema)
        torch.library.impl(f"clo::{name}", "default", function)
        return getattr(torch.ops.clo, name).default
    return register


@operator("token_logp")
def logp_op(hidden: Tensor, weight: Tensor, targets: Tensor,
            hidden_grad: bool, keep: bool,
            chunk_bytes: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """logp (N,); directions (N, H) if hidden_grad, else empty; signs (N, V) if keep, else empty."""
    logp, direction, kept = logp_fake(hidden, weight, targets, hidden_grad, keep, chunk_bytes, backend)
    walked = walk(hidden, weight, targets, hidden_grad, keep, chunk_bytes, backend)
    for part, chunk_logp, product, tiles in walked:
        logp[part] = chunk_logp
        if hidden_grad:
            scale = -chunk_logp.expm1()  # eq. 3
            direction_into(direction[part], scale, weight, targets[part], product)
        for words, signs in tiles:
            kept[part, words] = signs
    return logp, direction, kept


@torch.library.register_fake("clo::token_logp")
def logp_fake(hidden, weight, targets, hidden_grad, keep, chunk_bytes, backend):
    N, H = hidden.shape
    V = weight.shape[0]
    logp = hidden.new_empty(N, dtype=accumulation_dtype(hidden.dtype))
    direction = hidden.new_empty(N if hidden_grad else 0, H)
    signs = hidden.new_empty(N if keep else 0, V)
    return logp, direction, signs


@operator("token_logp_backward")
def logp_backward_op(hidden: Tensor, weight: Tensor, targets: Tensor,
                     logp: Tensor, kept: Tensor, grad: Tensor,
                     chunk_bytes: int, backend: str) -> Tensor:
    """Gradient of the head (V, H): signs (kept, or computed again) times hidden times grad, over tokens."""
    scale = grad * logp.expm1()
    scaled = (hidden * scale[:, None]).to(hidden.dtype)  # (N, H)
    total = weight.new_zeros(weight.shape, dtype=logp.dtype)
    if kept.shape[0] == hidden.shape[0]:
        for words in tile_words(weight.shape[0], weight.device):
            matmul_into(total[words], kept[:, words].T, scaled)
        return total.to(weight.dtype)
    walked = walk(hidden, weight, targets, False, True, chunk_bytes, backend)
    for part, _, _, tiles in walked:
        for words, signs in tiles:
            matmul_add_(total[words], signs.T, scaled[part])
    return total.to(weight.dtype)


@torch.library.register_fake("clo::token_logp_backward")
def logp_backward_fake(hidden, weight, targets, logp, kept, grad, chunk_bytes, backend):
    return torch.empty_like(weight)


def logp_save(ctx, inputs, output):
    """What the backward needs. With a frozen head: the directions, nothing else."""
    hidden, weight, targets, ctx.hidden_grad, _, ctx.chunk_bytes, ctx.backend = inputs
    logp, direction, kept = output
    ctx.mark_non_differentiable(direction, kept)
    ctx.set_materialize_grads(False)
    ctx.weight_grad = ctx.needs_input_grad[1]
    saved = (hidden, weight, targets, logp, kept) if ctx.weight_grad else ()
    ctx.save_for_backward(direction, *saved)


def logp_gradient(ctx, grad, _direction, _kept):
    direction, *saved = ctx.saved_tensors
    grad_hidden = grad_weight = None
    if ctx.hidden_grad:
        # Not in place: a second backward may come.
        grad_hidden = torch.mul(direction, grad[:, None], out=torch.empty_like(direction))
    if ctx.weight_grad:
        grad_weight = logp_backward_op(*saved, grad, ctx.chunk_bytes, ctx.backend)
    return grad_hidden, grad_weight, *[None] * 5


torch.library.register_autograd("clo::token_logp", logp_gradient, setup_context=logp_save)


@operator("linear_cross_entropy")
def mean_nll_op(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int,
                hidden_grad: bool, weight_grad: bool,
                chunk_bytes: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (); its gradient by hidden (N, H) and by weight (V, H), each empty where it is not wanted."""
    loss, grad_hidden, grad_weight = mean_nll_fake(hidden, weight, targets, ignore_index, hidden_grad,
                                                   weight_grad, chunk_bytes, backend)
    counted = targets != ignore_index
    number = counted.sum().clamp(min=1)
    share = counted.to(loss.dtype) / number  # (N,): of each token in the mean
    total = torch.zeros_like(grad_weight, dtype=loss.dtype)
    loss = torch.where(counted.any(), loss.zero_(), torch.nan)
    targets = targets.where(counted, 0)
    walked = walk(hidden, weight, targets, hidden_grad, weight_grad, chunk_bytes, backend)
    for part, logp, product, tiles in walked:
        loss -= (share[part] * logp).sum()
        scale = share[part] * logp.expm1()  # of -logp: share * -(1 - p_y)
        if hidden_grad:
            direction_into(grad_hidden[part], scale, weight, targets[part], product)
        if weight_grad:
            scaled = (hidden[part] * -scale[:, None]).to(hidden.dtype)
            for words, signs in tiles:
                matmul_add_(total[words], signs.T, scaled)
    return loss, grad_hidden, total.to(weight.dtype)


@torch.library.register_fake("clo::linear_cross_entropy")
def mean_nll_fake(hidden, weight, targets, ignore_index, hidden_grad, weight_grad, chunk_bytes, backend):
    N, H = hidden.shape
    V = weight.shape[0]
    loss = hidden.new_empty((), dtype=accumulation_dtype(hidden.dtype))
    grad_hidden = hidden.new_empty(N if hidden_grad else 0, H)
    grad_weight = weight.new_empty(V if weight_grad else 0, H)
    return loss, grad_hidden, grad_weight


def mean_nll_save(ctx, inputs, output):
    *_, ctx.hidden_grad, ctx.weight_grad, _, _ = inputs
    _, *gradients = output
    ctx.mark_non_differentiable(*gradients)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*gradients)


def mean_nll_gradient(ctx, grad, _grad_hidden, _grad_weight):
    grad_hidden, grad_weight = ctx.saved_tensors
    by_hidden = grad_hidden * grad if ctx.hidden_grad else None
    by_weight = grad_weight * grad if ctx.weight_grad else None
    return by_hidden, by_weight, *[None] * 6


torch.library.register_autograd("clo::linear_cross_entropy", mean_nll_gradient, setup_context=mean_nll_save)
