"""A Llama-family decoder by hand: Llama 2/3, Mistral, Qwen2.5, Qwen3 from their own safetensors files.

    model = load("demo/llama")                        # a Hugging Face directory
    hidden = model(tokens)                            # (B, T) -> (B, T, H), after the final norm
    logits = hidden @ model.head.T                    # (B, T, V)
    logps = continuation_logps(model, batch)          # (S,): packed forks, see data.py
    replies = generate(model, [[1, 17, 5]], max_tokens=32, stop_ids={2})

Shapes: B rows, T tokens, N predicted tokens, H hidden width, V vocabulary, Q query heads, G kv heads,
D head width, F mlp width, K keys (past and new tokens), R LoRA rank, P pairs, S continuations.

Every parameter carries the name it has in the checkpoint, so loading needs no rename map. `forward`
returns hidden states, not logits: training needs the head on few of the rows, and kernels/ computes
log-probs from them directly.

Packed forks. A row may hold several *forks*: a prompt followed by alternative continuations, which share the
prompt and do not see each other. With `fork` and `branch` (both (B, T)), token q sees token k of its row
iff                                                                                                    (eq. 1)

    fork[q] == fork[k]  and  k <= q  and  (branch[k] == 0 or branch[k] == branch[q])

and, for a sliding window of w (Mistral), positions[q] - positions[k] < w; padding sees itself alone. A header
that all forks begin with (few-shot examples) is left out of them and given as `prefix`, its keys and values:
every token sees them too. Three ways to compute that attention, and one place that chooses
(`fork_attention`): on CUDA FlexAttention, which skips what the predicate hides; on a CPU piece by piece where
the batch says where the forks lie (`spans`): long ones without a mask, short neighbours together under a
small one; and the dense mask for what neither takes.

References: LLaMA (arXiv 2302.13971), RoPE (arXiv 2104.09864), GQA (arXiv 2305.13245),
RMSNorm (arXiv 1910.07467), FlexAttention (arXiv 2412.05496), LoRA (arXiv 2106.09685).
"""

import math
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kernels
from formats import hub
from formats.configs import Config, read_config
from formats.weights import Weights, check_depth, match_names, read_tensors
from kernels.layers import ForkAttention, RMSNormFunction, Rotate, SwiGLU, fork_predicate, pieces_of

# ----------------------------------------------------------------------------------------------------- layers

