"""Rows that are written one by one as they are made, and found again when the work goes on after an interruption."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..engine.errors import CacheWriteFailed
from .rows import DataInvalid, json_rows


class Journal:
    """A file of JSON lines, each with a `key`. rows: those that are there, by key.

    Raises `DataInvalid` for a file of something else, `CacheWriteFailed` where it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                _cut_torn_line(path)
                self.rows = {_key(where, row): row for where, row in json_rows(path)}
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise CacheWriteFailed(f"{path} cannot be written: {error}") from error

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Write a row; it is on disk when this returns."""
        self.rows[key] = {"key": key, **row}
        try:
            self._file.write(json.dumps(self.rows[key], ensure_ascii=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise CacheWriteFailed(f"{self.path} cannot be written: {error}") from error

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()


def _key(where: str, row: dict[str, Any]) -> str:
    key = row.get("key")
    if not isinstance(key, str):
        raise DataInvalid(f"{where} has no key: the file is of something else; give a new one")
    return key


def _cut_torn_line(path: Path) -> None:
    """What was being written when the work was killed: the last line, if nothing ends it."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
