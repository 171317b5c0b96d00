"""Which replica a request should go to: one that may hold its beginning in its pages, unless that has much to do.

Rendezvous hashing (Thaler and Ravishankar 1998): every key ranks all replicas by a hash of both. So one that comes or
goes moves its own keys only, and whoever routes finds the same without being told.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

BEGINNING = 512  # characters of a message that count


def affinity_key(tenant: str, body: bytes) -> str:
    """A hash of what a request's first pages hang on: whose it is, and what it says up to its first question, the
    first image included. So a conversation that goes on keeps its key.

    Of a body that is no request the key is of no use, and no error: whoever answers it will refuse it.
    """
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        asked = None
    whole = hashlib.sha256()
    for part in (tenant, *_parts(asked)):
        data = part.encode("utf-8", "surrogatepass")
        whole.update(len(data).to_bytes(8, "big") + data)
    return whole.hexdigest()


def ranked(key: str, loads: Mapping[str, int], spill: int) -> list[str]:
    """Replicas in the order in which they are to be asked. loads: requests under way, by replica. spill: how many
    more than the idlest one a replica may have before the next takes its place; those that have come last."""
    order = sorted(loads, key=lambda name: _weight(key, name), reverse=True)
    most = min(loads.values(), default=0) + spill
    return sorted(order, key=lambda name: loads[name] >= most)


def _weight(key: str, name: str) -> bytes:
    return hashlib.sha256(f"{key}\0{name}".encode()).digest()


def _parts(asked: Any) -> Iterator[str]:
    """Beginnings of texts, and the first image's URL, in a body of any endpoint."""
    if not isinstance(asked, dict):
        return
    for name in ("prompt", "input"):
        value = asked.get(name)
        if value is not None:
            yield (value if isinstance(value, str) else json.dumps(value))[:BEGINNING]
    image = False
    messages = asked.get("messages")
    for message in messages if isinstance(messages, list) else ():
        if not isinstance(message, dict):
            return
        content = message.get("content")
        for part in content if isinstance(content, list) else [{"text": content}]:
            if not isinstance(part, dict):
                return
            url = part.get("image_url")
            if isinstance(part.get("text"), str):
                yield part["text"][:BEGINNING]
            elif isinstance(url, dict) and isinstance(url.get("url"), str) and not image:
                image = True
                yield url["url"]
        if message.get("role") == "user":
            return
