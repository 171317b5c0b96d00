"""Pictures to learn reading from: lines of text and simple scenes, drawn at random, and where everything stands.

What a model should say about a picture, token by token, is not decided here.
"""

from __future__ import annotations

import importlib.util
import itertools
import random
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

from ..engine.errors import BadInput, MissingExtra
from ..engine.models.vision.letters import squared

Style = Literal["list", "page", "banner", "scene"]
# How often pictures have each style besides lists, of a hundred.
OTHERS: dict[Style, int] = {"page": 50, "banner": 16, "scene": 34}
OPENINGS = ("Methods to", "Steps to", "List of")  # of FigStep's lists
COLORS = {
    "red": (214, 39, 40),
    "green": (44, 150, 60),
    "blue": (40, 80, 200),
    "yellow": (240, 200, 30),
    "orange": (245, 130, 20),
    "purple": (130, 60, 170),
    "black": (20, 20, 20),
    "pink": (250, 140, 190),
}
SHAPES = ("circle", "square", "triangle", "star")
NUMBERS = ("one", "two", "three", "four")
_WORD = re.compile(r"""[("']?(?:[A-Za-z]+(?:['-][A-Za-z]+)*|\d{1,4})[.,;:!?)"']{0,2}""")
_MOST_LINES = 10
_ALIKE = 0.01  # share of a letter's width by which fonts may differ and still be set alike
LIST_WIDTH = 15  # characters of a line of FigStep's lists
_USUAL = 3.0  # how much more often the usual of single words come than the others: 1 is not at all
_CAPITALS = 0.15  # share of single words that begin with one
_ACROSS = 72  # pixels of a scene over which is said what a shape is


class Line(NamedTuple):
    """One line of text in a picture. y: of its middle; xs: of each character's middle; as shares of the picture."""

    text: str
    y: float
    xs: tuple[float, ...]


class Picture(NamedTuple):
    image: Image.Image
    style: Style
    lines: tuple[Line, ...]

    @property
    def text(self) -> str:
        return " ".join(line.text for line in self.lines)


@dataclass(frozen=True)
class Phrases:
    """Where words come from: running texts, and single words, the most usual first, strung together at random.
    strung: share of phrases made of single words."""

    texts: tuple[tuple[str, ...], ...]
    words: tuple[str, ...]
    strung: float

    @classmethod
    def of(cls, texts: Iterable[str], words: Iterable[str], strung: float) -> Phrases:
        """Keeps words and short numbers with the marks around them. Raises `BadInput` where there is no word."""
        split = (tuple(word for word in text.split() if _WORD.fullmatch(word)) for text in texts)
        kept = tuple(text for text in split if len(text) >= 3)
        single = tuple(word for word in words if _WORD.fullmatch(word))
        if not single:
            raise BadInput("the vocabulary has no word of plain letters to draw")
        return cls(kept, single, strung)

    def some(self, rng: random.Random, count: int) -> list[str]:
        """So many words, fewer where a text ends."""
        if not self.texts or rng.random() < self.strung:
            words = [self.words[int(len(self.words) * rng.random() ** _USUAL)] for _ in range(count)]
            return [word.capitalize() if rng.random() < _CAPITALS else word for word in words]
        text = rng.choice(self.texts)
        first = rng.randrange(max(1, len(text) - count + 1))
        return list(text[first : first + count])


class Face:
    """A font in one size. Characters stand beside each other without kerning, so their widths are measured once."""

    def __init__(self, file: Path, size: int) -> None:
        self.font = ImageFont.truetype(str(file), size, layout_engine=ImageFont.Layout.BASIC)
        # of a capital letter, by which Pillow spaces the lines of a text, and of a small one
        self.capital_below = self.font.getbbox("A")[3]
        _, self.above, _, self.below = self.font.getbbox("x")
        self._widths: dict[str, float] = {}

    def ends(self, text: str) -> list[float]:
        """Where each character ends, from the beginning of the text in pixels."""
        for mark in set(text) - self._widths.keys():
            self._widths[mark] = self.font.getlength(mark)
        return list(itertools.accumulate(self._widths[mark] for mark in text))


