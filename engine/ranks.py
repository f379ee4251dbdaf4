"""Data parallel over many processes: what is needed when torchrun starts a command on several devices.

    torchrun --nproc-per-node 2 clo.py --lang sw                   every rank holds the model
    torchrun --nproc-per-node 8 clo.py --lang sw --shard           the ranks share it (PyTorch's FSDP2)

Work is dealt to ranks item by item (rank r takes r, r + size, ...) and gathered in order, so a result does
not depend on how many ranks there are beyond floating-point summation order. What is not dealt, all ranks do
alike, and the first one writes. Started without torchrun there is one rank, and every function here is the
identity.

Sharded, a parameter is a DTensor of which each rank keeps a slice of the rows. `forward` gathers a block's
weights when it comes to it and drops them after, on all ranks at once: so all of them call the model equally
often, which `deal` sees to.
"""

import os
import sys
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import model as llama
from engine import files
from engine.files import InputError, first_line
from formats.weights import read_tensors

LONGEST_WAIT = timedelta(days=1)             # ranks wait while the first one reads and writes


def pick_device(name: str) -> str:
    """The device that "auto" means, or the one named; InputError when it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if torch.backends.mps.is_available():
            print("device: an Apple GPU is there, but MPS has not passed the tests; using the CPU "
                  "(--device mps tries it)")
    # CUDA's allocator reads this when it starts: the buffer of logits grows with the rows, in place.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:              # the variable's older name
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    try:
        torch.empty(1, device=own_device(name))  # not every rank on the first GPU: half a GB there for each
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name} cannot be used ({first_line(error)}): try --device auto") from None
    return name


def pick_dtype(name: str, device) -> str:
    """The compute type that "auto" means where a model only answers or translates, or the one named.
    Training, which takes longer, measures first which one is faster (scale.fastest_dtype)."""
    if name != "auto":
        return name
    return "bf16" if torch.device(device).type == "cuda" else "fp32"


def own_device(name: str) -> str:
    """A rank's own GPU where many share the work."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if name.startswith("cuda") and "RANK" in os.environ else name


def start(device: str) -> torch.device:
    """Join the other processes; this one's device: its own GPU of `device` cuda.
    Only the first rank prints."""
    own = torch.device(own_device(device))
    if "RANK" in os.environ:
        cuda = own.type == "cuda"
        dist.init_process_group("nccl" if cuda else "gloo", timeout=LONGEST_WAIT)
        if rank():
            sys.stdout = open(os.devnull, "w", encoding="utf-8")
        if cuda:
            torch.cuda.set_device(own)
    return own


