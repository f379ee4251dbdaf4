"""Lesson 5, solved."""

import torch


def lora_gradients(x, W, A, B, scale, grad_y):
    """The chain rule, thin side first: grad_y B has R columns, and so has A x. Neither B A nor the gradient
    of W is made."""
    down = scale * grad_y @ B                                # (N, R): the gradient of A x
    grad_x = grad_y @ W + down @ A
    grad_A = down.T @ x
    grad_B = scale * grad_y.T @ (x @ A.T)
    return grad_x, grad_A, grad_B


def to_lora(before, after, rank):
    """The largest singular values with their directions. How u, s and v are shared between A and B does not
    matter for the product; half of s to each keeps them of one size."""
    u, s, v = torch.linalg.svd(after - before, full_matrices=False)
    root = s[:rank].sqrt()
    return root[:, None] * v[:rank], u[:, :rank] * root


def join(first, second):
    """[B1 B2] times A1 above A2 is B1 A1 + B2 A2. The scales differ, so they move into B. Adding A to A and
    B to B instead would add B1 A2 and B2 A1 as well."""
    (A1, B1, scale1), (A2, B2, scale2) = first, second
    return torch.cat([A1, A2]), torch.cat([scale1 * B1, scale2 * B2], dim=1)
