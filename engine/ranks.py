"""Many processes, one result: what clo.py and translate.py need when torchrun starts them on several devices.

    torchrun --nproc-per-node 2 clo.py --lang sw                   every rank holds the model
    torchrun --nproc-per-node 8 clo.py --lang sw --shard           the ranks share it (PyTorch's FSDP2)

Work is dealt to ranks item by item (rank r takes r, r + size, ...) and collected in order, so a result does
not depend on how many ranks there are beyond floating-point summation order. Files are written by the first
rank alone. Started without torchrun there is one rank, and every function here is the identity.

Sharded, a parameter is a DTensor of which each rank keeps a slice of the rows. `forward` puts a block
together when it comes to it and drops it after, on all ranks at once: so all of them call the model equally
often. `deal` sees to that where work is shared, `on_first` where the first rank works alone (answers,
exports): it tells the others what to join.
"""

import os
import sys
import threading
from collections.abc import Callable, Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

import model as llama
from engine import files
from engine.files import InputError
from formats.weights import add_update, read_adapter

LONGEST_WAIT = timedelta(days=1)             # ranks wait while the first one translates or answers
FORWARD = ""                                 # what the first rank tells others to join, if not a parameter
LONGEST_RUN = timedelta(days=365)
FAILED = "clo/failed"                        # key in torchrun's store: the first rank that failed


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
    own = name + ":" + os.environ["LOCAL_RANK"] if name == "cuda" and "RANK" in os.environ else name
    try:
        torch.empty(1, device=own)               # not every rank on the first GPU: half a GB there for each
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name} cannot be used ({str(error).splitlines()[0]}): "
                             f"try --device auto") from None
    return name


def start(device: str) -> torch.device:
    """Join the other processes; this one's device: its own GPU of `device` cuda.
    Only the first rank prints."""
    if "RANK" not in os.environ:
        return torch.device(device)
    cuda = device.startswith("cuda")
    dist.init_process_group("nccl" if cuda else "gloo", timeout=LONGEST_WAIT)
    if rank():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if cuda else device)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def mine(items: list) -> list:
    """This rank's share of a list that every rank has."""
    return items[rank()::size()]


def deal(items: int) -> list[tuple[int, bool]]:
    """This rank's share of range(items), as (index, True). Where other ranks have one more, the last is (0,
    False): to be done like the rest, since a sharded model needs every rank (else this one would only wait),
    and not to be counted."""
    return [(i, True) if i < items else (0, False) for i in range(rank(), items + -items % size(), size())]


