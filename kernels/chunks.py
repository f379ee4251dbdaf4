"""The walk over chunks of rows that every op shares, and its row step in plain PyTorch.

The whole difficulty is V. A row of logits is as long as the vocabulary, so (N, V) never exists here: a chunk
of C rows goes through one (C, V) buffer, is turned in place into the gradient of its log-probs, and is
overwritten by the next chunk.

The math, for one row z with target y. Split the vocabulary into the target and *the others*:

    a = max_{v != y} z_v          s = sum_{v != y} exp(z_v - a)
    log_odds = (z_y - a) - log s  = log( p_y / (1 - p_y) )                                            (1)
    logp     = logsigmoid(log_odds)                                                                   (2)
    1 - p_y  = -expm1(logp)                                                                           (3)
    d logp / dz_v = (1 - p_y) * { +1 if v = y, -q_v otherwise },   q_v = exp(z_v - a) / s             (4)

So cross-entropy is logistic regression of the target against everybody else. Why not z_y - logsumexp(z), and
1 - exp(logp)? With p_y = 0.9999999 both subtract two nearly equal numbers and keep no digit; here the small
quantity is summed directly (s) and never comes from a difference. In (4) the braces hold an exact one and a
distribution that sums to one, so nothing cancels even when they are rounded to bf16.

With signs = -{braces} (C, V):

    d logp_t / d hidden_t = -(1 - p_y) * signs_t @ weight = direction_t                               (5)

It does not depend on the gradient g_t that will arrive at logp_t, so it is computed at once, while the logits
are in the buffer, and the backward only scales it by g_t: two matrix products in all, none of them twice.
"""

import torch
import torch.nn.functional as F

GPU_CHUNK_BYTES = 1200 * 10**6  # of fp32 logits: 2,048 rows of 128,256
CPU_CHUNK_ROWS = 256  # with fewer, streaming `weight` from memory for each chunk becomes the cost
ROW_MULTIPLE = 8  # matrix products like round sizes


def accumulation_dtype(dtype):
    """float64 stays float64 (exactness tests); everything else computes logits and sums in fp32."""
    return torch.promote_types(dtype, torch.float32)


def chunk_rows(n_rows, n_vocab, dtype, device, chunk_bytes):
    """Rows C of a chunk: the (C, V) buffer fits `chunk_bytes` (0: the device's default), chunks are even."""
    row_bytes = n_vocab * accumulation_dtype(dtype).itemsize
    default = GPU_CHUNK_BYTES // row_bytes if device.type == "cuda" else CPU_CHUNK_ROWS
    most = max(1, (chunk_bytes // row_bytes if chunk_bytes else default) // ROW_MULTIPLE) * ROW_MULTIPLE
    n_chunks = max(1, -(-n_rows // most))
    return -(-max(1, n_rows) // (ROW_MULTIPLE * n_chunks)) * ROW_MULTIPLE


def matmul_into(out, a, b):
    """out (fp32 or float64) <- a @ b. On a GPU the product of bf16 matrices is never rounded to bf16."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return out.copy_(torch.mm(a, b))


def matmul_add_(total, a, b):
    """total (fp32 or float64) += a @ b, not rounded on the way: a sum of chunks in bf16 stops growing."""
    if a.dtype == total.dtype:
        return total.addmm_(a, b)
    if a.is_cuda:
        return torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    return total.addmm_(a.to(total.dtype), b.to(total.dtype))


def row_step_(logits, targets, dtype):
    """Eq. 1 and 4 for a chunk: overwrites logits (C, V); returns log_odds (C,) and signs (C, V) in `dtype`.

    `dtype` None: the log-odds only, and signs is None.
    """
    columns = targets[:, None]
    target_logit = logits.gather(1, columns)
    logits.scatter_(1, columns, -torch.inf)  # leaves the others only
    most = logits.amax(1, keepdim=True)
    torch.softmax(logits, 1, out=logits)
    # The largest entry of this softmax is exp(a - a) / s: minus its log is log s, to the last digit.
    log_odds = ((target_logit - most) + logits.amax(1, keepdim=True).log()).squeeze(1)
    return log_odds, None if dtype is None else logits.scatter_(1, columns, -1.0).to(dtype)


def chunks(hidden, weight, targets, rows, backend, gradient):
    """Yield (part, logp, signs) for each chunk: a slice of N, eq. 2 (C,), the signs of eq. 5 (C, V) or None.

    `signs` lives in the one buffer: use it before asking for the next chunk. A short last chunk is padded,
    because the bits of a row of a matrix product depend on how many rows are multiplied.
    """
    step = row_step_
    if backend == "triton":
        from .rows import row_step_ as step  # needs triton, which not every machine has
    buffer = hidden.new_empty(rows, len(weight), dtype=accumulation_dtype(hidden.dtype))  # (C, V)
    for start in range(0, len(hidden), rows):
        part = slice(start, min(start + rows, len(hidden)))
        size = part.stop - part.start
        x, y = F.pad(hidden[part], (0, 0, 0, rows - size)), F.pad(targets[part], (0, rows - size))
        matmul_into(buffer, x, weight.T)
        log_odds, signs = step(buffer, y, hidden.dtype if gradient else None)
        yield part, F.logsigmoid(log_odds[:size]), signs[:size] if gradient else None
