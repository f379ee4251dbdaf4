"""The two ops as PyTorch sees them: custom ops (no graph break under torch.compile) with their gradients.

FLOPs, in matrix products of 2NHV each (forward + backward):

                          no gradient   frozen head   trainable head
    token_logp                 1             2        3, or 4 where keeping the signs would pass `keep_bytes`
    linear_cross_entropy       1             2        3
    reference.py               1             2        3, and several (N, V) tensors in memory

`linear_cross_entropy` knows the gradient of each token (-1/n) in its forward, so nothing needs keeping.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

from .chunks import accumulation_dtype, chunk_rows, chunks, matmul_add_, matmul_into

KEEP_BYTES = 4 * 10**9  # of signs (N, V) kept for the weight's gradient: 8,192 rows of 151,936 in bf16 pass


def backend_for(device):
    """Name of the row step used on `device`: "triton" on a GPU that has it, else "torch". Worth printing."""
    return "triton" if device.type == "cuda" and find_spec("triton") else "torch"


def token_logp(hidden, weight, targets, *, chunk_bytes=0, keep_bytes=KEEP_BYTES, backend=None):
    """Log-prob of each target: hidden (N, H), weight (V, H), targets (N,) int64 -> (N,) fp32 (float64 for float64).

    Differentiable in hidden and weight, with any upstream gradient (N,). `chunk_bytes` bounds the logits buffer
    (0: the default of the device), `keep_bytes` what a trainable head may keep for its backward.
    A target outside 0..V-1 raises RuntimeError (on a GPU: a device-side assertion).
    """
    check(hidden, weight, targets)
    hidden_grad, weight_grad = wants_gradient(hidden), wants_gradient(weight)
    keep = weight_grad and hidden.shape[0] * weight.shape[0] * weight.dtype.itemsize <= keep_bytes
    backend = backend or backend_for(hidden.device)
    return _token_logp(hidden, weight, targets, hidden_grad, keep, chunk_bytes, backend)[0]


def linear_cross_entropy(hidden, weight, targets, ignore_index=-100, *, chunk_bytes=0, backend=None):
    """Mean of -token_logp over the targets that differ from `ignore_index`: a scalar; nan when there are none.

    Ignored rows cost as much as the others: leave them out beforehand where you can.
    """
    check(hidden, weight, targets)
    return _linear_cross_entropy(hidden, weight, targets, ignore_index, wants_gradient(hidden), wants_gradient(weight),
                                 chunk_bytes, backend or backend_for(hidden.device))[0]


def check(hidden, weight, targets):
    assert hidden.ndim == 2 and weight.ndim == 2 and hidden.shape[1] == weight.shape[1], \
        f"hidden must be (N, H) and weight (V, H), got {tuple(hidden.shape)} and {tuple(weight.shape)}"
    assert targets.shape == hidden.shape[:1], f"targets must be (N,), got {tuple(targets.shape)}"
    assert hidden.dtype == weight.dtype, f"hidden is {hidden.dtype}, weight is {weight.dtype}: cast one"
    assert targets.dtype == torch.int64, f"targets must be int64, got {targets.dtype}"
    assert weight.shape[0] > 1, "a vocabulary of one token has nothing to predict"


def wants_gradient(tensor):
    return torch.is_grad_enabled() and tensor.requires_grad


def assert_in_vocabulary(targets, n_vocab):
    """No host sync: on a GPU the check runs in the stream and fails there."""
    torch._assert_async(((targets >= 0) & (targets < n_vocab)).all(), f"a target is outside 0..{n_vocab - 1}")


def direction_into(out, signs, weight, logp):
    """Eq. 5 for one chunk: out (C, H) <- -(1 - p_y) * signs @ weight, rounded to out's dtype once."""
    product = out.new_empty(out.shape, dtype=logp.dtype)
    torch.mul(matmul_into(product, signs, weight), logp.expm1()[:, None], out=out)


