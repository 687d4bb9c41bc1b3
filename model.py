"""The decoder: one class for Llama / SmolLM, Qwen2, Qwen3, Gemma and Gemma 3 (text).

    model = Decoder.from_pretrained("FOLDER")  # Hugging Face layout: config.json, model.safetensors
    logits = model(tokens)                     # (B, T) token ids -> (B, T, V)
    model.save_pretrained("OTHER")             # transformers loads it, with the same logits

The table FAMILIES says how the families differ. Rows of a batch are padded on the right: padding
comes after all real tokens, where the causal mask hides it.

Dimension letters, used in every shape comment:
    B  rows of the batch               H     query heads
    T  tokens fed per row              H_kv  key and value heads, a divisor of H
    S  keys seen by the longest row*   D     width of one head (head_dim)
    V  vocabulary size                 C     width of the hidden states (hidden_size)
    * rounded up on a GPU: KVCache.keys_seen

The last of siked, train, sampler, model; it imports none of them. Read `Decoder.hidden` first,
then Layer, Attention, and RoPE.
Sources: Llama (arXiv 2302.13971), Qwen2 (2407.10671), Qwen3 (2505.09388), Gemma (2403.08295),
Gemma 3 (2503.19786). Where a paper leaves a detail open, modeling_<model_type>.py of
transformers 5.23 decides.
"""
import json
import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from data.files import read_json, write_text, write_whole

ACTIVATIONS = {"silu": F.silu, "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh")}


@dataclass
class Family:
    """How a family differs from Llama."""
    architecture: str              # its class in transformers
    qkv_bias: bool = False         # biases on q, k and v, not on o
    qk_norm: bool = False          # an RMSNorm over D on each q and k head
    norm_adds_one: bool = False    # norms multiply by 1 + weight: a weight of 0 changes nothing
    scale_embedding: bool = False  # embeddings are multiplied by sqrt(C)
    sandwich_norms: bool = False   # a norm also after attention and after the MLP
    sliding_layers: bool = False   # some layers see few keys and have a RoPE base of their own
    defaults: dict = field(default_factory=dict)  # of fields that its config.json may leave out


