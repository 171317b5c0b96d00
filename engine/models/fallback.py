"""Decoder-only models that `decoder` has no family for: `transformers`' own modules on the engine's paged attention.

A model's layers are taken out of its forward pass and run one by one over ragged rows, as `decoder`'s are; what the
pass does before and after them it goes on doing itself. Which models this is right for, `fallback_check` finds out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from ...kernels.lora import ActiveAdapters
from ...kernels.native import NativeLayers
from ..errors import UnknownArchitecture
from .decoder import ATTEND
from .fused import FusedLayers

ATTENTION = "stockade_paged"
# What attention may be called with that changes nothing for causal attention over pages.
_IDLE = ("position_ids", "position_embeddings", "cache_position", "use_cache", "output_attentions")


class AttentionKind(NamedTuple):
    """How a layer attends: names as in `DecoderConfig`. window: tokens that a query sees with itself; None = all."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    cap: float | None
    window: int | None


Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor, AttentionKind], Tensor]
"""(queries [1, heads, n, dim], keys and values [1, kv_heads, n, dim], kind) -> [1, n, heads, dim]."""


@dataclass(frozen=True)
class FallbackConfig:
    """What the engine must know of such a model. Names as in `DecoderConfig`."""

    family: str
    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    tied: bool
    attention_scale: float
    attention_cap: float | None
    windows: tuple[int | None, ...]


class LayerCalls:
    """One walk through a model's forward pass past its layers, and what each of them would have been called with.

    entering: the state [1, n, hidden] that came to the first layer. leaving: the state that the last layer is to have
    given; without one, a state goes through unchanged.
    """

    def __init__(self, leaving: Tensor | None = None) -> None:
        self.entering: Tensor | None = None
        self.arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.leaving = leaving


class _Station(nn.Module):
    """Stands in a model's list where a layer stood. On a walk it notes the call; otherwise it is the layer."""

    def __init__(self, layer: nn.Module, last: bool) -> None:
        super().__init__()
        self.layer = layer
        self.last = last
        self.gives_tuple = False  # whether the layer's state is the first of several results

    def forward(self, *arguments: Any, stockade_calls: LayerCalls | None = None, **named: Any) -> Any:
        if stockade_calls is None:
            return self.layer(*arguments, **named)
        state = arguments[0] if arguments else named.pop("hidden_states")
        if stockade_calls.entering is None:
            stockade_calls.entering = state
        stockade_calls.arguments.append((arguments[1:], named))
        if self.last and stockade_calls.leaving is not None:
            state = stockade_calls.leaving
        return (state,) if self.gives_tuple else state

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # the pass may look at what a layer has
            return getattr(super().__getattr__("layer"), name)


