"""What the exercises of lesson 5 have to fulfil."""

import pytest
import torch
from lesson_5 import join, lora_gradients, to_lora
from torch.utils._python_dispatch import TorchDispatchMode

N, IN, OUT, R = 3, 20, 30, 2


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


class Largest(TorchDispatchMode):
    """Remembers the most numbers that any new tensor had."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view:
            self.numbers = max(self.numbers, result.numel())
        return result


def example():
    return random(N, IN), random(OUT, IN), random(R, IN), random(OUT, R), 0.5, random(N, OUT)


def test_1_lora_gradients():
    x, W, A, B, scale, grad_y = example()
    leaves = [tensor.clone().requires_grad_() for tensor in (x, A, B)]
    y = leaves[0] @ W.T + scale * leaves[0] @ leaves[1].T @ leaves[2].T
    y.backward(grad_y)
    found = lora_gradients(x, W, A, B, scale, grad_y)
    for gradient, leaf in zip(found, leaves, strict=True):
        torch.testing.assert_close(gradient, leaf.grad)


def test_1_lora_gradients_make_no_large_matrix():
    inputs = example()
    with Largest() as largest:
        lora_gradients(*inputs)
    assert largest.numbers < OUT * IN


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_2_to_lora(rank):
    """Against Eckart and Young: what is left are the singular values that were left out."""
    before, after = random(8, 11), random(8, 11, seed=1)
    A, B = to_lora(before, after, rank)
    assert A.shape == (rank, 11) and B.shape == (8, rank)
    left = (after - before - B @ A).square().sum()
    smallest = torch.linalg.svdvals(after - before)[rank:].square().sum()
    torch.testing.assert_close(left, smallest, rtol=1e-6, atol=1e-12)


def test_3_join():
    first = random(2, 7), random(5, 2), 0.5
    second = random(3, 7), random(5, 3), 4.0
    A, B = join(first, second)
    assert A.shape == (5, 7) and B.shape == (5, 5)
    wanted = 0.5 * first[1] @ first[0] + 4.0 * second[1] @ second[0]
    torch.testing.assert_close(B @ A, wanted)
