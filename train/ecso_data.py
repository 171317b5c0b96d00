"""ECSO as a data engine: unsafe queries in, pairs in LLaVA's format out, the answers made by the model itself."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..engine.engine import Engine
from ..engine.errors import BadInput, CacheWriteFailed, UnsupportedImage
from ..engine.guards import Guard
from ..engine.request import Outcome, Reply
from ..engine.sampling import SamplingParams
from .journal import Journal
from .loop import Progress
from .many import answer_many
from .rows import Bad, DataMissing, json_rows, refuse


class Query(NamedTuple):
    """image: its name under the folder of images."""

    text: str
    image: str | None


class Pairs(NamedTuple):
    """Pairs written: of first answers that the model found harmless, and of answers with eyes closed; and queries
    that were refused or failed, of which none is written."""

    clean: int
    mended: int
    refused: int


def read_queries(path: Path, bad: Bad = refuse) -> list[Query]:
    """Rows with query or question, and image where there is one. Raises `DataMissing` and `DataInvalid`."""
    found: dict[Query, None] = {}
    for where, row in json_rows(path, bad):
        text, image = row.get("query", row.get("question")), row.get("image")
        if isinstance(text, str) and text.strip() and (image is None or isinstance(image, str)):
            found[Query(text.strip(), image)] = None
        else:
            bad(f"{where}: needs query (or question), and image as a file's name where there is one")
    if not found:
        raise DataMissing(f"{path} holds no query")
    return list(found)


def make_pairs(
    engine: Engine,
    queries: Sequence[Query],
    images: Path | None,
    out: Path,
    *,
    sampling: SamplingParams,
    guard: Guard | None = None,
    progress: Progress | None = None,
) -> Pairs:
    """Answer the queries under ECSO and write `out`, a JSON list; a `.jsonl` file beside it keeps what is done, and
    the next run goes on from there. images: the folder that images must lie in. guard: ECSO
    with other settings.

    Raises `UnsupportedImage` for an image outside of it, `CacheWriteFailed`, `DataInvalid` for a foreign journal.
    """
    if out.suffix != ".json":
        raise BadInput(f"pairs are written to a file that ends in .json, not to {out}")
    with Journal(out.with_suffix(".jsonl")) as journal:
        keys = [hashlib.sha256(json.dumps(query).encode()).hexdigest()[:16] for query in queries]
        left = [place for place, key in enumerate(keys) if key not in journal.rows]
        chats = [_chat(queries[place], images) for place in left]
        for done, (number, reply) in enumerate(answer_many(engine, chats, guard or Guard.ecso(), sampling), 1):
            journal.add(keys[left[number]], _row(queries[left[number]], reply))
            if progress is not None:
                progress("answering", done, len(left))
        rows = [journal.rows[key] for key in keys]
    pairs = [
        {"id": row["key"], **{name: value for name, value in row.items() if name != "key"}}
        for row in rows
        if "conversations" in row
    ]
    _write(out, pairs)
    clean, mended = (
        sum(row.get("outcome") == outcome for row in rows) for outcome in (Outcome.CLEAN, Outcome.MENDED)
    )
    return Pairs(clean, mended, len(rows) - len(pairs))


def _chat(query: Query, images: Path | None) -> Any:
    if query.image is None:
        return query.text
    image = {"type": "image", "image": str(located(query.image, images))}
    return [{"role": "user", "content": [image, {"type": "text", "text": query.text}]}]


def located(name: str, images: Path | None) -> Path:
    """The file of an image. Raises `UnsupportedImage` unless it lies in the folder of images."""
    if images is None:
        raise UnsupportedImage(f"image {name[:80]!r}: give the folder that images lie in")
    path = (images / name).resolve()
    if not path.is_relative_to(images.resolve()) or not path.is_file():
        raise UnsupportedImage(f"{name[:80]!r} is no file in the folder of images, {images}")
    return path


def _row(query: Query, reply: Reply | BadInput) -> dict[str, Any]:
    if isinstance(reply, BadInput):
        return {"refused": str(reply)}
    if reply.outcome not in (Outcome.CLEAN, Outcome.MENDED) or not reply.text.strip():
        return {"refused": reply.error or str(reply.outcome)}
    shown = "" if query.image is None else "<image>\n"
    return {
        **({} if query.image is None else {"image": query.image}),
        "conversations": [
            {"from": "human", "value": shown + query.text},
            {"from": "gpt", "value": reply.text.strip()},
        ],
        "outcome": str(reply.outcome),
    }


def _write(out: Path, pairs: list[dict[str, Any]]) -> None:
    part = out.with_name(f".{out.name}.part")
    try:
        part.write_text(json.dumps(pairs, ensure_ascii=False, indent=1), encoding="utf-8")
        os.replace(part, out)
    except OSError as error:
        raise CacheWriteFailed(f"{out} could not be written: {error}") from error
