"""What the two ops compute, in plain PyTorch: the definition that every faster version is tested against.

N rows of hidden states (N, H) meet the head's weight (V, H); `targets` (N,) names the token that came next.

    logits   z = hidden @ weight.T                                       (N, V)
    log-prob logp_t = z_t[y_t] - log sum_v exp(z_t[v])                   (N,)

Plain, and greedy: several (N, V) tensors live at once. With N = 8,192 and V = 128,256 one of them is 4 GB in
fp32. `chunks.py` computes the same numbers through a buffer of a chosen size.
"""

import torch
import torch.nn.functional as F


def token_logp(hidden, weight, targets):
    """Log-prob of each target: hidden (N, H), weight (V, H), targets (N,) int64 -> (N,), at least fp32.

    Differentiable in `hidden` and `weight`, with a different upstream gradient for each token.
    """
    logits = hidden @ weight.T  # (N, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.log_softmax(logits, dim=-1).gather(1, targets[:, None]).squeeze(1)


def linear_cross_entropy(hidden, weight, targets, ignore_index=-100):
    """Mean of -token_logp over the targets that differ from `ignore_index`; nan when there are none."""
    counted = targets != ignore_index
    return -token_logp(hidden[counted], weight, targets[counted]).mean()
