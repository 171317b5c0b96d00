"""The decoder of llama, mistral, qwen2 and qwen3 checkpoints: one file, driven by its configuration.

It knows weights and layers, not requests: `ModelRunner` calls `embed`, `block` for each layer, and `logits`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels import native
from ...kernels.huge_pages import collapse, prefer
from ...kernels.linear import Linear
from ...kernels.lora import ActiveAdapters
from ...kernels.rms_norm import rms_norm
from ...kernels.rope import rope_, rope_angles
from ...kernels.swiglu import swiglu
from ..errors import UnknownArchitecture
from .bundles import default_cache

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
ATTEND = Callable[[int, Tensor], Tensor]
"""(layer, rotated qkv [tokens, heads + 2 kv_heads, head_dim]) -> [tokens, heads * head_dim]."""


@dataclass(frozen=True)
class DecoderConfig:
    """What the decoder must know of a checkpoint. `windows` has one entry a layer, None = full attention."""

    family: str
    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_size: int
    context: int
    norm_eps: float
    tied: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]
    rope: Any  # the transformers configuration, which knows its rotary parameters

    @classmethod
    def from_pretrained(cls, config: Any) -> DecoderConfig:
        """Read a `transformers` text configuration.

        Raises `UnknownArchitecture` for families, activations or rotary scalings this decoder does not have.
        """
        family = getattr(config, "model_type", None)
        if family not in FAMILIES:
            raise UnknownArchitecture(f"unknown decoder family {family!r}; known: {', '.join(FAMILIES)}")
        if config.hidden_act not in ("silu", "swish"):
            raise UnknownArchitecture(f"unknown activation {config.hidden_act!r}; known: silu")
        rope_type = rope_parameters(config).get("rope_type", "default")
        if rope_type not in ROPE_TYPES:
            raise UnknownArchitecture(
                f"rotary scaling {rope_type!r} depends on the length of the text, so its keys cannot be shared; "
                f"known: {', '.join(ROPE_TYPES)}"
            )
        heads = config.num_attention_heads
        bias = bool(getattr(config, "attention_bias", False))
        return cls(
            family=family,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            ffn_size=config.intermediate_size,
            context=config.max_position_embeddings,
            norm_eps=config.rms_norm_eps,
            tied=bool(config.tie_word_embeddings),
            qkv_bias=bias or family == "qwen2",
            o_bias=bias and family in ("llama", "qwen3"),
            mlp_bias=bool(getattr(config, "mlp_bias", False)),
            qk_norm=family == "qwen3",
            windows=_windows(config, family),
            rope=config,
        )


class DecoderLayer:
    """The weights of one block; queries, keys and values are one map.

    Gate and up stay apart: as one map of 3072 x 576 in bf16 oneDNN takes 310 us for them on two cores, as two of
    1536 x 576 it takes 2 x 110.
    """

    def __init__(self, config: DecoderConfig, device: torch.device, dtype: torch.dtype) -> None:
        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, device=device, dtype=dtype)

        def linear(rows: int, columns: int, bias: bool) -> Linear:
            return Linear(empty(rows, columns), empty(rows) if bias else None)

        hidden, dim = config.hidden_size, config.head_dim
        self.input_norm = empty(hidden)
        self.qkv = linear((config.heads + 2 * config.kv_heads) * dim, hidden, config.qkv_bias)
        self.q_norm = empty(dim) if config.qk_norm else None
        self.k_norm = empty(dim) if config.qk_norm else None
        self.o = linear(hidden, config.heads * dim, config.o_bias)
        self.post_norm = empty(hidden)
        self.gate = linear(config.ffn_size, hidden, config.mlp_bias)
        self.up = linear(config.ffn_size, hidden, config.mlp_bias)
        self.down = linear(hidden, config.ffn_size, config.mlp_bias)

    @property
    def linears(self) -> tuple[Linear, ...]:
        return (self.qkv, self.o, self.gate, self.up, self.down)

    def packed(self, window: int | None) -> native.LayerWeights:
        """What the native kernels need of a layer whose maps are packed for them."""
        qkv, o, gate, up, down = (linear.matrix for linear in self.linears)
        assert qkv and o and gate and up and down
        norms = self.input_norm, self.post_norm, self.q_norm, self.k_norm
        return native.LayerWeights(qkv, o, gate, up, down, *norms, window)


class Decoder:
    """All weights of a decoder, empty until its `slots` are filled, and the steps of its forward pass.

    depth: how many layers exist (a detector needs only those below its head). with_head: whether there is an
    output matrix over the vocabulary. dtype: fp32 or bf16 (fp16 works where the device multiplies it).
    """

    def __init__(
        self,
        config: DecoderConfig,
        device: torch.device,
        dtype: torch.dtype,
        *,
        depth: int | None = None,
        with_head: bool = True,
    ) -> None:
        self.config = config
        self.device = device
        self.dtype = dtype
        self.depth = config.layers if depth is None else depth
        self.embedding = torch.empty(config.vocab_size, config.hidden_size, device=device, dtype=dtype)
        self.layers = [DecoderLayer(config, device, dtype) for _ in range(self.depth)]
        full = self.depth == config.layers
        self.norm = torch.empty(config.hidden_size, device=device, dtype=dtype) if full else None
        self.head: Linear | None = None
        if with_head and full:
            weight = self.embedding if config.tied else torch.empty_like(self.embedding)
            self.head = Linear(weight)
        self.native: native.NativeLayers | None = None
        self._inv_freq, self._rope_scaling = _inverse_frequencies(config, device)

    def slots(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter by its checkpoint name, as a view to copy into."""
        yield "model.embed_tokens.weight", self.embedding
        sizes = [n * self.config.head_dim for n in (self.config.heads, self.config.kv_heads, self.config.kv_heads)]
        for index, layer in enumerate(self.layers):
            prefix = f"model.layers.{index}."
            yield prefix + "input_layernorm.weight", layer.input_norm
            yield prefix + "post_attention_layernorm.weight", layer.post_norm
            yield from _split(layer.qkv, prefix + "self_attn.", ("q_proj", "k_proj", "v_proj"), sizes)
            yield from _split(layer.o, prefix + "self_attn.", ("o_proj",), [self.config.hidden_size])
            yield from _split(layer.gate, prefix + "mlp.", ("gate_proj",), [self.config.ffn_size])
            yield from _split(layer.up, prefix + "mlp.", ("up_proj",), [self.config.ffn_size])
            yield from _split(layer.down, prefix + "mlp.", ("down_proj",), [self.config.hidden_size])
            if layer.q_norm is not None and layer.k_norm is not None:
                yield prefix + "self_attn.q_norm.weight", layer.q_norm
                yield prefix + "self_attn.k_norm.weight", layer.k_norm
        if self.norm is not None:
            yield "model.norm.weight", self.norm
        if self.head is not None and not self.config.tied:
            yield "lm_head.weight", self.head.weight

    def freeze(self) -> None:
        """Call once, when the slots are filled: packs the weights, one matrix at a time, into huge pages.

        Where the native kernels work, `native` runs whole layers from then on; `block` goes on working.
        """
        linears = [linear for layer in self.layers for linear in layer.linears]
        linears += [] if self.head is None else [self.head]
        library = native.load(default_cache()) if all(native.can_pack(linear.weight) for linear in linears) else None
        if not isinstance(library, native.Native):
            for linear in linears:
                linear.pack()
            collapse(linear.weight for linear in linears)
            return
        sizes = [native.packed_elements(*linear.weight.shape) for linear in linears]
        arena = torch.empty(sum(sizes), device=self.device, dtype=self.dtype)
        prefer(arena)
        for linear, part in zip(linears, arena.split(sizes), strict=True):
            linear.pack(library, part)
        config = self.config
        if config.head_dim % native.INPUTS == 0 and config.head_dim <= native.MAX_HEAD_DIM and self.layers:
            weights = [layer.packed(window) for layer, window in zip(self.layers, config.windows, strict=False)]
            self.native = native.NativeLayers(
                library, weights, config.heads, config.kv_heads, config.head_dim, config.norm_eps
            )

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens [n] -> [n, hidden]."""
        return self.embedding[tokens]

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions [n] -> (cos, sin) [n, 1, head_dim]."""
        return rope_angles(positions, self._inv_freq, self._rope_scaling, self.dtype)

    def block(
        self,
        index: int,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        attend: ATTEND,
        adapters: ActiveAdapters | None = None,
    ) -> Tensor:
        """Run one layer over x [n, hidden], in place. `attend` stores the new keys and values and attends.

        adapters: the rows with an adapter; it knows the layer's maps as "qkv", "o", "gate", "up" and "down".
        """
        layer, config = self.layers[index], self.config
        heads, kv_heads = config.heads, config.kv_heads
        h = rms_norm(x, layer.input_norm, config.norm_eps)
        qkv = layer.qkv(h)
        if adapters is not None:
            adapters.add_(index, "qkv", qkv, h)
        qkv = qkv.view(-1, heads + 2 * kv_heads, config.head_dim)
        rotated = qkv[:, : heads + kv_heads]
        if layer.q_norm is not None and layer.k_norm is not None:
            rotated[:, :heads] = rms_norm(rotated[:, :heads], layer.q_norm, config.norm_eps)
            rotated[:, heads:] = rms_norm(rotated[:, heads:], layer.k_norm, config.norm_eps)
        rope_(rotated, *angles)
        attended = attend(index, qkv)
        o = layer.o(attended)
        if adapters is not None:
            adapters.add_(index, "o", o, attended)
        x += o
        h = rms_norm(x, layer.post_norm, config.norm_eps)
        gate, up = layer.gate(h), layer.up(h)
        if adapters is not None:
            adapters.add_(index, "gate", gate, h)
            adapters.add_(index, "up", up, h)
        wide = swiglu(gate, up)
        down = layer.down(wide)
        if adapters is not None:
            adapters.add_(index, "down", down, wide)
        x += down
        return x

    def logits(self, x: Tensor) -> Tensor:
        """x [n, hidden], the output of the last layer -> [n, vocab] in the model's dtype."""
        assert self.head is not None and self.norm is not None, "this decoder has no output matrix"
        return self.head.after_norm(x, self.norm, self.config.norm_eps)


