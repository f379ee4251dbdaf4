"""Lesson 4, log-softmax in tiles: write the bodies. Equations are those of kernels/chunks.py.

    python -m pytest docs/lessons/exercises/test_lesson_4.py       # what is still open?
"""


def row_step(logits, targets):
    """(target_logit, most, total, q): what a tile of logits (C, U) tells. The first three are (C, 1), q is
    (C, U).

    targets (C,) count from the tile's first word; one below 0 or from U on lies in another tile.
    target_logit: the target's logit, -inf if it is not in this tile.
    most, total: a and s of eq. 1, over the words of the tile that are not the target.
    q: eq. 4, exp(z - most) / total, and 0 at the target.
    Use amax, exp and sum; `logits` may be overwritten.
    """
    raise NotImplementedError("exercise 4.1 is open")


def head_gradient(hidden, weight, targets, grad, words):
    """Gradient (V, H) of sum(grad * logp) by the head, logp (N,) being the log-probs of the targets.

    hidden (N, H), weight (V, H), targets (N,), grad (N,). Tiles of `words` words: never more than (N, words)
    logits at once. Walk twice: first m and s of every row, then the gradient of each tile's rows of the head.
    """
    raise NotImplementedError("exercise 4.3 is open")
