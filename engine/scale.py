"""What training needs: parameters, memory of a device and time of an optimiser step, from config.json alone.

`python clo.py --dry-run` prints it for one model, `python -m bench.tables` the tables of docs/scale.md. Every
formula stands where it is computed, with its reason. Letters as in model.py: H hidden width, F mlp width,
V vocabulary, Q query heads, G kv heads, D head width, R LoRA rank. A GB is 1e9 bytes.

Exact: parameters. Held against the program by the tests: the bytes a forward pass keeps for its backward, on
the CPU. An estimate: everything of a GPU, whose achieved rate of matrix products is an argument and no
promise; torch.compile keeps less than is counted here.
"""

import contextlib
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import model as llama
from engine.files import InputError, first_line
from formats.configs import Config
from formats.weights import DTYPES
from kernels.chunks import CPU_CHUNK_ROWS, CPU_TILE_WORDS, GPU_CHUNK_BYTES, cpu_multiplies_bf16

GB = 1e9
TRAINABLE_BYTES = 4 + 4 + 4 + 4          # fp32: the parameter, its gradient, AdamW's two moments
DEVICE_BYTES = 141 * GB                  # of an H200
HOST_BYTES = 0.3 * GB                    # Python and PyTorch on a CPU
CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")     # Linux, control groups of version 2
MARGIN = 0.15                            # of a device left free: what is predicted is an estimate
MOST_MICRO_ROWS = 64                     # where choosing stops
MOST_BF16_ROWS = 4                       # on a CPU, whose bf16 products of fewer tokens are slow
MEASURED_FROM = 50_000_000               # parameters from which a CPU's compute type is measured
MEASURED_ROWS = 128
MEASURED_WIDTH = 2048
TIMED_LAYERS = (1, 4)                    # of the models that a dry run times
TIMED_ROUNDS = 2
MEMORY_FLAGS = "--micro-rows 1, --recompute, half of --row-tokens, --dtype bf16, --train lora, --shard"
CONTEXT_BYTES = 1.5 * GB                 # a CUDA context, cuBLAS's workspace, what the allocator rounds up


@dataclass(frozen=True)
class Plan:
    """How a model is trained, and on what. tflops: TFLOP/s a device achieves; link_gb: GB/s it sends."""
    train: str = "lora"
    lora_rank: int = 16
    dtype: str = "bf16"                  # "auto", until `choose`
    row_tokens: int = 1024
    micro_rows: int | None = 1           # None, until `choose`
    recompute: bool = False
    gpus: int = 1
    shard: bool = False
    tflops: float = 380.0
    device: str = "cuda"
    link_gb: float = 50.0
    dtype_why: str = "asked for"

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.row_tokens * self.micro_rows

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize


# ------------------------------------------------------------------------------------------------- parameters

def attention_shapes(c: Config) -> dict[str, tuple[int, int]]:
    """(out, in) of the four projections of a block."""
    H = c.hidden_size
    QD = c.num_attention_heads * c.head_dim
    GD = c.num_key_value_heads * c.head_dim
    return {"q_proj": (QD, H), "k_proj": (GD, H), "v_proj": (GD, H), "o_proj": (H, QD)}


def parameters(c: Config) -> dict[str, int]:
    """Number of parameters by part; their sum is the model's. A tied head counts once, as the embedding."""
    H, F, V, L = c.hidden_size, c.intermediate_size, c.vocab_size, c.num_hidden_layers
    shapes = attention_shapes(c)
    attention = sum(rows * columns for rows, columns in shapes.values())
    attention += c.qkv_bias * sum(shapes[name][0] for name in ("q_proj", "k_proj", "v_proj"))
    attention += c.o_bias * H
    return {"embedding": V * H,
            "head": 0 if c.tie_word_embeddings else V * H,
            "attention": L * attention,
            "mlp": L * (3 * H * F + c.mlp_bias * (2 * F + H)),
            "norms": L * (2 * H + c.qk_norm * 2 * c.head_dim) + H}


def trainable_parameters(c: Config, plan: Plan) -> int:
    """lora: R (in + out) for each projection, whose B is out x R and A is R x in; attention: the projections;
    full: all."""
    if plan.train == "lora":
        return c.num_hidden_layers * plan.lora_rank * sum(map(sum, attention_shapes(c).values()))
    counts = parameters(c)
    return counts["attention"] if plan.train == "attention" else sum(counts.values())