def rope_parameters(config: Any) -> dict[str, Any]:
    return getattr(config, "rope_parameters", None) or {}


def _windows(config: Any, family: str) -> tuple[int | None, ...]:
    window = getattr(config, "sliding_window", None)
    if family in ("qwen2", "qwen3"):
        if not getattr(config, "use_sliding_window", False):
            window = None
        types = getattr(config, "layer_types", None)
        if window is not None and types:
            return tuple(window if kind == "sliding_attention" else None for kind in types)
    elif family != "mistral":
        window = None
    return (window,) * config.num_hidden_layers


def _inverse_frequencies(config: DecoderConfig, device: torch.device) -> tuple[Tensor, float]:
    """fp32 [head_dim / 2] and the factor on cos and sin, as `transformers` computes them for this scaling."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = rope_parameters(config.rope)
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
        return 1.0 / parameters["rope_theta"] ** exponents, 1.0
    return ROPE_INIT_FUNCTIONS[kind](config.rope, device)


def _split(linear: Linear, prefix: str, names: tuple[str, ...], sizes: list[int]) -> Iterator[tuple[str, Tensor]]:
    parts = linear.weight.split(sizes)
    biases = linear.bias.split(sizes) if linear.bias is not None else [None] * len(sizes)
    for name, weight, bias in zip(names, parts, biases, strict=True):
        yield f"{prefix}{name}.weight", weight
        if bias is not None:
            yield f"{prefix}{name}.bias", bias
