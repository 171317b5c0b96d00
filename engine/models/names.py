"""One spelling for every parameter: the hub's older names and today's, brought to canonical names.

Canonical: `model.embed_tokens.weight`, `model.layers.{i}.…`, `model.norm.weight`, `lm_head.weight`, `score.weight`;
for eyes the names of `transformers` without `model.` before them, and without `vision_model.` after `vision_tower.`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..errors import CheckpointMismatch

# The first rule that matches wins. Left: what files have held since 2023; right: canonical.
_RULES = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"^(?:model\.)?vision_tower\.(?:vision_model\.)?", "vision_tower."),
        (r"^(?:model\.)?(multi_modal_projector|visual|connector|vision_model)\.", r"\1."),
        (r"^model\.image_newline$", "image_newline"),
        (r"^(?:model\.)?language_model\.(?=model\.|lm_head\.|score\.)", ""),
        (r"^model\.(?:language_model|text_model)\.", "model."),
    )
)
# Buffers that old releases saved; every implementation computes them anew.
_BUFFERS = re.compile(r"(?:^|\.)(?:rotary_emb\.inv_freq|masked_bias|position_ids)$")


def canonical_name(stored: str) -> str | None:
    """The canonical name of a stored tensor; None for a buffer that is no parameter."""
    if _BUFFERS.search(stored):
        return None
    for pattern, new in _RULES:
        name, hits = pattern.subn(new, stored, count=1)
        if hits:
            return name
    return stored


def canonical_names(stored: Iterable[str]) -> dict[str, str]:
    """Canonical name → stored name, without buffers. Raises `CheckpointMismatch` when two names become one."""
    names: dict[str, str] = {}
    for name in stored:
        canonical = canonical_name(name)
        if canonical is None:
            continue
        if canonical in names:
            raise CheckpointMismatch(f"{names[canonical]!r} and {name!r} both name the parameter {canonical!r}")
        names[canonical] = name
    return names