# ------------------------------------------------------------------------------------------------ activations

def norm_bytes(c: Config, plan: Plan) -> int:
    """Bytes a norm keeps per token: its input, and 1 / rms in fp32."""
    return c.hidden_size * plan.itemsize + max(4, plan.itemsize)


def block_bytes(c: Config, plan: Plan, first: bool = False) -> float:
    """Bytes a block keeps per token of a row, for its backward. first: the input of the first block needs no
    gradient unless the embedding is trained."""
    H = c.hidden_size
    b = plan.itemsize
    wide = max(4, b)
    full = plan.train == "full"
    heads = c.num_attention_heads
    QD, _ = attention_shapes(c)["q_proj"]
    GD, _ = attention_shapes(c)["k_proj"]
    kept = 0 if first and not full else norm_bytes(c, plan)
    kept += H * b                                      # input of q, k, v: for the gradients of their weights
    if plan.device != "cpu":
        kept += QD * b                                 # input of o, where it isn't attention's result itself
    if plan.train == "lora":
        kept += 4 * plan.lora_rank * b                 # A x, for the gradient of B
    if c.qk_norm:
        kept += (QD + GD) * b + (heads + c.num_key_value_heads) * wide
    kept += 2 * (QD + GD) * b + heads * wide           # q, k, v, the result, its log-sum-exp
    kept += norm_bytes(c, plan) + full * H * b         # second norm; input of gate and up if they learn
    kept += (2 + full) * c.intermediate_size * b       # gate and up (SwiGLU); their product if down learns
    return kept


def activation_bytes(c: Config, plan: Plan) -> float:
    """Bytes all blocks and the last norm keep for the backward of one micro-batch.

    With recompute a block keeps its input, H per token; in the backward one block at a time is run again.
    """
    blocks = [block_bytes(c, plan, first=i == 0) for i in range(c.num_hidden_layers)]
    kept = sum(blocks)
    if plan.recompute:
        kept = c.num_hidden_layers * c.hidden_size * plan.itemsize + max(blocks)
    return plan.tokens * (kept + norm_bytes(c, plan))


# ----------------------------------------------------------------------------------------------------- memory

def memory(c: Config, plan: Plan) -> dict[str, float]:
    """Bytes of one device, by what they are for; their sum is the estimate of its peak."""
    b = plan.itemsize
    cuda = plan.device == "cuda"
    counts = parameters(c)
    learned = trainable_parameters(c, plan)
    frozen = sum(counts.values()) - (0 if plan.train == "lora" else learned)
    parts = plan.gpus if plan.shard else 1                       # FSDP2 splits every tensor evenly
    root = counts["embedding"] + counts["head"]
    block = (counts["attention"] + counts["mlp"]) / c.num_hidden_layers
    gradients = root + 2 * block if plan.train == "full" else 2 * learned / c.num_hidden_layers
    chunk = GPU_CHUNK_BYTES if cuda else CPU_CHUNK_ROWS * CPU_TILE_WORDS * 4
    logits = min(chunk, plan.tokens * c.vocab_size * 4)          # the log-prob op's one buffer
    return {"frozen weights": b * frozen / parts,
            "trainables, gradients, AdamW": TRAINABLE_BYTES * learned / parts,
            # Copies in compute type, kept until the backward has passed: the trainables are fp32.
            "trainables, cast": 0 if plan.shard or b >= 4 else b * learned,
            # The root (embedding, head) stays whole during a step; of blocks the running one and the next.
            "gathered weights": plan.shard * b * (root + 2 * block),
            "activations": activation_bytes(c, plan),
            "head": logits + plan.tokens * c.hidden_size * b,    # and the directions (N, H)
            # Gradients are whole until they are split: the root's, and a block's while the next is computed.
            "gradients before the split": plan.shard * 4 * gradients,
            # Of a block's backward: gradients of gate, up, their product, a temporary; four as wide as x.
            "working": plan.tokens * 4 * (c.intermediate_size + c.hidden_size) * b,
            "the program itself": CONTEXT_BYTES if cuda else HOST_BYTES}


def fitting_micro_rows(c: Config, plan: Plan, available: float, most: int = MOST_MICRO_ROWS) -> int:
    """The largest power of two of packed rows a micro-batch whose predicted memory leaves MARGIN of the
    device free, at most `most`; 1 where not even that fits (`describe` says so)."""
    rows = 1
    while rows < most:
        needed = sum(memory(c, replace(plan, micro_rows=2 * rows)).values())
        if needed > (1 - MARGIN) * available:
            break
        rows *= 2
    return rows