class FallbackDecoder:
    """A loaded model, with the methods of `Decoder` that a runner calls. It has no native or fused layers, and
    adapters are merged into its weights before it is made."""

    native: NativeLayers | None = None
    fused: FusedLayers | None = None
    kv_scales: Tensor | None = None

    def __init__(self, model: PreTrainedModel) -> None:
        """Take a model over: its list of layers and its attention are replaced.

        Raises `UnknownArchitecture` for one whose layers cannot be run one by one, or whose keys and values do not
        fit into pages of one layout.
        """
        AttentionInterface.register(ATTENTION, _attention)  # a name for a function without state
        model.set_attn_implementation(ATTENTION)
        if model.config._attn_implementation != ATTENTION:
            raise UnknownArchitecture(
                f"{model.config.model_type} has an attention of its own that cannot be replaced"
            )
        self.model = model
        self.device = model.device
        self.dtype = model.dtype
        self.head = model.get_output_embeddings()
        self._context = _plain_context(model)
        self._body, self._stations = _with_stations(model)
        self.depth = len(self._stations)
        self.config = self._survey()

    @property
    def way_of_running(self) -> str:
        """All that keys and values depend on beside the weights."""
        return f"fallback {self.config} {self.model.config.to_json_string()}"

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens [n] -> [n, hidden], as they enter the first layer."""
        calls = self._walk(tokens, torch.zeros_like(tokens))
        assert calls.entering is not None
        return calls.entering.squeeze(0)

    def angles(self, positions: Tensor) -> LayerCalls:
        """positions [n] -> what each layer is called with beside the state; rotary angles are some of it."""
        return self._walk(torch.zeros_like(positions), positions)

    def block(
        self,
        index: int,
        x: Tensor,
        angles: LayerCalls,
        attend: ATTEND,
        adapters: ActiveAdapters | None = None,
    ) -> Tensor:
        """Run one layer over x [n, hidden]; returns new rows. `attend` stores the new keys and values and attends."""
        assert adapters is None, "adapters are attached to no such model"
        expected = self._kinds[index]

        def paged(query: Tensor, key: Tensor, value: Tensor, kind: AttentionKind) -> Tensor:
            if kind != expected:
                raise UnknownArchitecture(f"layer {index} attends by {kind} now, and did by {expected} when loaded")
            qkv = torch.cat((query, key, value), 1).squeeze(0).transpose(0, 1).to(self.dtype)
            return attend(index, qkv).view(1, len(x), kind.heads, kind.head_dim).to(query.dtype)

        return self._run(index, x, angles, paged)

    def logits(self, x: Tensor) -> Tensor:
        """x [n, hidden], the output of the last layer -> [n, vocab] in the model's dtype."""
        tokens = torch.zeros(1, len(x), dtype=torch.long, device=self.device)
        calls = LayerCalls(leaving=x.unsqueeze(0))
        out = self.model(input_ids=tokens, position_ids=tokens, use_cache=False, stockade_calls=calls)
        return out.logits.squeeze(0).to(self.dtype)

    def _walk(self, tokens: Tensor, positions: Tensor) -> LayerCalls:
        calls = LayerCalls()
        self._body(
            input_ids=tokens.unsqueeze(0), position_ids=positions.unsqueeze(0), use_cache=False, stockade_calls=calls
        )
        if len(calls.arguments) != self.depth:
            raise UnknownArchitecture(f"{len(calls.arguments)} of {self.depth} layers are called in a forward pass")
        return calls

    def _run(self, index: int, x: Tensor, angles: LayerCalls, attend: Attend) -> Tensor:
        arguments, named = angles.arguments[index]
        station = self._stations[index]
        out = station.layer(x.unsqueeze(0), *arguments, **named, stockade_attend=attend)
        station.gives_tuple = isinstance(out, tuple)
        return (out[0] if station.gives_tuple else out).squeeze(0)

    @torch.inference_mode()
    def _survey(self) -> FallbackConfig:
        """Run a token to see how each layer attends; works without weights, too (on the device "meta")."""
        found: list[AttentionKind] = []

        def note(query: Tensor, key: Tensor, value: Tensor, kind: AttentionKind) -> Tensor:
            found.append(kind)
            return torch.zeros_like(query).transpose(1, 2)

        inside = {id(part) for station in self._stations for part in station.modules()}
        tables = [part for part in self._body.modules() if isinstance(part, nn.Embedding) and id(part) not in inside]
        if len(tables) != 1:
            raise UnknownArchitecture("positions are learned and added to what enters the layers; rotary ones work")
        token = torch.zeros(1, dtype=torch.long, device=self.device)
        angles = self._walk(token, token)
        assert angles.entering is not None
        x = angles.entering.squeeze(0)
        for index in range(self.depth):
            x = self._run(index, x, angles, note)
            if len(found) != index + 1:
                raise UnknownArchitecture(
                    f"layer {index} attends {len(found) - index} times to keys and values of its own; once is needed "
                    "(linear attention and state spaces keep no pages)"
                )
        if len({kind._replace(window=None) for kind in found}) > 1:
            raise UnknownArchitecture(
                f"layers attend differently: {found[0]}, {next(k for k in found if k[:5] != found[0][:5])}"
            )
        self._kinds = tuple(found)
        config, kind = self.model.config, found[0]
        return FallbackConfig(
            family=config.model_type,
            vocab_size=config.vocab_size,
            hidden_size=x.shape[-1],
            layers=self.depth,
            heads=kind.heads,
            kv_heads=kind.kv_heads,
            head_dim=kind.head_dim,
            context=self._context,
            tied=bool(config.tie_word_embeddings),
            attention_scale=kind.scale,
            attention_cap=kind.cap,
            windows=tuple(kind.window for kind in found),
        )


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    stockade_attend: Attend | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What modules call for attention, in the form `transformers` gives it; the current batch comes along with it."""
    if stockade_attend is None:
        raise UnknownArchitecture(f"{type(module).__name__} is not handed what its layer is called with")
    asked = [name for name, given in others.items() if given is not None and name not in _IDLE]
    asked += [] if attention_mask is None else ["a mask of its own"]
    asked += ["attention in both directions"] if is_causal is False else []
    if asked:
        raise UnknownArchitecture(f"{type(module).__name__} wants {', '.join(asked)}, which pages do not have")
    if key.shape != value.shape or key.shape[-1] != query.shape[-1]:
        raise UnknownArchitecture(
            f"{type(module).__name__} has queries, keys and values of {query.shape[-1]}, {key.shape[-1]} and "
            f"{value.shape[-1]} numbers a head; pages need equally many (compressed keys as in MLA have not)"
        )
    heads, kv_heads, head_dim = query.shape[1], key.shape[1], query.shape[-1]
    scale = head_dim**-0.5 if scaling is None else float(scaling)
    kind = AttentionKind(heads, kv_heads, head_dim, scale, softcap, sliding_window)
    return stockade_attend(query, key, value, kind), None


def _plain_context(model: PreTrainedModel) -> int:
    """How many tokens a model attends to as pages do; those of Llama 4 attend so to their first ones only.

    Its chunks are apart from the end of the first one on. From position `floor_scale` - 1 on it sharpens queries by a
    row's place in the batch, which is none here: that is switched off, and below it changes nothing.
    """
    config, bounds = model.config, [model.config.max_position_embeddings]
    if chunk := getattr(config, "attention_chunk_size", None):
        bounds.append(chunk)
    if getattr(config, "attn_temperature_tuning", False):
        bounds.append(config.floor_scale - 1)
        for part in model.modules():
            if hasattr(part, "attn_temperature_tuning"):
                part.attn_temperature_tuning = False
    return min(bounds)


def _with_stations(model: PreTrainedModel) -> tuple[nn.Module, list[_Station]]:
    """The module whose forward pass calls the layers, and what stands in their places now."""
    body, name = layer_list(model)
    layers = getattr(body, name)
    stations = [_Station(layer, index == len(layers) - 1) for index, layer in enumerate(layers)]
    setattr(body, name, nn.ModuleList(stations))
    return body, stations


def layer_list(model: PreTrainedModel) -> tuple[nn.Module, str]:
    """Which module of a model has the list of its layers, and under which name. Raises `UnknownArchitecture`."""
    count = model.config.num_hidden_layers
    for body in model.modules():  # the outer ones first
        for name, child in body.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return body, name
    raise UnknownArchitecture(f"{model.config.model_type} has no one list of its {count} layers")