def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b. A single row on a CPU is multiplied as a vector: bf16 weights are then read half again as
    fast (bench/generate.py, --batch 1)."""
    if x.is_cuda or x.numel() != x.shape[-1]:
        return F.linear(x, weight, bias)
    y = torch.mv(weight, x.flatten())
    y = y if bias is None else y + bias
    return y.unflatten(0, (*x.shape[:-1], -1))


class Linear(nn.Module):
    """y = x W^T + b with W in any dtype: trainable weights stay fp32 while the activations are bf16."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return linear(x, self.weight.to(x.dtype), bias)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x):
        return RMSNormFunction.call(x, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """x (B, T, H) -> (B, T, H); cos and sin of `rotation`; attend(q, k, v): one of the functions below."""

    def __init__(self, c: Config):
        super().__init__()
        self.head_dim = c.head_dim
        query_width = c.num_attention_heads * c.head_dim
        kv_width = c.num_key_value_heads * c.head_dim
        self.q_proj = Linear(c.hidden_size, query_width, c.qkv_bias)
        self.k_proj = Linear(c.hidden_size, kv_width, c.qkv_bias)
        self.v_proj = Linear(c.hidden_size, kv_width, c.qkv_bias)
        self.o_proj = Linear(query_width, c.hidden_size, c.o_bias)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else None

    def forward(self, x, cos, sin, attend, cache=None):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)                         # (B, T, Q, D)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)                         # (B, T, G, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)
        if self.q_norm is not None:
            q = self.q_norm(q)
            k = self.k_norm(k)
        q = Rotate.call(q, cos, sin)
        k = Rotate.call(k, cos, sin)
        if cache is not None:
            k, v = cache.append_(k, v)                                           # (B, K, G, D), K = past + T
        seen = attend(q, k, v)                                                   # (B, T, Q, D)
        return self.o_proj(seen.reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202) of x (B, T, H) -> (B, T, H)."""

    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, c.mlp_bias)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, c.mlp_bias)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, c.mlp_bias)

    def forward(self, x):
        gate = self.gate_proj(x)
        up = self.up_proj(x)
        return self.down_proj(SwiGLU.call(gate, up))


class Block(nn.Module):
    """Attention and MLP, each on a normed x (B, T, H) and added to it."""

    def __init__(self, c: Config):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, cos, sin, attend, cache=None):
        normed = self.input_layernorm(x)
        x = x + self.self_attn(normed, cos, sin, attend, cache)
        normed = self.post_attention_layernorm(x)
        return x + self.mlp(normed)


def rope_frequencies(config: Config, device=None):
    """Angle per position of each pair of channels, (D/2,) fp32: theta^(-2i/D), stretched by rope_scaling.

    llama3 keeps the frequency of a pair that turns often in the original context, divides that of one that
    turns rarely by `factor`, and interpolates between (transformers' `_compute_llama3_parameters`, from
    Meta's llama-models).
    """
    D = config.head_dim
    scaling = config.rope_scaling
    channels = torch.arange(0, D, 2, dtype=torch.float32, device=device)
    frequency = 1.0 / config.rope_theta ** (channels / D)
    if scaling is None:
        return frequency
    if scaling["rope_type"] == "linear":
        return frequency / scaling["factor"]
    factor = scaling["factor"]
    low = scaling["low_freq_factor"]
    high = scaling["high_freq_factor"]
    context = scaling["original_max_position_embeddings"]
    turns = context * frequency / (2 * math.pi)                      # full ones over that context
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * frequency / factor + keep * frequency


def rotation(c: Config, positions, dtype: torch.dtype):
    """cos and sin of Rotate at positions (B, T): each (B, T, 1, D), the first half of sin negated."""
    angles = positions[..., None] * rope_frequencies(c, positions.device)                # (B, T, D/2)
    angles = angles[:, :, None]                                            # (B, T, 1, D/2), for all heads
    cos = angles.cos().to(dtype)
    sin = angles.sin().to(dtype)
    both = torch.cat((cos, cos), dim=-1)
    signed = torch.cat((-sin, sin), dim=-1)
    return both, signed


# -------------------------------------------------------------------------------------------------- attention
# Every function below that takes q (B, T, Q, D), k and v (B, K, G, D) returns (B, T, Q, D). window: the most
# tokens that one sees, itself included; None for all.

def sdpa(q, k, v, mask=None, causal: bool = False):
    """Scaled dot-product attention; G kv heads serve Q/G query heads each.
    mask (B or 1, 1, T, K): True where a query may see, or what is added to its scores. causal: for as many
    queries as keys, or for one, the last, which sees them all."""
    B, T, Q, D = q.shape
    k = k.transpose(1, 2)                                                        # (B, G, K, D)
    v = v.transpose(1, 2)
    G = k.shape[1]
    if T == 1:          # the query heads of a group become its queries: no key is copied for each of them
        q = q.reshape(B, G, Q // G, D)
        return F.scaled_dot_product_attention(q, k, v, mask).reshape(B, T, Q, D)
    q = q.transpose(1, 2)                                                        # (B, Q, T, D)
    if mask is not None and q.is_cuda and Q != G:
        # CUDA's memory-efficient kernel takes a mask or groups, not both; without it all scores are stored.
        k = k.repeat_interleave(Q // G, dim=1)
        v = v.repeat_interleave(Q // G, dim=1)
    grouped = k.shape[1] != Q
    seen = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped)
    return seen.transpose(1, 2)


def attend_causal(q, k, v, window=None):
    """Plain causal attention of T tokens, each seeing at most the last `window`."""
    T = q.shape[1]
    if window is None or T <= window:
        return sdpa(q, k, v, causal=True)
    order = torch.arange(T, device=q.device)
    distance = order[:, None] - order
    visible = (distance >= 0) & (distance < window)
    return sdpa(q, k, v, mask=visible[None, None])


def dense_mask(fork, branch, positions, window=None, header: int = 0):
    """Eq. 1 as a boolean mask (B, 1, T, header + T). With a header, positions count from its start."""
    B, T = fork.shape
    rows = torch.arange(B, device=fork.device)[:, None, None]
    order = torch.arange(T, device=fork.device)
    visible = fork_predicate(fork, branch, positions, window)(rows, None, order[:, None], order)
    distance = positions[:, :, None] - torch.arange(header, device=fork.device)
    header_visible = distance < (window or math.inf)
    return torch.cat((header_visible, visible), dim=-1)[:, None]


def attend_spans(q, k, v, pieces):
    """Packed forks on a CPU, by pieces of the flattened rows (kernels.layers.pieces_of): no copy."""
    q_flat = q.flatten(0, 1)                                                   # (B T, Q, D)
    k_flat = k.flatten(0, 1)
    v_flat = v.flatten(0, 1)
    return ForkAttention.apply(q_flat, k_flat, v_flat, pieces).view(q.shape)


@lru_cache(maxsize=None)
def compiled_flex():
    """FlexAttention and its mask builder, compiled at first use: import must stay cheap."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    return torch.compile(flex_attention, dynamic=False), torch.compile(create_block_mask, dynamic=False)


def flex_mask(fork, branch, positions, window=None):
    """Eq. 1 as a block-sparse mask: tiles that nobody may see are skipped, forward and backward."""
    B, T = fork.shape
    predicate = fork_predicate(fork, branch, positions, window)
    _, create_block_mask = compiled_flex()
    return create_block_mask(predicate, B, None, T, T, device=fork.device)


def attend_flex(q, k, v, mask, flex):
    """flex: compiled_flex()[0], given from outside because a compiled block traces this function."""
    q = q.transpose(1, 2)                                                        # (B, Q, T, D)
    k = k.transpose(1, 2)
    v = v.transpose(1, 2)
    grouped = q.shape[1] != k.shape[1]
    return flex(q, k, v, block_mask=mask, enable_gqa=grouped).transpose(1, 2)


def flex_takes(device: str, tokens: int, head_dim: int, header: int | None) -> bool:
    """Whether FlexAttention takes packed rows of so many tokens. Its kernels want CUDA, heads of 16 channels
    at least, and a tile of 128 queries. With a header row lengths differ, and each would compile it anew."""
    return device == "cuda" and head_dim >= 16 and tokens >= 128 and header is None


def fork_attention(fork, branch, positions, head_dim, window=None, header=None, spans=None):
    """The attention function of packed forks; the tests compare all three kinds. After a header of so many
    tokens, if any, positions count from its start. spans: of a data.Batch, to walk instead of masking, unless
    a fork reaches beyond the window."""
    reach = max((span.longest for span in spans or ()), default=0) + (header or 0)
    if spans is not None and reach <= (window or math.inf):
        return partial(attend_spans, pieces=pieces_of(spans, fork.shape[1], header or 0))
    if flex_takes(fork.device.type, fork.shape[1], head_dim, header):
        mask = flex_mask(fork, branch, positions, window)
        return partial(attend_flex, mask=mask, flex=compiled_flex()[0])
    return partial(sdpa, mask=dense_mask(fork, branch, positions, window, header or 0))


# ------------------------------------------------------------------------------------------------------ cache

class LayerCache:
    """Keys and values of one layer, (B, capacity, G, D), of which the first `length` columns are filled. In
    memory a head's columns lie side by side, (B, G, capacity, D), which is how attention reads them."""

    def __init__(self, B, capacity, G, D, device, dtype):
        shape = (B, G, capacity, D)
        self.k = torch.empty(shape, device=device, dtype=dtype).transpose(1, 2)
        self.v = torch.empty(shape, device=device, dtype=dtype).transpose(1, 2)
        self.length = 0

    def append_(self, k, v):
        """k and v (B, T, G, D) behind what is there; all of it, (B, length, G, D)."""
        end = self.length + k.shape[1]
        self.k[:, self.length:end] = k
        self.v[:, self.length:end] = v
        self.length = end
        return self.k[:, :end], self.v[:, :end]

    def keep_(self, rows) -> None:
        moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero()[:, 0]
        for cached in (self.k, self.v):
            cached[moved, :self.length] = cached[rows[moved], :self.length]
        self.k, self.v = self.k[:len(rows)], self.v[:len(rows)]


class Cache:
    """KV cache of a left-padded batch. `start` (B,) is each row's number of padding columns."""

    def __init__(self, c: Config, start, capacity: int, dtype):
        shape = (len(start), capacity, c.num_key_value_heads, c.head_dim)
        self.layers = [LayerCache(*shape, start.device, dtype) for _ in range(c.num_hidden_layers)]
        self.start = start
        self.padded = bool(start.any())
        self.window = c.sliding_window

    def attention(self, T: int):
        """Attention of T new tokens over everything cached and themselves (`append_` adds them first)."""
        past = self.layers[0].length
        reaches = self.window is None or past + T <= self.window
        if not self.padded and reaches and (T == 1 or past == 0):
            return partial(sdpa, causal=True)
        device = self.start.device
        query = past + torch.arange(T, device=device)[:, None]
        key = torch.arange(past + T, device=device)[None, :]
        visible = (key <= query) & (key >= self.start[:, None, None])
        if self.window is not None:
            visible &= query - key < self.window
        visible |= key == query         # a padding query sees itself: an empty softmax row would be NaN
        bias = torch.zeros(visible.shape, dtype=self.layers[0].k.dtype, device=device)
        bias.masked_fill_(~visible, -math.inf)
        return partial(sdpa, mask=bias[:, None])   # made once for all layers

    def keep_(self, rows) -> None:
        """Drop all rows but these, so that finished replies cost nothing. Few move: copying all is dear."""
        self.start = self.start[rows]
        self.padded = bool(self.start.any())
        for layer in self.layers:
            layer.keep_(rows)


@dataclass
class Header:
    """Keys and values (1, header, G, D) of one layer for the tokens that every row continues."""
    k: Tensor
    v: Tensor

    def append_(self, k, v):
        """k and v (B, T, G, D) behind the header's, (B, header + T, G, D). Nothing is overwritten: it has its
        name from LayerCache's, in whose place it is called."""
        B = len(k)
        shared_k = self.k.expand(B, -1, -1, -1)
        shared_v = self.v.expand(B, -1, -1, -1)
        k = torch.cat((shared_k, k), dim=1)
        v = torch.cat((shared_v, v), dim=1)
        return k, v


# ------------------------------------------------------------------------------------------------------ model

def run_block(block, x, cos, sin, attend, cache=None):
    """A block as a function of its weights too: compiled, one graph serves all blocks of a model."""
    return block(x, cos, sin, attend, cache)


class Llama(nn.Module):
    """Embedding, blocks, final norm. `head` is the output matrix (V, H), which is the embedding when tied.

    compute_dtype: of the activations; None is that of the embedding (trainable weights may be wider).
    recompute: keep a block's input alone, and run the block again in the backward.
    compiler: a backend of torch.compile for the blocks of packed forks, whose rows must then keep one length;
    they go by a mask, since pieces of attention differ from batch to batch, and each would be compiled anew.
    """

    def __init__(self, config: Config, compute_dtype=None, recompute: bool = False, compiler=None):
        super().__init__()
        self.config = config
        self.given_dtype = compute_dtype
        self.recompute = recompute
        self.compiled = compiler is not None       # compiled blocks round differently from run_block
        self.run_forks = run_block
        if self.compiled:
            self.run_forks = torch.compile(run_block, dynamic=False, fullgraph=True, backend=compiler)
        # Not nn.Embedding(V, H): its random start would import torch's compiler on the meta device.
        table = torch.empty(config.vocab_size, config.hidden_size)
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding.from_pretrained(table, freeze=False),
            "layers": nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)

    @property
    def head(self) -> Tensor:
        return self.model["embed_tokens"].weight if self.lm_head is None else self.lm_head.weight

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.given_dtype or self.model["embed_tokens"].weight.dtype

    def forward(self, tokens, positions=None, fork=None, branch=None, spans=None, cache=None, prefix=None):
        """Hidden states (B, T, H) of tokens (B, T) int64. Alone: causal. With fork and branch: eq. 1, by way
        of `spans` (a data.Batch's) if given, else by a mask. With cache: T new tokens after what it holds.
        positions (B, T) default to 0, 1, ..., T-1 in every row: give them behind a filled cache. prefix, only
        with fork and branch: `keys_and_values` of the header that all forks continue; positions count from
        its end."""
        B, T = tokens.shape
        c = self.config
        run = run_block
        layers = [None] * c.num_hidden_layers
        if positions is None:
            positions = torch.arange(T, device=tokens.device).expand(B, T)
        if cache is not None:
            attend = cache.attention(T)
            layers = cache.layers
        elif fork is None:
            attend = partial(attend_causal, window=c.sliding_window)
        else:
            run = run_block if prefix else self.run_forks
            layers = prefix or layers
            header = prefix[0].k.shape[1] if prefix else None
            positions = positions + (header or 0)
            if run is not run_block:
                spans = None
            attend = fork_attention(fork, branch, positions, c.head_dim, c.sliding_window, header, spans)
        x = self.model["embed_tokens"](tokens).to(self.compute_dtype)
        cos, sin = rotation(c, positions, x.dtype)
        x = self.run_blocks(run, x, cos, sin, attend, layers)
        return self.model["norm"](x)

    def run_blocks(self, run, x, cos, sin, attend, layers):
        gradient = torch.is_grad_enabled()
        compiled = run is not run_block
        if self.recompute and gradient:
            run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
        # A compiled block runs as if for a gradient even where none is wanted: else another graph would be
        # compiled, which rounds otherwise, and then no reference equals the policy.
        with torch.set_grad_enabled(gradient or compiled):
            for block, layer in zip(self.model["layers"], layers):
                x = run(block, x, cos, sin, attend, layer)
                if not gradient:        # what this block kept goes now; the next runs as for a gradient, too
                    x = x.detach().requires_grad_(x.requires_grad)
        return x