def choose(c: Config, plan: Plan, available: float) -> Plan:
    """The plan with what "auto" stands for on a device of so many bytes."""
    if plan.dtype == "auto":
        dtype, why = fastest_dtype(c, plan.device)
        plan = replace(plan, dtype=dtype, dtype_why=why)
    if plan.micro_rows is not None:
        return plan
    most = 1
    windowed = (c.sliding_window or plan.row_tokens) < plan.row_tokens                # needs a mask of a row
    if plan.device == "cuda":
        most = MOST_MICRO_ROWS
    elif plan.device == "cpu" and plan.dtype == "bf16" and not windowed:
        most = MOST_BF16_ROWS
    return replace(plan, micro_rows=fitting_micro_rows(c, plan, available, most))


def fastest_dtype(c: Config, device: str) -> tuple[str, str]:
    """(compute type, why): bf16 on CUDA, and on a CPU whose units for bf16 are measured to be faster with the
    products of this model."""
    if device != "cpu":
        return ("bf16", "on CUDA") if device == "cuda" else ("fp32", f"on {device}")
    count = sum(parameters(c).values())
    if count < MEASURED_FROM:
        return "fp32", f"a CPU, and fewer than {MEASURED_FROM / 1e6:.0f} M parameters"
    if not cpu_multiplies_bf16():
        return "fp32", "a CPU without units for bf16 matrices (AMX)"
    fp32, bf16 = products_seconds(c, torch.float32), products_seconds(c, torch.bfloat16)
    dtype = "bf16" if bf16 < fp32 else "fp32"
    return dtype, f"measured: products of this model take {bf16 / fp32:.2f} times as long in bf16 as in fp32"


def products_seconds(c: Config, dtype: torch.dtype) -> float:
    """Seconds of products like those of a block, on this CPU: a measurement of a tenth of a second. Beyond
    MEASURED_WIDTH a wider matrix has the same rate."""
    H, QD, F = (min(width, MEASURED_WIDTH) for width in
                (c.hidden_size, c.num_attention_heads * c.head_dim, c.intermediate_size))
    x = torch.randn(MEASURED_ROWS, H).to(dtype)
    weights = [torch.randn(width, H).to(dtype) for width in (QD, F)]

    def work():
        for weight in weights:
            (x @ weight.T) @ weight                            # forward, and the gradient of the input
    return seconds_of(work, torch.device("cpu"))


# ------------------------------------------------------------------------------------------------------- time

def token_flops(c: Config, plan: Plan) -> tuple[float, float]:
    """FLOPs per token of a packed row, all of whose tokens are predicted (an upper bound: prompts are not):
    of a training step, of the reference pass.

    A product costs 2 FLOPs a weight and token, forward; as much again for the gradient of its input; and as
    much once more for that of its weight, where it learns. The head: 2HV forward, 2HV for the gradient of its
    input, which is computed in the forward (kernels/), and 2HV if it learns. Attention's own products are
    left out: in rows of forks they are a few percent.
    """
    counts = parameters(c)
    body = counts["attention"] + counts["mlp"]
    head = c.vocab_size * c.hidden_size
    learned = body if plan.train == "full" else trainable_parameters(c, plan)
    forward = 2 * (body + learned if plan.train == "lora" else body)     # LoRA's come beside the frozen ones
    backward = forward + 2 * learned
    step = (1 + plan.recompute) * forward + backward + (6 if plan.train == "full" else 4) * head
    return step, 2 * body + 2 * head


def step_seconds(c: Config, plan: Plan, tokens: float) -> dict[str, float]:
    """Seconds of an optimiser step over so many row tokens, dealt evenly to the devices; apart, those of the
    reference pass, which comes once, before training. Communication hides behind the products where it is
    shorter."""
    step, reference = token_flops(c, plan)
    each = max(tokens / plan.gpus, 1)
    micros = max(1, each / plan.tokens)
    share = (plan.gpus - 1) / plan.gpus                               # what a ring sends from each device
    weights = 2 * plan.itemsize * sum(parameters(c).values())         # gathered in forward and backward
    gradients = 2 * 4 * trainable_parameters(c, plan)     # reduced, and sent back
    sent = (plan.shard * micros * weights + gradients) * share / (plan.link_gb * GB)
    rate = plan.tflops * 1e12
    return {"step": max(each * step / rate, sent), "reference": each * reference / rate}