class Painter:
    """Draws pictures, and shrinks them to squares of so many `pixels` a side, as a tower sees them.

    fonts: of any text; list_fonts: of lists in FigStep's style, its own first; lists: their share of all pictures.
    """

    def __init__(
        self, fonts: Sequence[Path], list_fonts: Sequence[Path], phrases: Phrases, pixels: int, lists: float
    ) -> None:
        self.fonts = tuple(fonts)
        self.list_fonts = tuple(list_fonts)
        self.phrases = phrases
        self.pixels = pixels
        self.lists = lists
        self._faces: dict[tuple[Path, int], Face] = {}

    def draw(self, rng: random.Random, style: Style | None = None) -> Picture:
        """One picture, of the given style if there is one."""
        if style is None:
            style = "list" if rng.random() < self.lists else rng.choices(list(OTHERS), list(OTHERS.values()))[0]
        if style == "scene":
            return scene(rng)
        picture = {"list": self._list, "page": self._page, "banner": self._banner}[style](rng)
        small = ImageOps.contain(picture.image, (self.pixels, self.pixels), Image.Resampling.BICUBIC)
        return _squared(picture, _worn(small, rng, 0.15 if style == "list" else 0.5), self.pixels)

    def listed(self, text: str, items: bool) -> Picture:
        """A text as FigStep draws it, with three empty items below or without."""
        below = ["1.", "2.", "3."] if items else []
        lines = textwrap.wrap(text, LIST_WIDTH)[: _MOST_LINES - len(below)] + below
        return self._text(lines, self.list_fonts[0], 40, (380, 380), 10, 5, 5, "list")

    def _face(self, file: Path, size: int) -> Face:
        if (file, size) not in self._faces:
            self._faces[file, size] = Face(file, size)
        return self._faces[file, size]

    def _items(self, rng: random.Random) -> list[str]:
        """The lines of a list: an opening, words, and three empty items, or not."""
        opening = [rng.choice(OPENINGS)] if rng.random() < 0.7 else []
        items = ["1.", "2.", "3."] if rng.random() < 0.4 else []
        most = 9 if items else 26
        phrase = " ".join([*opening, *self.phrases.some(rng, rng.randint(2, most) if rng.random() < 0.4 else most)])
        return textwrap.wrap(phrase.rstrip(".") + ".", LIST_WIDTH)[: _MOST_LINES - len(items)] + items

    def _list(self, rng: random.Random) -> Picture:
        """FigStep's: 760 x 760, 80 pixels, wrapped at 15 characters, three empty items; most half as large."""
        lines = self._items(rng)
        chance = rng.random()
        file = self.list_fonts[0] if chance < 0.5 else rng.choice(self.list_fonts if chance < 0.9 else self.fonts)
        part = 1 if rng.random() < 0.3 else 2
        size = 80 if file in self.list_fonts and rng.random() < 0.9 else rng.randint(66, 80)
        left, top = (20, 10) if rng.random() < 0.88 else (rng.randint(5, 40), rng.randint(2, 30))
        page = (760 // part, 760 // part)
        return self._text(lines, file, size // part, page, left // part, top // part, 11 // part, "list")

    def _page(self, rng: random.Random) -> Picture:
        """Any font and place, one to ten lines on a square or nearly square page."""
        width = rng.randint(250, 340)
        height = round(width * rng.uniform(0.8, 1.25))
        size = round(max(width, height) * rng.uniform(0.07, 0.1))
        characters = max(6, int(width * 0.92 / (size * 0.55)))
        most = max(1, min(_MOST_LINES, int(height * 0.95 / max(size * 1.2, max(width, height) / _MOST_LINES))))
        fitting = max(2, most * characters // 5)
        words = self.phrases.some(rng, rng.randint(1, fitting) if rng.random() < 0.3 else fitting)
        return self._text(
            textwrap.wrap(" ".join(words), characters)[:most],
            rng.choice(self.fonts),
            size,
            (width, height),
            rng.randint(8, 24),
            rng.randint(6, 24),
            rng.randint(1, 10),
            "page",
            centered=rng.random() < 0.3,
            upper=rng.random() < 0.05,
        )

    def _banner(self, rng: random.Random) -> Picture:
        """MM-SafetyBench's: a key phrase of one to three lines, black on white, wider than high."""
        width, size = 400, rng.randint(28, 46)
        characters = max(6, int(width * 0.92 / (size * 0.55)))
        lines = textwrap.wrap(" ".join(self.phrases.some(rng, rng.randint(1, 6))), characters)[:3]
        height = round(len(lines) * size * rng.uniform(1.2, 1.5) + rng.randint(8, 50))
        return self._text(
            lines,
            rng.choice(self.fonts),
            size,
            (width, height),
            12,
            rng.randint(4, 12),
            rng.randint(3, 10),
            "banner",
            centered=rng.random() < 0.5,
        )

    def _text(
        self,
        lines: Sequence[str],
        file: Path,
        size: int,
        page: tuple[int, int],
        left: int,
        top: int,
        gap: int,
        style: Style,
        centered: bool = False,
        upper: bool = False,
    ) -> Picture:
        image = Image.new("L", page, 255)
        draw = ImageDraw.Draw(image)
        face = self._face(file, size)
        pitch = face.capital_below + gap
        if (style, file) != ("list", self.list_fonts[0]):  # no two lines may stand in one row of a tower's patches
            pitch = max(pitch, max(page) / _MOST_LINES * 1.02)
        if upper:
            lines = [line.upper() for line in lines]
        placed = _laid_out(lines, face, page, left, top, pitch, centered)
        for x, y, line in placed:
            draw.text((x, y), line.text, font=face.font, fill=0)
        return Picture(image, style, tuple(line for _, _, line in placed))


def _laid_out(
    lines: Sequence[str],
    face: Face,
    page: tuple[int, int],
    left: int,
    top: int,
    pitch: float,
    centered: bool = False,
) -> list[tuple[float, float, Line]]:
    """Left and upper edge of each line in pixels, and the line. Lines that do not fit are left out; so are words
    beyond the right edge."""
    width, height = page
    placed = []
    for number, text in enumerate(lines):
        ends = face.ends(text)
        while text and ends[len(text) - 1] > width - left - 2:
            text = text.rpartition(" ")[0]
        y = top + number * pitch
        if not text or y + face.below > height:
            break
        ends = ends[: len(text)]
        x = (width - ends[-1]) / 2 if centered else left
        middles = tuple((x + (begin + end) / 2) / width for begin, end in zip([0, *ends], ends, strict=False))
        placed.append((x, y, Line(text, (y + (face.above + face.below) / 2) / height, middles)))
    return placed


def _squared(picture: Picture, shrunk: Image.Image, pixels: int) -> Picture:
    """A picture, shrunk, and all that is said of it, in a square."""
    width, height = shrunk.size

    def moved(share: float, of: int) -> float:
        return (share * of + (pixels - of) / 2) / pixels

    lines = tuple(
        Line(line.text, moved(line.y, height), tuple(moved(x, width) for x in line.xs)) for line in picture.lines
    )
    return Picture(squared(shrunk.convert("RGB"), pixels), picture.style, lines)


def drawn(painter: Painter, seed: str, number: int) -> Picture:
    """The picture of that number, always the same."""
    return painter.draw(random.Random(f"{seed} picture {number}"))


def scene(rng: random.Random) -> Picture:
    """One to three groups of equal shapes on a light ground. Across the place where a shape stands its lines say how
    many there are of its kind, its color, and what it is: "3 red star"."""
    image = Image.new("RGB", (240, 240), tuple(rng.randint(225, 255) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    kinds = rng.sample([(color, shape) for color in COLORS for shape in SHAPES], rng.randint(1, 3))
    drawn = [kind for kind in kinds for _ in range(rng.randint(1, 3 if len(kinds) == 3 else len(NUMBERS)))]
    rng.shuffle(drawn)
    rows: dict[int, list[tuple[int, str]]] = {}
    for cell, (color, shape) in zip(sorted(rng.sample(range(9), len(drawn))), drawn, strict=True):
        row, column = divmod(cell, 3)
        radius = rng.uniform(18, 36)
        _shape(draw, shape, column * 80 + 40, row * 80 + 40, radius, COLORS[color])
        rows.setdefault(row, []).append((column, f"{drawn.count((color, shape))} {color} {shape}"))
    lines = []
    for row, beside in rows.items():
        xs = [
            (column * 80 + 40 + _ACROSS * ((place + 0.5) / len(name) - 0.5)) / 240
            for column, name in beside
            for place in range(len(name) + 1)
        ]
        lines.append(Line(" ".join(name for _, name in beside), (row * 80 + 40) / 240, tuple(xs[:-1])))
    return Picture(image, "scene", tuple(lines))


def _shape(draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, color: tuple[int, int, int]) -> None:
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=color)
    elif shape == "square":
        draw.rectangle((x - r * 0.88, y - r * 0.88, x + r * 0.88, y + r * 0.88), fill=color)
    else:
        points = 3 if shape == "triangle" else 10
        radii = [r if points == 3 or point % 2 == 0 else r * 0.42 for point in range(points)]
        angles = [2 * np.pi * point / points - np.pi / 2 for point in range(points)]
        draw.polygon([(x + a * np.cos(t), y + a * np.sin(t)) for a, t in zip(radii, angles, strict=True)], fill=color)


def _worn(image: Image.Image, rng: random.Random, share: float) -> Image.Image:
    """A share of text pictures gets other colors, blur or noise; the rest stays black on white."""
    if rng.random() >= share:
        return image
    if rng.random() < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.7)))
    grey = np.asarray(image, dtype=np.float32)[..., None] / 255  # [height, width, 1]
    dark = np.array([rng.randint(0, 90) for _ in range(3)], dtype=np.float32)
    light = np.array([rng.randint(190, 255) for _ in range(3)], dtype=np.float32)
    if rng.random() < 0.2:
        dark, light = light, dark
    pixels = dark + (light - dark) * grey
    if rng.random() < 0.4:
        noise = np.random.default_rng(rng.getrandbits(32)).standard_normal(pixels.shape[:2], dtype=np.float32)
        pixels = pixels + noise[..., None] * rng.uniform(3, 18)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8), "RGB")