def keys_and_values(model: Llama, tokens: list[int]) -> list[Header]:
    """Per layer the keys and values of a header's tokens, if any, for `forward(prefix=...)`."""
    device = model.head.device
    start = torch.zeros(1, dtype=torch.int64, device=device)
    cache = Cache(model.config, start, len(tokens), model.compute_dtype)
    if tokens:
        with torch.no_grad():
            model(torch.tensor([tokens], device=device), cache=cache)
    return [Header(layer.k, layer.v) for layer in cache.layers]


def continuation_logps(model: Llama, batch, prefix=None) -> Tensor:
    """Log-prob of each of the S continuations of a data.Batch, summed over its tokens, (S,): the walk that
    training, reference pass, validation and scoring all take. prefix as in `forward`."""
    hidden = model(batch.tokens, batch.positions, batch.fork, batch.branch, batch.spans, prefix=prefix)
    predicted = hidden.flatten(0, 1).index_select(0, batch.row_index)                            # (N, H)
    head = model.head.to(predicted.dtype)
    logp = kernels.token_logp(predicted, head, batch.targets)                                    # (N,)
    sums = logp.new_zeros(len(batch.length))
    return sums.index_add(0, batch.sequence, logp)                                               # (S,)


# ---------------------------------------------------------------------------------------------------- loading

