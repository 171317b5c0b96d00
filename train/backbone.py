"""A checkpoint as a `transformers` model that can be trained, cut off above a layer, with a `peft` adapter.

It reads whatever the engine reads, so what was trained is what is served.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

from ..engine.errors import BadInput, CheckpointMismatch, CheckpointMissing, MissingExtra, UnknownArchitecture
from ..engine.models.backbones import codec_of, is_tied, text_config
from ..engine.models.bundles import smol_folder
from ..engine.models.checkpoint import ContentHash, open_checkpoint
from ..engine.models.decoder import Decoder
from ..engine.models.sources import BUNDLES
from ..engine.text import Codec
from .batches import padded
from .frozen import Part
from .native_states import keys_and_values, native_decoder, states_below
from .recipe import Recipe

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # others scale embeddings or norms, or fuse their linear maps


@dataclass(frozen=True, eq=False)
class Backbone:
    """model: a causal language model of `layers` layers, a `PeftModel` once it is adapted. content_hash: of all of
    the checkpoint's weights. norm, head: its final norm and output matrix. depth: layers of the whole checkpoint.
    decoder: the engine's of the same weights, which is fast where nothing is learned; None where it is not.
    first_layer: the first one that an adapter changes; 0 for all, or none.
    invocation: of an activated adapter. In training it is a plain LoRA that sees no other tokens than its own: those
    before come as keys and values of the base."""

    source: str
    model: Any
    codec: Codec
    content_hash: str
    layers: int
    context: int
    norm: Any
    head: nn.Module
    depth: int
    device: torch.device
    decoder: Decoder | None = None
    first_layer: int = 0
    invocation: tuple[int, ...] = ()

    @property
    def hidden_size(self) -> int:
        return self.model.config.hidden_size

    @property
    def vocab_size(self) -> int:
        return self.model.config.vocab_size

    def run_states_only(self, normed: bool) -> None:
        """Leave out of what is run what only logits need, and the final norm unless states are to be `normed`; to be
        called before the model is adapted."""
        self.model.lm_head = nn.Identity()
        if not normed:
            self.model.model.norm = nn.Identity()

    @torch.no_grad()
    def settle(self) -> None:
        """Round what was learned to the base's dtype, as it is saved; to be called before it is measured."""
        for parameter in trainable(self.model).values():
            parameter.copy_(parameter.to(self.model.dtype))

    def save(self, folder: Path) -> None:
        """Write the adapter as a PEFT folder in the base's dtype, or all of the model with its tokenizer."""
        if hasattr(self.model, "peft_config"):
            if self.invocation:
                self.model.peft_config["default"].alora_invocation_tokens = list(self.invocation)
            state = {name: value.to(self.model.dtype) for name, value in trainable(self.model).items()}
            # else `peft` asks the model hub whether the vocabulary was changed
            self.model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
        else:
            self.model.model.norm, self.model.lm_head = self.norm, self.head
            self.model.save_pretrained(folder)
            self.codec.tokenizer.save_pretrained(folder)

    def states(self, ids: Tensor) -> Tensor:
        """[rows, tokens, hidden] after the last layer, normed unless `run_states_only` said otherwise.

        ids [rows, tokens] are padded on the right, where nothing that counts looks: no mask is needed, and attention
        takes its fast causal path.
        """
        with self._products():
            out = self.model(input_ids=ids, use_cache=False, output_hidden_states=True, logits_to_keep=1)
        return out.hidden_states[-1]

    def frozen(self) -> Part | None:
        """What of a text is the base's alone: all before an invocation, or what enters the first layer with an
        adapter; None where the adapter changes everything."""
        config, dtype = self.model.config, self.model.dtype
        if self.invocation:
            heads = config.num_key_value_heads
            dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            return Part(self.before, lambda tokens: (self.layers, 2, heads, tokens, dim), dtype)
        if self.first_layer:
            return Part(self.below, lambda tokens: (tokens, config.hidden_size), dtype)
        return None

    @torch.no_grad()
    def below(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """States that enter the first layer with an adapter, each [tokens, hidden]: they are the frozen base's."""
        if self.decoder is not None:
            return states_below(self.decoder, rows, self.first_layer)
        part = self._part(0, self.first_layer)
        part.norm = nn.Identity()
        ids, _ = padded(rows, 0, self.device)
        states = part(input_ids=ids, use_cache=False).last_hidden_state
        return [states[number, : len(row)] for number, row in enumerate(rows)]

    def above(self, below: Sequence[Tensor]) -> Tensor:
        """As `states`, [rows, most tokens, hidden], from what `below` gave."""
        x = nn.utils.rnn.pad_sequence(list(below), batch_first=True).to(self.device)
        with self._products():
            return self._part(self.first_layer, self.layers)(inputs_embeds=x, use_cache=False).last_hidden_state

    def _part(self, first: int, last: int) -> Any:
        """The layers [first, last) of the adapted decoder as a decoder, of the same weights."""
        whole = self.model.get_base_model().model
        part = copy.copy(whole)
        part._modules = {**whole._modules, "layers": whole.layers[first:last]}
        if getattr(whole.config, "layer_types", None) is not None:
            part.config = copy.copy(whole.config)
            part.config.layer_types = whole.config.layer_types[first:last]
        return part

    @contextmanager
    def _products(self) -> Iterator[None]:
        """Adapters are fp32 so that small steps count; their products are of the base's dtype, as in the engine."""
        if self.model.dtype is torch.float32 or not hasattr(self.model, "peft_config"):
            yield
            return
        from peft.helpers import disable_input_dtype_casting

        with torch.autocast(self.device.type, self.model.dtype), disable_input_dtype_casting(self.model):
            yield

    def active_states(self, rows: Sequence[Sequence[int]], active: Sequence[int]) -> Tensor:
        """[rows, most active tokens, hidden] of the tokens that an activated adapter applies to, each row's from
        `active` on, padded on the right; as in `states`."""
        before = self.before([row[:first] for row, first in zip(rows, active, strict=True)])
        return self.after(before, [row[first:] for row, first in zip(rows, active, strict=True)])

    @torch.no_grad()
    def before(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """Keys and values of texts that the adapter does not apply to, each [layers, 2, heads, tokens, head_dim]:
        they are the frozen base's, and need no gradient."""
        if self.decoder is not None:
            return keys_and_values(self.decoder, rows, self.layers)
        ids, _ = padded(rows, 0, self.device)
        cache = DynamicCache()
        with self.model.disable_adapter():
            self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        whole = torch.stack([torch.stack((layer.keys, layer.values)) for layer in cache.layers])
        return [whole[:, :, number, :, : len(row)] for number, row in enumerate(rows)]

    def after(self, before: Sequence[Tensor], rows: Sequence[Sequence[int]]) -> Tensor:
        """[rows, tokens, hidden] of texts that an activated adapter applies to, behind what `before` gave of
        others."""
        ids, _ = padded(rows, 0, self.device)
        count, lengths = ids.shape[1], torch.tensor([one.shape[3] for one in before], device=self.device)
        layers, _, heads, _, dim = before[0].shape
        known = before[0].new_zeros((layers, 2, len(rows), heads, int(lengths.max()), dim))
        for number, one in enumerate(before):
            known[:, :, number, :, : one.shape[3]] = one
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(known):
            cache.update(keys, values, layer)
        there = torch.arange(known.shape[4], device=self.device) < lengths.unsqueeze(1)
        own = torch.ones(count, count, dtype=torch.bool, device=self.device).tril()
        seen = torch.cat((there.unsqueeze(1).expand(-1, count, -1), own.expand(len(rows), -1, -1)), 2)
        lowest = torch.finfo(self.model.dtype).min
        mask = torch.zeros(seen.shape, dtype=self.model.dtype, device=self.device).masked_fill(~seen, lowest)
        with self._products():
            out = self.model(
                input_ids=ids,
                attention_mask=mask.unsqueeze(1),
                position_ids=lengths.unsqueeze(1) + torch.arange(count, device=self.device),
                past_key_values=cache,
                use_cache=True,
                output_hidden_states=True,
                logits_to_keep=1,
            )
        return out.hidden_states[-1]

    def logits(self, ids: Tensor) -> Tensor:
        """[rows, tokens, vocabulary]; as in `states`."""
        with self._products():
            return self.model(input_ids=ids, use_cache=False).logits


def open_backbone(
    source: str | Path,
    *,
    layers: int | None = None,
    device: torch.device,
    dtype: torch.dtype,
) -> Backbone:
    """Read a checkpoint folder, a GGUF file or a bundle; of a LLaVA its language model.

    layers: how many of them to keep, None for all.
    Raises `BadInput` for layers it does not have, `UnknownArchitecture` for other families than `FAMILIES`, and any
    `CheckpointError`.
    """
    checkpoint = open_checkpoint(smol_folder() if str(source) in BUNDLES else source)
    config = copy.deepcopy(text_config(checkpoint.config))
    if config.model_type not in FAMILIES:
        raise UnknownArchitecture(f"{config.model_type} decoders are not trained here; {', '.join(FAMILIES)} are")
    config.tie_word_embeddings = is_tied(checkpoint.config, "lm_head.weight" in checkpoint.shapes)
    depth = config.num_hidden_layers
    if layers is not None and not 1 <= layers <= depth:
        raise BadInput(f"layer must be 1 to {depth}, the model's own, not {layers}")
    config.num_hidden_layers = layers or depth
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    with torch.device("cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    slots = dict(model.named_parameters())
    hasher = ContentHash()
    with torch.no_grad():
        for name, tensor in checkpoint.tensors(hasher):
            if name in slots:
                slots.pop(name).copy_(tensor)
    if slots:
        raise CheckpointMismatch(f"{source} lacks {', '.join(sorted(slots)[:3])}; a base is a whole language model")
    model.name_or_path = str(source)
    model.to(device)
    codec = codec_of(checkpoint)
    return Backbone(
        str(source),
        model,
        codec,
        hasher.hexdigest(),
        config.num_hidden_layers,
        config.max_position_embeddings,
        model.model.norm,
        model.lm_head,
        depth,
        device,
    )


def adapt(backbone: Backbone, recipe: Recipe, invocation: Sequence[int] = ()) -> Backbone:
    """The backbone with a fresh LoRA on `recipe.targets` of its layers from `recipe.first_layer` on, in fp32; the
    rest is frozen. For "full" nothing is added and everything is trained.

    Raises `MissingExtra` without `peft`; `BadInput` for a first layer above the last, and for an activated adapter on
    a model whose tokens see a window.
    """
    if recipe.adapter == "full":
        return backbone
    if recipe.first_layer >= backbone.layers:
        raise BadInput(
            f"the first layer with an adapter must be 0 to {backbone.layers - 1}, not {recipe.first_layer}"
        )
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise MissingExtra("adapters are trained with peft: pip install 'stockade[train]'") from None
    torch.manual_seed(recipe.seed)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=list(recipe.targets),
        layers_to_transform=list(range(recipe.first_layer, backbone.layers)),
        base_model_name_or_path=backbone.source,
    )
    if invocation:
        window = getattr(backbone.model.config, "sliding_window", None)
        if window is not None and window < backbone.context:
            raise BadInput(f"tokens of {backbone.source} see the last {window} only: no activated adapter is trained")
    if invocation or backbone.device.type == "cpu":
        # the fused kernel's backward alone takes a quarter of a step on a CPU, a third behind kept keys and values
        backbone.model.set_attn_implementation("eager")
    model = get_peft_model(backbone.model, config)
    model.peft_config["default"].base_model_name_or_path = backbone.source
    kept = invocation or recipe.first_layer
    decoder = native_decoder(backbone.source, backbone.model.dtype, backbone.device) if kept else None
    return replace(
        backbone, model=model, decoder=decoder, first_layer=recipe.first_layer, invocation=tuple(invocation)
    )


def take_adapter(backbone: Backbone, folder: Path) -> None:
    """Begin with the weights of a PEFT folder. Raises `BadInput` for another shape, and `CheckpointMissing`."""
    from peft import set_peft_model_state_dict

    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise CheckpointMissing(f"a run goes on from a LoRA; there is no {file}")
    state = load_file(file)
    own = {name.replace(".default", ""): value.shape for name, value in trainable(backbone.model).items()}
    if {name: value.shape for name, value in state.items()} != own:
        raise BadInput(f"{folder} holds a LoRA of another rank, or on other layers or maps, than is trained here")
    set_peft_model_state_dict(backbone.model, state)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