# ----------------------------------------------------------------------------------------------- this machine

def device_bytes(device: torch.device) -> int:
    """Memory of a GPU, or of the host, or what a container may take of it: a part for every process that
    torchrun started there."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = CONTAINER_LIMIT.read_text().strip() if CONTAINER_LIMIT.exists() else "max"
    whole = host if limit == "max" else min(host, int(limit))
    return whole // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def peak_memory_gb() -> float:
    """Most memory this process ever held: on the GPU when there is one, else resident (GB = 1e9 bytes)."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / GB
    unit = 1 if sys.platform == "darwin" else 1024               # ru_maxrss: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GB


def stand_in(c: Config, layers: int, device: torch.device, dtype: torch.dtype) -> llama.Llama:
    """A model of this shape with so many layers, for timing: its weights repeat a few random numbers, which
    is quick. (Equal ones would give gradients so small that a CPU takes longer over them.)"""
    with torch.device("meta"):
        model = llama.Llama(replace(c, num_hidden_layers=layers))
    model = model.to(dtype).to_empty(device=device).requires_grad_(False)
    numbers = 0.02 * torch.randn(1 << 16, device=device, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            times = -(-parameter.numel() // len(numbers))
            parameter.copy_(numbers.repeat(times)[:parameter.numel()].view_as(parameter))
    return model


def seconds_of(work: Callable, device: torch.device) -> float:
    """Least wall-clock seconds of work() over TIMED_ROUNDS, after one that warms up."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = []
    for _ in range(TIMED_ROUNDS + 1):
        started = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def measured_seconds(c: Config, plan: Plan, packed: list[list], tokens: float, device: torch.device,
                     begin: Callable) -> dict[str, float]:
    """Seconds of an optimiser step of so many row tokens and of its reference pass, here: the run's own step
    on its fullest batch (of data.Batch), timed with models of few layers; a layer more costs what the last
    ones did. begin(model) makes the function that trains the model by one step on batches."""
    batch = max((batch for step in packed for batch in step), key=lambda batch: batch.used)
    timed = {}
    for layers in TIMED_LAYERS:
        model = stand_in(c, layers, device, DTYPES[plan.dtype])
        with torch.no_grad():
            reference = seconds_of(lambda: llama.continuation_logps(model, batch.to(device)), device)
        step = begin(model)
        timed[layers] = {"reference": reference, "step": seconds_of(lambda: step([batch]), device)}
    few, more = TIMED_LAYERS
    seconds = {}
    for key in ("step", "reference"):
        layer = (timed[more][key] - timed[few][key]) / (more - few)
        seconds[key] = tokens / batch.used * (timed[few][key] + (c.num_hidden_layers - few) * layer)
    return seconds


@contextlib.contextmanager
def memory_advice(device: str):
    """Out of memory, on a device or the host, becomes one line with the flags that help."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:                 # torch.OutOfMemoryError is a RuntimeError
        text = first_line(error)
        full = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text
        if not full:
            raise
        raise InputError(f"out of memory on {device} ({text}): try {MEMORY_FLAGS}; --dry-run estimates what "
                         f"a setting needs. But for --recompute they make another run: --fresh or another "
                         f"--out") from None


# ------------------------------------------------------------------------------------------------------ print

def describe(c: Config, plan: Plan, available: float) -> str:
    """Parameters and memory of a device, as text; available: bytes a device has."""
    counts = parameters(c)
    parts = memory(c, plan)
    total = sum(parts.values())
    by_part = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    where = "one device"
    if plan.gpus > 1:
        where = f"each of {plan.gpus} devices, {'sharded' if plan.shard else 'all alike'}"
    lines = [f"parameters {sum(counts.values()):,}: {by_part}",
             f"trainable ({plan.train}) {trainable_parameters(c, plan):,}",
             f"memory of {where}, for {plan.micro_rows} x {plan.row_tokens:,} tokens at once:"]
    lines += [f"  {name:30}{size / GB:9.3f} GB" for name, size in parts.items() if size]
    verdict = "" if total < available else ": too much for the device"
    lines.append(f"  {'sum':30}{total / GB:9.3f} GB{verdict}")
    if not plan.recompute:
        saved = parts["activations"] - activation_bytes(c, replace(plan, recompute=True))
        lines.append(f"  --recompute would save {saved / GB:.3f} GB")
    return "\n".join(lines)
