"""Lesson 5, LoRA: write the bodies.

    python -m pytest docs/lessons/exercises/test_lesson_5.py       # what is still open?

W (out, in) is frozen; A (R, in) and B (out, R) learn.
"""


def lora_gradients(x, W, A, B, scale, grad_y):
    """The gradients of x, A and B of y = W x + scale B (A x), shaped like x, A and B.

    x: (N, in), a row for each token. grad_y: (N, out), the gradient of y. By hand, without autograd, and
    without any new matrix of (out, in): on a large model that would be as large as what LoRA saves.
    """
    raise NotImplementedError("exercise 5.1 is open")


def to_lora(before, after, rank):
    """(A, B) for which B A, with scale 1, is the matrix of that rank nearest to after - before.

    before, after: (out, in). Nearest: by the sum of the squared differences. rank: at most min(out, in).
    """
    raise NotImplementedError("exercise 5.2 is open")


def join(first, second):
    """(A, B), whose B A with scale 1 is the sum of what two adapters add to a weight.

    first, second: (A, B, scale) each; their ranks may differ. The new rank is the sum of theirs.
    """
    raise NotImplementedError("exercise 5.3 is open")