GEMMA = {"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True, "head_dim": 256}
GEMMA_3 = GEMMA | {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "query_pre_attn_scalar": 256,
                   "sliding_window": 4096, "sliding_window_pattern": 6}
FAMILIES = {  # by the model_type of config.json
    "llama": Family("LlamaForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True, defaults={"head_dim": 128}),
    "gemma": Family("GemmaForCausalLM", norm_adds_one=True, scale_embedding=True, defaults=GEMMA),
    "gemma3_text": Family("Gemma3ForCausalLM", qk_norm=True, norm_adds_one=True,
                          scale_embedding=True, sandwich_norms=True, sliding_layers=True,
                          defaults=GEMMA_3),
}
# Fields that turn on what is not implemented. A wrong model must not load quietly.
REFUSED = ("attention_bias", "mlp_bias", "use_sliding_window", "use_bidirectional_attention",
           "attn_logit_softcapping", "final_logit_softcapping", "num_experts",
           "num_local_experts", "quantization_config")
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass
class Config:
    """The fields of config.json that the code reads. None stands for the family's default."""
    model_type: str                             # a key of FAMILIES
    vocab_size: int                             # V
    hidden_size: int                            # C
    intermediate_size: int                      # width of the MLP between up and down
    num_hidden_layers: int
    num_attention_heads: int                    # H
    num_key_value_heads: int | None = None      # H_kv; default H: no two query heads share
    head_dim: int | None = None                 # D; default C / H
    hidden_act: str | None = None               # a key of ACTIVATIONS
    max_position_embeddings: int = 2048         # tokens; the sampler refuses longer texts
    rms_norm_eps: float = 1e-6
    rope_theta: float | None = None             # RoPE base (Gemma 3: of the full layers)
    tie_word_embeddings: bool | None = None     # the output layer is the embedding matrix
    initializer_range: float = 0.02             # standard deviation of fresh weights
    rope_scaling: dict | None = None            # Llama 3.1 and later, see rope_frequencies
    # Gemma 3 alone:
    rope_local_base_freq: float | None = None   # RoPE base of the sliding layers
    query_pre_attn_scalar: float | None = None  # scores are divided by its root, not by sqrt(D)
    sliding_window: int | None = None           # keys that a sliding layer's query sees
    sliding_window_pattern: int | None = None   # every so-many-th layer is full
    layer_types: list[str] | None = None        # "full_attention" or "sliding_attention" each
    extra: dict = field(default_factory=dict, repr=False, compare=False)  # all fields of the file

    def __post_init__(self):
        defaults = {"hidden_act": "silu", "tie_word_embeddings": False, "rope_theta": 1e4,
                    "num_key_value_heads": self.num_attention_heads,
                    "head_dim": self.hidden_size // self.num_attention_heads}
        for name, value in (defaults | self.family.defaults).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act = {self.hidden_act!r} is not one of {list(ACTIVATIONS)}")
        known = ["full_attention"]
        if self.family.sliding_layers:
            known.append("sliding_attention")
        if self.layer_types is None:
            every = self.sliding_window_pattern or 1  # every so-many-th layer is full
            self.layer_types = ["sliding_attention" if number % every else "full_attention"
                                for number in range(1, self.num_hidden_layers + 1)]
        if len(self.layer_types) != self.num_hidden_layers or set(self.layer_types) - set(known):
            raise ValueError(f"layer_types = {self.layer_types} must be one of {known} per layer")

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    @classmethod
    def from_json(cls, path):
        """ValueError names the file, the field and the value that we cannot compute with."""
        try:
            fields = read_json(path)
            model_type = fields.get("model_type")
            # Checked first: another type's fields may have other names.
            if model_type not in list(FAMILIES):  # not in the dict itself: it may be unhashable
                raise ValueError(f"model_type = {model_type!r} is not implemented, only "
                                 f"{', '.join(FAMILIES)}; its architectures: "
                                 f"{fields.get('architectures')}")
            for name in REFUSED:
                if fields.get(name):
                    raise ValueError(f"{name} = {fields[name]!r} is not implemented")
            known = {name: fields[name] for name in cls.__annotations__ if name in fields}
            if model_type.startswith("gemma"):
                known["hidden_act"] = fields.get("hidden_activation")  # its name there
            return cls(**known | read_rope(fields), extra=fields)
        except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
            raise ValueError(f"{path}: {error}") from error


# --------------------------------------------------------------------------------------------------
# rotary position embedding


def read_rope(fields):
    """The RoPE settings of a config.json, under the names of Config. Two spellings exist:

    transformers 4: "rope_theta": 1e6, "rope_scaling": null or {"rope_type": "llama3", ...}
    transformers 5: "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, and in Gemma 3
                    {"full_attention": {...}, "sliding_attention": {...}}
    """
    settings = {"rope_scaling": None}
    for name in ("rope_scaling", "rope_parameters"):
        value = fields.get(name) or {}
        by_layer_type = value if "full_attention" in value else {"full_attention": value}
        for layer_type, rope in by_layer_type.items():
            rope = dict(rope)
            theta = rope.pop("rope_theta", None)
            kind = rope.pop("rope_type", rope.pop("type", "default"))
            llama = fields.get("model_type") == "llama" and set(rope) == set(LLAMA3_ROPE)
            if llama and kind == "llama3":
                settings["rope_scaling"] = rope | {"rope_type": kind}
            elif kind != "default" or rope:
                raise ValueError(f"{name} = {value!r} is not implemented")
            if theta is not None:
                full = layer_type == "full_attention"
                settings["rope_theta" if full else "rope_local_base_freq"] = theta
    return settings


def rope_frequencies(base, D, scaling, device=None):
    """Radians per position by which each pair of a head's numbers turns, (D/2,): see `rotate`.

    scaling: in Llama 3.1 and later (arXiv 2407.21783) a pair that makes fewer than low_freq_factor
    turns within original_max_position_embeddings positions is slowed down by `factor`. One that
    makes more than high_freq_factor turns stays as it is. In between the two are blended.
    """
    frequencies = 1 / base ** (torch.arange(0, D, 2, device=device).float() / D)
    if scaling is None:
        return frequencies
    factor, low, high, positions = [scaling[name] for name in LLAMA3_ROPE]
    turns = positions * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # 0: stretched, 1: as it was
    return frequencies * (kept + (1 - kept) / factor)


def rope_cos_sin(positions, frequencies, dtype):
    """Positions (B, T) and frequencies (D/2,) -> cos and sin for `rotate`, (B, 1, T, D) each.

    In training all rows have the same positions, (1, T). The angles are float32 for every dtype:
    bfloat16 cannot tell position 257 from 256.
    """
    angles = positions[:, None, :, None].float() * frequencies  # (B, 1, T, D/2)
    angles = torch.cat([angles, angles], dim=-1)                # (B, 1, T, D)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, cos, sin):
    """Rotary position embedding (arXiv 2104.09864) of queries or keys x (B, heads, T, D).

    Pair i, read as a point (a, b), turns by position * base^(-2i/D). Which two numbers are a pair
    is a convention. The wrong one runs without an error and gives another model:
        half-split, Hugging Face files (here)         a0 a1 a2 a3 b0 b1 b2 b3   x[i], x[i + D/2]
        interleaved, the paper and Llama's own files  a0 b0 a1 b1 a2 b2 a3 b3   x[2i], x[2i + 1]
    """
    a, b = x.chunk(2, dim=-1)  # (B, heads, T, D/2) each
    return x * cos + torch.cat([-b, a], dim=-1) * sin  # a cos - b sin | b cos + a sin


# --------------------------------------------------------------------------------------------------
# layers


class RMSNorm(nn.RMSNorm):
    """x / root-mean-square(x) * weight over the last dimension (arXiv 1910.07467); in Gemma
    * (1 + weight)."""

    def __init__(self, size, config):
        super().__init__(size, config.rms_norm_eps)
        self.offset = int(config.family.norm_adds_one)
        nn.init.constant_(self.weight, 1 - self.offset)

    def forward(self, x):
        # In float32 for every dtype: a sum of squares loses too much in bfloat16.
        weight = self.weight.float() + self.offset
        return F.rms_norm(x.float(), weight.shape, weight, self.eps).to(x.dtype)


class Linear(nn.Linear):
    """y = x W^T + b. With LoRA (arXiv 2106.09685) W becomes W + scale B A, and W is frozen."""
    lora_scale = None  # Decoder.add_lora sets it, lora_A (rank, in) and lora_B (out, rank)

    def forward(self, x):
        y = super().forward(x)
        if self.lora_scale is None:
            return y
        low = self.lora_scale * F.linear(x, self.lora_A)  # (..., rank)
        return y + F.linear(low, self.lora_B)


def attend(q, k, v, mask, scale):
    """softmax(scale * q k^T) v, over the keys that the mask shows: queries (B, H, T, D), keys and
    values (B, H_kv, T, D) -> (B, H, T, D).

    Used only to train on a CPU in bfloat16: there the fused kernel is slow in its backward pass.
    """
    B, H, T, D = q.shape
    if mask is None:
        mask = torch.ones(T, T, dtype=torch.bool).tril()
    # The H / H_kv query heads that share a key head are laid out along T, as if they were one head
    # with H / H_kv * T queries.
    q = q.reshape(B, k.shape[1], -1, D)                     # (B, H_kv, H / H_kv * T, D)
    scores = scale * q @ k.transpose(2, 3)                  # (B, H_kv, H / H_kv * T, T)
    scores = scores.view(B, H, T, T)
    scores = scores.masked_fill(~mask, -math.inf)
    shares = scores.softmax(dim=-1).to(v.dtype)             # of each key in the result
    y = shares.view(B, k.shape[1], -1, T) @ v               # (B, H_kv, H / H_kv * T, D)
    return y.view(B, H, T, D)


def attend_fused(q, k, v, mask, scale):
    """The same in one kernel, also for T tokens behind cached ones: keys and values are then
    (B, H_kv, S, D), S > T."""
    B, H, T, D = q.shape
    if T == 1:
        # Laid out as in `attend`: several times as fast. All these queries are at one position, so
        # the mask, if there is one, (B, 1, 1, S), fits them all.
        q = q.view(B, k.shape[1], -1, D)                    # (B, H_kv, H / H_kv, D)
    y = F.scaled_dot_product_attention(
        q, k, v,
        attn_mask=mask,
        is_causal=mask is None and T > 1,
        scale=scale,
        enable_gqa=q.shape[1] > k.shape[1],
    )
    return y.reshape(B, H, T, D)


class Attention(nn.Module):
    """Causal self-attention. H / H_kv neighbouring query heads share a key and a value head
    (arXiv 2305.13245)."""

    def __init__(self, config, index):
        super().__init__()
        C = config.hidden_size
        D = config.head_dim
        H = config.num_attention_heads
        H_kv = config.num_key_value_heads
        bias = config.family.qkv_bias
        self.index = index  # of our layer in the cache
        self.head_dim = D
        self.scale = (config.query_pre_attn_scalar or D) ** -0.5
        self.q_proj = Linear(C, H * D, bias=bias)
        self.k_proj = Linear(C, H_kv * D, bias=bias)
        self.v_proj = Linear(C, H_kv * D, bias=bias)
        self.o_proj = Linear(H * D, C, bias=False)
        self.q_norm = RMSNorm(D, config) if config.family.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(D, config) if config.family.qk_norm else nn.Identity()

    def forward(self, x, mask, cos, sin, cache):
        B, T, _ = x.shape                                   # (B, T, C)
        q = self.q_proj(x).view(B, T, -1, self.head_dim)    # (B, T, H, D)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)    # (B, T, H_kv, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)    # (B, T, H_kv, D)
        q = self.q_norm(q).transpose(1, 2)                  # (B, H, T, D)
        k = self.k_norm(k).transpose(1, 2)                  # (B, H_kv, T, D)
        v = v.transpose(1, 2)                               # (B, H_kv, T, D)
        q = rotate(q, cos, sin)
        k = rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.update(self.index, k, v)           # (B, H_kv, S, D): the cached ones too
        training = torch.is_grad_enabled() and cache is None
        if training and q.dtype == torch.bfloat16 and q.device.type == "cpu":
            y = attend(q, k, v, mask, self.scale)           # (B, H, T, D)
        else:
            y = attend_fused(q, k, v, mask, self.scale)     # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, -1)             # (B, T, H * D)
        return self.o_proj(y)                               # (B, T, C)


class MLP(nn.Module):
    """Gated MLP (arXiv 2002.05202)."""

    def __init__(self, config):
        super().__init__()
        C = config.hidden_size
        inner = config.intermediate_size
        self.gate_proj = Linear(C, inner, bias=False)
        self.up_proj = Linear(C, inner, bias=False)
        self.down_proj = Linear(inner, C, bias=False)
        self.act = ACTIVATIONS[config.hidden_act]

    def forward(self, x):
        gate = self.act(self.gate_proj(x))            # (B, T, inner)
        return self.down_proj(gate * self.up_proj(x)) # (B, T, C)


class Layer(nn.Module):
    """Attention, then the MLP. Each reads a normed copy of x and adds its result to x."""

    def __init__(self, config, index):
        super().__init__()
        C = config.hidden_size
        self.sandwich_norms = config.family.sandwich_norms
        self.self_attn = Attention(config, index)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(C, config)
        # In Llama this norm is before the MLP. In Gemma 3 the same name is a norm after attention.
        self.post_attention_layernorm = RMSNorm(C, config)
        if self.sandwich_norms:
            self.pre_feedforward_layernorm = RMSNorm(C, config)
            self.post_feedforward_layernorm = RMSNorm(C, config)

    def forward(self, x, mask, cos, sin, cache):
        y = self.self_attn(self.input_layernorm(x), mask, cos, sin, cache)  # (B, T, C)
        if self.sandwich_norms:
            x = x + self.post_attention_layernorm(y)
            y = self.mlp(self.pre_feedforward_layernorm(x))
            return x + self.post_feedforward_layernorm(y)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x))


def visible_keys(positions, S, window=None):
    """Which of the keys 0 .. S - 1 do queries at positions (B, T) see? bool (B, 1, T, S).

    A query at position p sees key j if j <= p and, in sliding layers, j > p - window.
    """
    p = positions[:, None, :, None]                 # (B, 1, T, 1)
    j = torch.arange(S, device=positions.device)    # (S,)
    if window is None:
        return j <= p
    return (j <= p) & (j > p - window)


# --------------------------------------------------------------------------------------------------
# the model


class Decoder(nn.Module):
    """A decoder-only language model. Its parameters are named as in the checkpoint.

    `Decoder(config)` has fresh weights: normal with standard deviation initializer_range, biases 0,
    norm weights 1 (of Gemma 0). They come from torch's global generator: call torch.manual_seed.
    """
    checkpointing = False  # True: the backward pass computes each layer again, to save memory

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers)),
            "norm": RMSNorm(config.hidden_size, config),
        })
        # Tied: there is no second matrix, so two can never come apart.
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)  # no LoRA
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=config.initializer_range)
            elif name.endswith(".bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens, cache=None):
        """Tokens (B, T) -> logits (B, T, V)."""
        return self.output(self.hidden(tokens, cache))

    def output(self, hidden):
        """States (..., C) -> logits (..., V). Expensive with a large V: pass only what you need."""
        return F.linear(hidden, self.output_weight())

    def output_weight(self):
        """The matrix (V, C) of `output`."""
        return (self.lm_head or self.model.embed_tokens).weight

    def hidden(self, tokens, cache=None):
        """Tokens (B, T) -> states after the final norm (B, T, C).

        cache.lengths (B,) says how many tokens each row has cached. cache.update(layer, k, v)
        stores new keys and values after those and returns all, (B, H_kv, S, D) each, with
        S = cache.keys_seen(T). The caller then adds to the lengths.
        """
        config = self.config
        D = config.head_dim
        T = tokens.shape[1]
        S = T
        positions = torch.arange(T, device=tokens.device)[None]  # (1, T)
        if cache is not None:
            S = cache.keys_seen(T)
            positions = cache.lengths[:, None] + positions       # (B, T)
        x = self.model.embed_tokens(tokens)                      # (B, T, C)
        if torch.is_autocast_enabled(x.device.type):  # or each Layer's x + y would be float32: slow
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if config.family.scale_embedding:
            scale = math.sqrt(config.hidden_size)
            x = x * torch.tensor(scale, dtype=x.dtype)           # rounded, as in the reference

        # The masks, and RoPE's cos and sin, are built once for all layers of a type.
        # Nothing cached (S = T): query t of every row sees keys 0 .. t, a (T, T) triangle. None
        #   stands for it: attention is faster without a tensor.
        # Cached (S > T), mostly T = 1: (B, 1, T, S). Query t of a row with p cached tokens sees
        #   keys 0 .. p + t. The keys after them, up to the longest row's S, are leftovers.
        # A sliding layer's query sees the last keys of these, as many as its window holds.
        inputs = {}
        for layer_type in set(config.layer_types):
            window, base, scaling = None, config.rope_theta, config.rope_scaling
            if layer_type == "sliding_attention":
                window, base, scaling = config.sliding_window, config.rope_local_base_freq, None
            mask = None
            if S > min(T, window or T):
                mask = visible_keys(positions, S, window)        # (1 or B, 1, T, S)
            frequencies = rope_frequencies(base, D, scaling, x.device)
            inputs[layer_type] = (mask, *rope_cos_sin(positions, frequencies, x.dtype))

        for layer, layer_type in zip(self.model.layers, config.layer_types):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, *inputs[layer_type], cache, use_reentrant=False)
            else:
                x = layer(x, *inputs[layer_type], cache)         # (B, T, C)
        return self.model.norm(x)

    def cast(self, dtype):
        """A copy in another dtype, to sample with. The model itself if it is in that dtype."""
        if dtype == self.model.norm.weight.dtype:
            return self
        with torch.device("meta"):  # shapes without memory
            copy = Decoder(self.config)
        tensors = {name: tensor.to(dtype) for name, tensor in self.state_dict().items()}
        copy.load_state_dict(tensors, assign=True)
        return copy

    def add_lora(self, rank=16, alpha=32, seed=0, dtype=None):
        """Freezes all parameters and adds trained ones, lora_A and lora_B, to the seven projections
        of every layer. B starts at 0, so that at first nothing changes; A is uniform within
        1 / sqrt(in), as in peft. dtype: of the frozen matrices from here on [unchanged]. In
        bfloat16 they take half the memory, and `merge_lora` has to read them again."""
        generator = torch.Generator().manual_seed(seed)
        self.requires_grad_(False)
        for parameter in self.parameters():
            if dtype is not None and parameter.dim() == 2:
                parameter.data = parameter.to(dtype)
        for linear in self.modules():
            if isinstance(linear, Linear):
                bound = linear.in_features ** -0.5
                A = torch.empty(rank, linear.in_features)
                A.uniform_(-bound, bound, generator=generator)
                like = self.model.norm.weight  # which keeps its dtype
                linear.lora_A = nn.Parameter(A.to(like))
                linear.lora_B = nn.Parameter(like.new_zeros(linear.out_features, rank))
                linear.lora_scale = alpha / rank

    @torch.no_grad()
    def merge_lora(self, folder=None):
        """Adds what LoRA has learned to the weights and removes it. All can be trained again.
        folder: the frozen weights are read again from there, in float32."""
        if folder is not None:
            device = self.model.norm.weight.device
            whole = Decoder.from_pretrained(folder, device=device)
            self.load_state_dict(whole.state_dict(), strict=False, assign=True)  # all but LoRA's
        for linear in self.modules():
            if isinstance(linear, Linear) and linear.lora_scale is not None:
                linear.weight += linear.lora_scale * linear.lora_B @ linear.lora_A
                del linear.lora_A, linear.lora_B
                linear.lora_scale = None
        self.requires_grad_(True)

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, device="cpu"):
        """Loads a Hugging Face folder. FileNotFoundError or ValueError names what is wrong."""
        folder = Path(folder)
        with torch.device("meta"):  # shapes without memory; the tensors that are read replace them
            model = cls(Config.from_json(folder / "config.json"))
        tensors = read_tensors(folder, dtype, device)
        if model.lm_head is None and "lm_head.weight" in tensors:  # tied, yet stored, in some files
            head = tensors.pop("lm_head.weight")
            # Some files hold the matrix as lm_head.weight alone.
            embedding = tensors.setdefault("model.embed_tokens.weight", head)
            if not torch.equal(head, embedding):
                raise ValueError(f"{folder}: lm_head.weight differs from model.embed_tokens.weight "
                                 "although tie_word_embeddings is true")
        try:
            model.load_state_dict(tensors, assign=True)
        except RuntimeError as error:  # it names every tensor that is missing, extra or misshapen
            raise ValueError(f"{folder}: {' '.join(str(error).split())}") from error
        return model

    def save_pretrained(self, folder):
        """Writes config.json, then model.safetensors. OSError names what cannot be written."""
        folder = Path(folder)
        fields = self.config.extra | {"architectures": [self.config.family.architecture]}
        for name, value in vars(self.config).items():
            if name != "extra" and value is not None:
                fields[name] = value
        fields["dtype"] = str(self.model.norm.weight.dtype).removeprefix("torch.")
        fields.pop("torch_dtype", None)      # the old name of dtype
        fields.pop("rope_parameters", None)  # written as rope_theta, which all versions read
        write_text(folder / "config.json", json.dumps(fields, indent=2) + "\n")
        metadata = {"format": "pt"}  # transformers asks for it
        save = partial(save_file, self.state_dict(), metadata=metadata)
        write_whole(folder / "model.safetensors", save)


def read_tensors(folder, dtype, device):
    """name -> tensor, of one file or of the shards that an index names. Errors name the file.

    As in transformers, the one file comes first: an index beside it may be older. Of an index only
    the names of the files are used: it may list a tied lm_head.weight that none of them holds.
    """
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.exists() and not (folder / "model.safetensors").exists():
        weight_map = read_json(index).get("weight_map")  # tensor -> its file
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index}: not the index of a checkpoint")
        files = sorted(set(map(str, weight_map.values())))
    tensors = {}
    for file in files:
        path = folder / file
        try:
            stored = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: not a complete safetensors file: {error}") from error
        for name, tensor in stored.items():
            if name.endswith(".rotary_emb.inv_freq"):  # of the first Llama files; computed here
                continue
            tensors[name] = tensor.to(device, dtype)
            if not tensor.is_floating_point():
                raise ValueError(f"{path}: tensor {name} holds {tensor.dtype}")
            if not tensors[name].sum().isfinite():
                raise ValueError(f"{path}: tensor {name} holds nan or infinity")
    return tensors