def open_checkpoint(directory, compute_dtype=None, recompute=False, compiler=None):
    """The model without memory (on the meta device), its Weights, and {parameter name: tensor name} in the
    order of the files. InputError when anything is missing, surplus or of another shape."""
    config = read_config(directory)
    weights = Weights(directory)
    check_depth(weights, config.num_hidden_layers)                 # before any number of layers is built
    with torch.device("meta"):
        model = Llama(config, compute_dtype, recompute, compiler)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return model, weights, match_names(weights, shapes)


def load(path, device="cpu", dtype=torch.float32, adapter=None, recompute=False, compiler=None) -> Llama:
    """The model in a Hugging Face directory or on the hub, on `device` in `dtype`, with a PEFT LoRA adapter
    added if given; recompute and compiler as in `Llama`.

    What is on the CPU in the dtype of the files stays memory-mapped, privately: changing it changes no file,
    but a file must not be overwritten in place meanwhile (renaming another one over it, as formats/ does, is
    fine). Peak host memory is the model's and one shard. InputError when anything is missing, surplus,
    damaged or of another shape.
    """
    path = hub.model_directory(path)
    model, weights, names = open_checkpoint(path, dtype, recompute, compiler)
    state = {}
    for name, tensor in read_tensors(weights, names, adapter):
        state[name] = tensor.to(device=device, dtype=dtype)
    model.load_state_dict(state, strict=True, assign=True)
    return model.requires_grad_(False).eval()


