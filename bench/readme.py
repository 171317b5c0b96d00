"""A README's tables of measurements, between markers, and its pictures: made from documents by one command.

`<!-- bench: NAME -->` … `<!-- /bench -->` holds what NAME.json says; `<!-- bench: NAME N -->` only its table number
N, counted from 0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from .document import BadDocument, Document
from .pictures import pictures
from .result_tables import provenance, tables

_BLOCK = re.compile(r"(<!-- bench: (?P<name>[\w.-]+)(?: (?P<number>\d+))? -->\n).*?(<!-- /bench -->)", re.DOTALL)
_PICTURE = re.compile(r"!\[[^\]]*\]\(((?:[^)]*/)?bench-[^)/]+\.png)\)")


def filled(text: str, documents: Mapping[str, Document]) -> str:
    """The text with everything between markers made anew. Raises `BadDocument` for a name or number without table."""

    def block(match: re.Match[str]) -> str:
        name, number = match["name"], match["number"]
        if name not in documents:
            raise BadDocument(f"the README shows {name!r}; there are {', '.join(documents) or 'no documents'}")
        document = documents[name]
        known = tables(document)
        try:
            chosen = known if number is None else [known[int(number)]]
        except IndexError:
            raise BadDocument(f"{name} has {len(known)} tables; the README shows number {number}") from None
        command = f"`{document.command.split(' --json')[0]}`: {provenance(document)}."
        body = "\n\n".join([command, *(table.markdown() for table in chosen)])
        return f"{match[1]}{body}\n{match[4]}"

    return _BLOCK.sub(block, text)


def write_readme(readme: Path, documents: Mapping[str, Document]) -> list[Path]:
    """Make tables, and the pictures that the text shows, anew; returns the pictures' files. A picture is a link to
    `bench-NAME-PICTURE.png`, NAME that of a document. Raises `BadDocument`, ImportError without matplotlib, and
    OSError."""
    text = filled(readme.read_text(encoding="utf-8"), documents)
    known = {
        f"bench-{name}-{picture.name}.png": picture
        for name, document in documents.items()
        for picture in pictures(document)
    }
    written = []
    for shown in _PICTURE.findall(text):
        file = readme.parent / shown
        if file.name not in known:
            raise BadDocument(f"the README shows {file.name}; there are {', '.join(known) or 'no pictures'}")
        file.write_bytes(known[file.name].png())
        written.append(file)
    readme.write_text(text, encoding="utf-8")
    return written