def usable_fonts(folders: Iterable[Path]) -> tuple[Path, ...]:
    """Every font file below the folders that has plain letters, by name.

    Raises `BadInput` where there is none.
    """
    files = sorted(
        {file for folder in folders for file in Path(folder).rglob("*") if file.suffix.lower() in (".ttf", ".otf")}
    )
    found = tuple(file for file in files if _draws_letters(file))
    if not found:
        raise BadInput("no usable font; --fonts takes folders with .ttf or .otf files of Latin letters")
    return found


def default_fonts() -> tuple[Path, ...]:
    """DejaVu's, which come with matplotlib. Raises `MissingExtra` without it."""
    found = importlib.util.find_spec("matplotlib")
    for place in (found.submodule_search_locations or ()) if found else ():
        files = sorted((Path(place) / "mpl-data" / "fonts" / "ttf").glob("DejaVu*.ttf"))
        fonts = tuple(file for file in files if "Display" not in file.name)
        if fonts:
            return fonts
    raise MissingExtra("without --fonts the fonts of matplotlib are used: pip install 'stockade[demo]'")


def letter_fonts(fonts: Sequence[Path]) -> tuple[Path, ...]:
    """Fonts whose letters are as wide as those of the first, which is FigStep's FreeMonoBold if it is there, else one
    whose letters are equally wide, bold if there is one."""

    def widths(file: Path) -> tuple[float, float]:
        face = ImageFont.truetype(str(file), 240)
        return face.getlength("i"), face.getlength("W")

    known = {file: widths(file) for file in fonts}
    first = max(
        fonts, key=lambda file: (file.stem == "FreeMonoBold", known[file][0] == known[file][1], "Bold" in file.stem)
    )
    narrow, wide = known[first]
    like = [file for file in fonts if max(abs(known[file][0] - narrow), abs(known[file][1] - wide)) <= _ALIKE * wide]
    return (first, *(file for file in like if file != first))


def _draws_letters(file: Path) -> bool:
    try:
        face = ImageFont.truetype(str(file), 24)
        missing = bytes(face.getmask("\uffff"))
        return all(bytes(face.getmask(mark)) != missing for mark in "aegQWxyz059.,'-")
    except (OSError, ValueError):
        return False
