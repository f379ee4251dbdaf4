"""Lesson 3, forks, packing, masks: write the bodies.

    python -m pytest docs/lessons/exercises/test_lesson_3.py       # what is still open?
"""


def mask(fork, branch, positions, window=None):
    """Which token sees which, (B, T, T) bool: [b, q, k] is True if token q of row b sees token k.

    fork, branch, positions: (B, T). The three conditions of the lesson. With a window, q sees only tokens
    whose position is less than `window` before its own. Padding (fork -1) sees itself and nothing else.
    """
    raise NotImplementedError("exercise 3.1 is open")


def predictions(prompt, continuations):
    """(row_index, targets, sequence) of one fork, as lists of ints.

    The row is: the prompt, then every continuation *without its last token*, end to end. row_index: the
    places in that row that predict; targets: the tokens they have to predict; sequence: the continuation
    each belongs to, counted from 0.
    """
    raise NotImplementedError("exercise 3.2 is open")


def shared(prompt, continuations):
    """(tokens, pairs) that a fork saves against a plain causal sequence for each continuation.

    prompt: its length; continuations: a list of lengths. tokens: of the rows. pairs: of (q, k) where q
    sees k.
    """
    raise NotImplementedError("exercise 3.3 is open")