def collect(own: list) -> list:
    """The whole list, in order, from every rank's results for its share."""
    if size() == 1:
        return own
    shares: list = [None] * size()
    dist.all_gather_object(shares, own)
    return [shares[i % size()][i // size()] for i in range(sum(map(len, shares)))]


def wait_for_all() -> None:
    collect([None])


def sum_gradients_(parameters) -> None:
    """Replace every gradient by its sum over ranks, in one message. Sharded ones were summed during the
    backward."""
    parameters = [parameter for parameter in parameters if not is_sharded(parameter)]
    if size() == 1 or not parameters:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([parameter.grad.reshape(-1) for parameter in parameters])
    dist.all_reduce(flat)
    for parameter, part in zip(parameters, flat.split([parameter.numel() for parameter in parameters])):
        parameter.grad = part.view_as(parameter)


def largest(number: int, device: torch.device) -> int:
    """The largest of every rank's number: how one rank's signal becomes everybody's."""
    if size() == 1:
        return number
    value: Tensor = torch.tensor(number, device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


# -------------------------------------------------------------------------------------------- the first alone

def on_first(work: Callable, model=None):
    """work() done by the first rank alone; every rank gets its result, or raises its error.

    A sharded model that work() calls, or parameters of it that work() reads through `Whole`, are named here:
    the other ranks then join each of those calls. They do so without a gradient, and the model is called from
    nowhere else meanwhile.
    """
    if size() == 1:
        return work()
    if hasattr(model, "reshard"):
        model.reshard()                      # `forward` left the head gathered, perhaps not on all ranks
    if rank():
        parameters = {} if model is None else dict(model.named_parameters())
        while isinstance(told := tell(None), str):
            join(model, parameters, told)
    else:
        told = tell(lead(work, model))
    if told[1] is not None:
        raise told[1]
    return told[0]


def lead(work: Callable, model) -> tuple:
    """work()'s result and None, or None and its error.
    The other ranks hear of every call of a sharded model."""
    def announce(*_) -> None:                # a hook that returned something would change the model's input
        tell(FORWARD)
    hooks = [model.register_forward_pre_hook(announce, prepend=True)] if hasattr(model, "reshard") else []
    try:
        return work(), None
    except (ValueError, OSError) as error:
        return None, error
    finally:
        for hook in hooks:
            hook.remove()


def tell(message):
    """What the first rank says, on every rank; the others' argument counts for nothing."""
    told = [message]
    dist.broadcast_object_list(told, src=0)
    return told[0]


@torch.no_grad()
def join(model, parameters: dict[str, Tensor], told: str) -> None:
    """Take part in what the first rank does: a forward pass, of which only the gathering of weights matters
    here, or the gathering of the parameter it names."""
    if told == FORWARD:
        model(torch.zeros(1, 1, dtype=torch.int64, device=model.head.device))
    else:
        parameters[told].full_tensor()


class Whole(Mapping):
    """Parameters by name; a sharded one is put together, on all ranks, at the moment it is read. Only within
    `on_first`."""

    def __init__(self, parameters: dict[str, Tensor]):
        self.parameters = parameters

    def __getitem__(self, name: str) -> Tensor:
        parameter = self.parameters[name].detach()
        if not is_sharded(parameter):
            return parameter
        if size() > 1:
            tell(name)
        return parameter.full_tensor()

    def __iter__(self):
        return iter(self.parameters)

    def __len__(self):
        return len(self.parameters)


# ---------------------------------------------------------------------------------------------- shared models

def is_sharded(tensor: Tensor) -> bool:
    """A DTensor, told by its method: importing the class takes a second."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor: all of it, unless it is sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor put together; all ranks call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def load(path, device, dtype: torch.dtype, adapter=None, prepare: Callable = lambda model: None,
         recompute: bool = False) -> llama.Llama:
    """model.load of a directory with the parameters spread over all ranks, of which none ever holds more than
    its share and one tensor: the model is made without memory, sharded, and each rank then reads its own rows
    from the files.

    prepare(model), before the sharding, chooses what learns; what it makes itself, in memory (LoRA's factors,
    which are small), stays whole on every rank.
    """
    assert dist.is_initialized(), "there are no ranks to share the model: torchrun starts them"
    model, weights, names = llama.open_checkpoint(path, dtype, recompute)
    updates = {} if adapter is None else read_adapter(adapter, set(names))
    model.requires_grad_(False).eval().to(dtype)
    prepare(model)
    shard_(model)
    parameters = dict(model.named_parameters())
    for name, key in names.items():
        rows = own_rows(parameters[name])
        tensor = weights[key][rows]
        if name in updates:
            tensor = add_update(tensor, updates[name]()[rows], f"{adapter}: {name}")
        fill_(model, name, parameters[name], tensor.to(device, parameters[name].dtype, copy=True))
    return model


def own_rows(parameter: Tensor) -> slice:
    """Which rows of a sharded parameter this rank keeps: all ranks but the last ones have as many
    (torch.chunk)."""
    rows = -(-parameter.shape[0] // size())
    first = min(rank() * rows, parameter.shape[0])
    return slice(first, first + parameter.to_local().shape[0])


def fill_(model, name: str, parameter: Tensor, rows: Tensor) -> None:
    """Give a sharded parameter without memory its rows."""
    from torch.distributed.tensor import DTensor
    filled = DTensor.from_local(rows, parameter.device_mesh, parameter.placements, run_check=False,
                                shape=parameter.shape, stride=parameter.stride())
    module, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(module), attribute,
            torch.nn.Parameter(filled, requires_grad=parameter.requires_grad))


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
    """files.run(main). Of several processes the first to fail says why, and the others leave within a second:
    a rank that waits for a failed one would wait for a day."""
    if "RANK" not in os.environ:
        return files.run(main)
    watch = threading.Thread(target=leave_when_told, daemon=True)
    watch.start()
    files.run(lambda: tell_failure(main, watch))


def torchrun_store():
    """A new connection to the store torchrun keeps: one that waits can do nothing else."""
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)


def leave_when_told() -> None:
    """Wait until a rank has failed; end this process if it was another one."""
    store = torchrun_store()
    try:
        store.wait([FAILED], LONGEST_RUN)
        failed = store.get(FAILED).decode()
    except RuntimeError:                     # torchrun has gone, and the run with it
        return
    if failed != os.environ["RANK"]:
        if os.environ["RANK"] == "0":
            print(f"error: rank {failed} failed, so all ranks leave; "
                  f"the same command goes on from the last checkpoint", file=sys.stderr, flush=True)
        os._exit(1)                      # the main thread may be waiting for the failed rank inside a library


def tell_failure(main: Callable, watch: threading.Thread) -> None:
    try:
        main()
    except Exception as error:               # whatever it is, it is raised again
        torchrun_store().compare_set(FAILED, "", os.environ["RANK"])
        watch.join()                     # which does not return if another rank was first: that one says why
        if "by peer" in str(error):          # gloo's words for a rank that was killed and said nothing
            raise InputError("the connection to another rank broke: was it killed, for want of memory "
                                 "perhaps? The same command goes on from the last checkpoint") from None
        raise
