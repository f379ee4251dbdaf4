"""token_logp and linear_cross_entropy: the head and its loss without ever holding (N, V) logits."""

from . import reference
from .ops import backend_for, linear_cross_entropy, token_logp

__all__ = ["backend_for", "linear_cross_entropy", "reference", "token_logp"]
