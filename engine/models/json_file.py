"""JSON objects from untrusted files, with typed errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import CheckpointMissing, CheckpointTruncated


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `CheckpointMissing`, or `CheckpointTruncated` if it holds no JSON object."""
    if not path.is_file():
        raise CheckpointMissing(f"{path} is not there (or not a file)")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointTruncated(f"{path} is damaged or cut off: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointTruncated(f"{path} holds {type(value).__name__}, not an object")
    return value