def initialise_(model: Llama, seed: int = 0) -> Llama:
    """Fresh weights: normal(0, 0.02), norms one, biases zero."""
    generator = torch.Generator(device=model.head.device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.02, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return model


# ------------------------------------------------------------------------------------------------- generation

@torch.no_grad()
def generate(model: Llama, prompts: list[list[int]], max_tokens: int, stop_ids, temperature: float = 0.0,
             top_p: float = 1.0, seed: int = 0, batch_size: int = 64, progress=None) -> list[list[int]]:
    """Replies to prompts of token ids, without the stop id that ends them; at most max_tokens each.

    Greedy at temperature 0, else sampled from the smallest set of tokens holding top_p of the probability.
    Prompts of like length share a batch. `progress(n)` is called when n more replies are finished.
    """
    assert all(prompts), "every prompt needs a token"
    generator = torch.Generator(device=model.head.device).manual_seed(seed)
    pick = partial(pick_token, temperature=temperature, top_p=top_p, generator=generator)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    replies: list[list[int]] = [[] for _ in prompts]
    for first in range(0, len(order), batch_size):
        batch = order[first:first + batch_size]
        asked = [prompts[i] for i in batch]
        for i, reply in zip(batch, generate_batch(model, asked, max_tokens, stop_ids, pick, progress)):
            replies[i] = reply
    return replies


def generate_batch(model, prompts, max_tokens, stop_ids, pick, progress=None):
    """One left-padded batch: a pass over the prompts, then one token a step for replies not yet finished."""
    device = model.head.device
    width = max(map(len, prompts))
    padded = [[0] * (width - len(prompt)) + prompt for prompt in prompts]
    start = torch.tensor([width - len(prompt) for prompt in prompts], device=device)
    tokens = torch.tensor(padded, device=device)
    positions = torch.arange(width, device=device) - start[:, None]
    positions = positions.clamp(min=0)
    cache = Cache(model.config, start, width + max_tokens, model.compute_dtype)
    stops = torch.tensor(sorted(stop_ids), device=device)
    head = None
    replies: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))                              # which prompt each row is
    progress = progress or (lambda n: None)
    for step in range(max_tokens):
        hidden = model(tokens, positions, cache=cache)[:, -1]
        if head is None:                         # with --shard no rank has all of it before a forward pass
            head = model.head.to(hidden.dtype)
        chosen = pick(linear(hidden, head))                       # (B,)
        going = ~torch.isin(chosen, stops)
        for row, token, goes in zip(rows, chosen.tolist(), going.tolist()):
            if goes:
                replies[row].append(token)
        if not going.all():
            kept = torch.arange(int(going.sum()), device=device)
            ended = ~going[:len(kept)]                            # a row from the end takes the place of each
            kept[ended] = len(kept) + going[len(kept):].nonzero()[:, 0]
            progress(len(rows) - len(kept))
            rows = [rows[i] for i in kept.tolist()]
            chosen = chosen[kept]
            positions = positions[kept]
            cache.keep_(kept)
        if not rows:
            break
        tokens = chosen[:, None]
        positions = positions[:, -1:] + 1
    progress(len(rows))                                           # cut at max_tokens
    return replies


def pick_token(logits, temperature, top_p, generator):
    """Next token (B,) from logits (B, V)."""
    if temperature == 0:
        return logits.max(-1).indices        # argmax takes three times as long on a CPU in bf16
    logits = logits.float()
    logits = logits - logits.amax(-1, keepdim=True)              # at most 0: no temperature makes it overflow
    logits = logits / max(temperature, torch.finfo(torch.float32).tiny)
    probs, tokens = logits.softmax(-1).sort(-1, descending=True)
    dropped = probs.cumsum(-1) - probs >= top_p
    dropped[:, 0] = False                                        # the most probable token is always kept
    choice = torch.multinomial(probs.masked_fill(dropped, 0.0), 1, generator=generator)
    return tokens.gather(-1, choice)[:, 0]