@torch.library.custom_op("clo::token_logp", mutates_args=())
def _token_logp(hidden: Tensor, weight: Tensor, targets: Tensor, hidden_grad: bool, keep: bool, chunk_bytes: int,
                backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """logp (N,); direction (N, H) if hidden_grad, else empty; signs (N, V) if keep, else empty."""
    (N, H), V = hidden.shape, weight.shape[0]
    assert_in_vocabulary(targets, V)
    logp = hidden.new_empty(N, dtype=accumulation_dtype(hidden.dtype))
    direction = hidden.new_empty(N if hidden_grad else 0, H)
    kept = hidden.new_empty(N if keep else 0, V)
    rows = chunk_rows(N, V, hidden.dtype, hidden.device, chunk_bytes)
    for part, chunk_logp, signs in chunks(hidden, weight, targets, rows, backend, hidden_grad or keep):
        logp[part] = chunk_logp
        if hidden_grad:
            direction_into(direction[part], signs, weight, chunk_logp)
        if keep:
            kept[part] = signs
    return logp, direction, kept


@_token_logp.register_fake
def _(hidden, weight, targets, hidden_grad, keep, chunk_bytes, backend):
    (N, H), V = hidden.shape, weight.shape[0]
    return (hidden.new_empty(N, dtype=accumulation_dtype(hidden.dtype)), hidden.new_empty(N if hidden_grad else 0, H),
            hidden.new_empty(N if keep else 0, V))


@torch.library.custom_op("clo::token_logp_backward", mutates_args=())
def _token_logp_backward(hidden: Tensor, weight: Tensor, targets: Tensor, logp: Tensor, direction: Tensor,
                         kept: Tensor, grad: Tensor, hidden_grad: bool, weight_grad: bool, chunk_bytes: int,
                         backend: str) -> tuple[Tensor, Tensor]:
    """Gradient of hidden (N, H) and of weight (V, H), each empty where it is not wanted; `grad` is (N,)."""
    N, V = hidden.shape[0], weight.shape[0]
    grad_hidden, grad_weight = torch.empty_like(direction), weight.new_empty(0)
    if hidden_grad:
        torch.mul(direction, grad[:, None], out=grad_hidden)  # not in place: a retained graph may come back
    if weight_grad:
        total = weight.new_zeros(weight.shape, dtype=logp.dtype)
        scaled = (hidden * (grad * logp.expm1())[:, None]).to(hidden.dtype)
        if kept.shape[0] == N:
            matmul_into(total, kept.T, scaled)
        else:
            rows = chunk_rows(N, V, hidden.dtype, hidden.device, chunk_bytes)
            for part, _, signs in chunks(hidden, weight, targets, rows, backend, True):
                matmul_add_(total, signs.T, scaled[part])
        grad_weight = total.to(weight.dtype)
    return grad_hidden, grad_weight


@_token_logp_backward.register_fake
def _(hidden, weight, targets, logp, direction, kept, grad, hidden_grad, weight_grad, chunk_bytes, backend):
    return torch.empty_like(direction), torch.empty_like(weight) if weight_grad else weight.new_empty(0)


def _save_token_logp(ctx, inputs, output):
    hidden, weight, targets, ctx.hidden_grad, _, ctx.chunk_bytes, ctx.backend = inputs
    logp, direction, kept = output
    ctx.mark_non_differentiable(direction, kept)
    ctx.weight_grad = ctx.needs_input_grad[1]
    empty = hidden.new_empty(0)
    ctx.save_for_backward(*((hidden, weight, targets) if ctx.weight_grad else (empty, empty, empty)), logp, direction,
                          kept)


def _differentiate_token_logp(ctx, grad, _direction, _kept):
    grad_hidden, grad_weight = _token_logp_backward(*ctx.saved_tensors, grad, ctx.hidden_grad, ctx.weight_grad,
                                                    ctx.chunk_bytes, ctx.backend)
    return (grad_hidden if ctx.hidden_grad else None, grad_weight if ctx.weight_grad else None,
            None, None, None, None, None)


_token_logp.register_autograd(_differentiate_token_logp, setup_context=_save_token_logp)


@torch.library.custom_op("clo::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, hidden_grad: bool,
                          weight_grad: bool, chunk_bytes: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (); its gradient by hidden (N, H) and by weight (V, H), each empty where it is not wanted."""
    (N, H), V = hidden.shape, weight.shape[0]
    counted = targets != ignore_index
    targets = targets.where(counted, 0)
    assert_in_vocabulary(targets, V)
    wide = accumulation_dtype(hidden.dtype)
    scale = counted.to(wide) / counted.sum()  # (N,): the weight of each token in the mean
    loss = hidden.new_zeros((), dtype=wide)
    if N == 0:
        loss += torch.nan
    grad_hidden = hidden.new_empty(N if hidden_grad else 0, H)
    total = weight.new_zeros((V if weight_grad else 0, H), dtype=wide)
    rows = chunk_rows(N, V, hidden.dtype, hidden.device, chunk_bytes)
    for part, logp, signs in chunks(hidden, weight, targets, rows, backend, hidden_grad or weight_grad):
        loss -= scale[part] @ logp
        if hidden_grad:
            direction_into(grad_hidden[part], signs, weight, logp)
            grad_hidden[part] *= -scale[part, None]
        if weight_grad:
            factor = -(scale[part] * logp.expm1())[:, None]
            matmul_add_(total, signs.T, (hidden[part] * factor).to(hidden.dtype))
    return loss, grad_hidden, total.to(weight.dtype)


@_linear_cross_entropy.register_fake
def _(hidden, weight, targets, ignore_index, hidden_grad, weight_grad, chunk_bytes, backend):
    (N, H), V = hidden.shape, weight.shape[0]
    return (hidden.new_empty((), dtype=accumulation_dtype(hidden.dtype)),
            hidden.new_empty(N if hidden_grad else 0, H), weight.new_empty(V if weight_grad else 0, H))


def _save_linear_cross_entropy(ctx, inputs, output):
    _, grad_hidden, grad_weight = output
    ctx.mark_non_differentiable(grad_hidden, grad_weight)
    ctx.hidden_grad, ctx.weight_grad = inputs[4], inputs[5]
    ctx.save_for_backward(grad_hidden, grad_weight)


def _differentiate_linear_cross_entropy(ctx, grad, _grad_hidden, _grad_weight):
    grad_hidden, grad_weight = ctx.saved_tensors
    return (grad_hidden * grad if ctx.hidden_grad else None, grad_weight * grad if ctx.weight_grad else None,
            None, None, None, None, None, None)


_linear_cross_entropy.register_autograd(_differentiate_linear_cross_entropy, setup_context=_save_linear_cross_entropy)