def fix_order_of_sums() -> None:
    """Have CUDA add in one order every time, so that a resumed run equals an undisturbed one
    and the first rewards are 0.

    Otherwise two of our ops add by atomics, in any order: `index_add` (log-probs of a continuation) and the
    gradient of `index_select` (the last prompt token predicts the first of every continuation).
    FlexAttention, the products and the kernels use none. Known to differ all the same: FlexAttention compiled
    with max-autotune, which is not asked for here.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")       # read when cuBLAS starts
    torch.utils.deterministic.fill_uninitialized_memory = False       # memory nobody wrote is never read here
    torch.use_deterministic_algorithms(True, warn_only=True)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def deal(items: int) -> list[tuple[int, bool]]:
    """This rank's share of range(items), as (index, True). Where other ranks have one more, the last is (0,
    False): to be done like the rest, since a sharded model needs every rank (else this one would only wait),
    and not to be counted."""
    rounds = -(-items // size())
    share = range(rank(), rounds * size(), size())
    return [(i, True) if i < items else (0, False) for i in share]


def gather(own: list) -> list:
    """All items in order, on every rank, from every rank's results for its share."""
    if size() == 1:
        return own
    shares: list = [None] * size()
    dist.all_gather_object(shares, own)
    return [shares[i % size()][i // size()] for i in range(sum(map(len, shares)))]


def gather_tensors(own: list[tuple]) -> list[tuple]:
    """gather of tuples of tensors, which several ranks exchange on the CPU."""
    if size() == 1:
        return own
    on_cpu = []
    for part in own:
        on_cpu.append(tuple(tensor.cpu() for tensor in part))
    return gather(on_cpu)


def barrier() -> None:
    gather([None])


def sum_gradients_(parameters) -> None:
    """All-reduce: replace every gradient by its sum over ranks, in one message. Sharded ones were summed
    during the backward."""
    gradients = [parameter.grad for parameter in parameters if not is_sharded(parameter)]
    if size() == 1 or not gradients:
        return
    flat = parameters_to_vector(gradients)
    dist.all_reduce(flat)
    vector_to_parameters(flat, gradients)


def largest(number: int, device: torch.device) -> int:
    """The largest of every rank's number: how one rank's signal becomes everybody's."""
    if size() == 1:
        return number
    value = torch.tensor(number, device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


def on_first(work: Callable):
    """work() done by the first rank alone; every rank gets its result. No model may be called in it. When it
    fails on bad input or a full disk the first rank says why, and the others leave with it."""
    if size() == 1:
        return work()
    result, failed = None, None
    if rank() == 0:
        try:
            result = work()
        except (ValueError, OSError) as error:
            failed = error
    message = [result, failed is not None]
    dist.broadcast_object_list(message)
    if failed:
        raise failed
    if message[1]:
        sys.exit(2)
    return message[0]


# ---------------------------------------------------------------------------------------------- shared models

def is_sharded(tensor: Tensor) -> bool:
    """A DTensor, told by its method: importing the class takes a second."""
    return hasattr(tensor, "to_local")


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor: all of it, unless it is sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """The tensor gathered from all ranks, which all call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def load(path, device, dtype: torch.dtype, shard: bool = True, prepare: Callable = lambda model: None,
         recompute: bool = False, compiler=None, adapter=None) -> llama.Llama:
    """model.load, and with `shard` the parameters spread over all ranks, of which none ever holds more than
    its share and one tensor: the model is made without memory, sharded, and each rank then reads its own rows
    from the files. A sharded model is not compiled: FSDP's hooks break the graphs.

    prepare(model) chooses what learns, before the sharding; what it makes itself, in memory (LoRA's factors,
    which are small), is replicated on every rank.
    """
    if not shard:
        model = llama.load(path, device, dtype, adapter, recompute, compiler)
        prepare(model)
        return model
    assert dist.is_initialized(), "there are no ranks to share the model: torchrun starts them"
    model, weights, names = llama.open_checkpoint(path, dtype, recompute)
    model.requires_grad_(False).eval().to(dtype)
    prepare(model)
    shard_(model)
    parameters = dict(model.named_parameters())
    tensors = read_tensors(weights, names, adapter, lambda name: own_rows(parameters[name]))
    for name, tensor in tensors:
        own = tensor.to(device, parameters[name].dtype, copy=True)
        give_rows_(model, name, parameters[name], own)
    return model


def own_rows(parameter: Tensor) -> slice:
    """Which rows of a sharded parameter this rank keeps: all ranks but the last ones have as many
    (torch.chunk)."""
    rows = -(-parameter.shape[0] // size())
    first = min(rank() * rows, parameter.shape[0])
    return slice(first, first + parameter.to_local().shape[0])


def give_rows_(model, name: str, parameter: Tensor, rows: Tensor) -> None:
    """Give a sharded parameter without memory its rows."""
    from torch.distributed.tensor import DTensor
    filled = DTensor.from_local(rows, parameter.device_mesh, parameter.placements, run_check=False,
                                shape=parameter.shape, stride=parameter.stride())
    module, _, attribute = name.rpartition(".")
    learned = torch.nn.Parameter(filled, requires_grad=parameter.requires_grad)
    setattr(model.get_submodule(module), attribute, learned)


def shard_(model: llama.Llama) -> None:
    """FSDP2: every block is a group, the embedding, the last norm and the head are one.

    Parameters that have memory are left alone. Gradients of ranks are summed, since the loss is already
    divided by what the whole step counts. A block gathers trainable weights in the compute dtype, to which
    `forward` would cast them anyway, and sums gradients in their own. The last group stays gathered from
    forward to backward: `head` is used in between.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
    mesh = init_device_mesh("cuda" if dist.get_backend() == "nccl" else "cpu", (size(),))
    replicated = {parameter for parameter in model.parameters() if not parameter.is_meta}
    compute = model.compute_dtype
    policy = MixedPrecisionPolicy(param_dtype=compute, cast_forward_inputs=False,
                                  reduce_dtype=torch.promote_types(compute, torch.float32))
    for block in model.model["layers"]:
        fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=replicated)
    fully_shard(model, mesh=mesh, reshard_after_forward=False, ignored_params=replicated)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)            # gloo knows no other


# --------------------------------------------------------------------------------------- leaving all together

def run(main: Callable) -> None:
    """files.run(main). A rank that fails says so at once, and torchrun ends the others, which may be waiting
    for it inside a library."""
    def work():
        try:
            main()
        except RuntimeError as error:
            if "by peer" not in str(error):  # gloo's words for a rank that is gone
                raise
            raise InputError("the connection to another rank broke: it failed, or was killed, for want of "
                             "memory perhaps; the same command goes on from the last checkpoint") from None
    files.run(work)
