"""Untrusted images become RGB pixels with a content key; every bound is checked before a decoder runs.

Nothing is ever fetched from a network, and nothing here knows a model or its image processor.
"""

from __future__ import annotations

import binascii
import os
import re
import stat
from dataclasses import dataclass, field
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image, ImageOps

from .errors import (
    AnimatedImage,
    BadImage,
    ImageTooLarge,
    TooManyPixels,
    TruncatedImage,
    UnreadableImage,
    UnsupportedImage,
)

ImageSource: TypeAlias = "str | Path | bytes | bytearray | memoryview | Image.Image | LoadedImage"


@dataclass(frozen=True, eq=False)
class LoadedImage:
    """RGB pixels, upright and fully decoded; equal to any image with the same key."""

    pixels: Image.Image = field(repr=False)
    key: bytes  # blake2b (32 bytes) over the size and the raw RGB bytes

    def __eq__(self, other: object) -> bool:
        return self.key == other.key if isinstance(other, LoadedImage) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.key)


@dataclass(frozen=True)
class ImageLimits:
    """What an image may be. A server sets `local_files=False`, so that no client can name its files."""

    max_bytes: int = 20 << 20
    max_pixels: int = 32_000_000
    formats: tuple[str, ...] = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # Pillow's names
    max_images: int = 16  # in one chat, whatever the model takes
    max_aspect: int = 200  # longer side / shorter side: processors scale the shorter one up
    local_files: bool = True


def load_image(source: ImageSource, limits: ImageLimits | None = None) -> LoadedImage:
    """Decode one still image, turned upright by its EXIF tag and converted to RGB.

    `source` is a path, a `data:` URL, the file's bytes, a Pillow image or an image loaded before. Raises
    `UnsupportedImage`, `UnreadableImage`, `TruncatedImage`, `ImageTooLarge`, `TooManyPixels`, `AnimatedImage`.
    """
    limits = limits or ImageLimits()
    if isinstance(source, LoadedImage):
        _check_size(source.pixels.size, limits)
        return source
    if isinstance(source, Image.Image):
        return _finish(source, limits, data=None)
    if isinstance(source, str) and source[:5].lower() == "data:":
        return _decode(_data_url(source, limits), limits)
    if isinstance(source, str) and re.match(r"\s*(https?|ftps?|file|s3|gs):|\s*[A-Za-z][\w+.-]*://", source, re.I):
        scheme = source.split(":", 1)[0].strip()
        raise UnsupportedImage(
            f"{scheme}: URLs are not fetched; send the image as a data: URL, as bytes or as a local path"
        )
    if isinstance(source, str | Path):
        return _decode(_read(source, limits), limits)
    if isinstance(source, bytes | bytearray | memoryview):
        _check_bytes(memoryview(source).nbytes, limits)
        return _decode(bytes(source), limits)
    raise UnsupportedImage(
        f"{type(source).__name__} is not an image; allowed: a path, a data: URL, bytes or a Pillow image"
    )


def decode_base64(text: str, limits: ImageLimits | None = None) -> bytes:
    """The bytes of an image sent as base64; the length is checked before anything is decoded."""
    limits = limits or ImageLimits()
    if len(text) > limits.max_bytes * 2:  # generous: line breaks may stand between the characters
        raise ImageTooLarge(f"the image's base64 has {len(text)} characters; allowed: {limits.max_bytes} bytes")
    packed = "".join(text.split()).rstrip("=")
    _check_bytes(len(packed) * 3 // 4, limits)
    try:
        return binascii.a2b_base64(packed + "=" * (-len(packed) % 4), strict_mode=True)
    except ValueError as error:  # binascii.Error, or characters outside ASCII
        raise UnreadableImage(f"the image's base64 cannot be decoded: {error}") from None


def _data_url(url: str, limits: ImageLimits) -> bytes:
    head, comma, body = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise UnsupportedImage("a data: URL of an image must look like data:image/png;base64,...")
    return decode_base64(body, limits)


def _read(path: str | Path, limits: ImageLimits) -> bytes:
    if not limits.local_files:
        raise UnsupportedImage("local files are not accepted here; send the image as a data: URL")
    name = repr(str(path))[:120]
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # before opening: opening a device can have effects
            raise UnreadableImage(f"{name} is not a regular file")
        # A FIFO put there in between must neither block us nor pass for a file.
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise UnreadableImage(f"{name} is not a regular file")
            _check_bytes(status.st_size, limits)
            data = file.read(limits.max_bytes + 1)
    except BadImage:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UnreadableImage(f"cannot read the image file {name}: {reason}") from None
    _check_bytes(len(data), limits)
    return data


def _decode(data: bytes, limits: ImageLimits) -> LoadedImage:
    allowed = ", ".join(limits.formats)
    kind = _kind(data)
    if kind is None:
        raise UnreadableImage(f"the data is no image ({len(data)} bytes); allowed formats: {allowed}")
    if kind not in limits.formats:
        raise UnsupportedImage(f"{kind} images are not accepted; allowed formats: {allowed}")
    try:
        image = Image.open(BytesIO(data), formats=[kind])  # one decoder, and only its header part runs
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooManyPixels(f"{error}; allowed: {limits.max_pixels} pixels") from None
    except Exception as error:  # a decoder fed with hostile bytes raises whatever it likes
        raise _damaged(data, kind, error) from None
    return _finish(image, limits, data)


def _finish(image: Image.Image, limits: ImageLimits, data: bytes | None) -> LoadedImage:
    _check_size(image.size, limits)
    try:
        # A camera's MPO is a JPEG photo with previews behind it; its first picture is the image.
        if image.format != "MPO" and getattr(image, "is_animated", False):
            raise AnimatedImage("the image has more than one frame; send a still image")
        image.load()
        pixels = ImageOps.exif_transpose(image).convert("RGB")
    except BadImage:
        raise
    except Exception as error:
        if data is None:
            raise UnreadableImage(f"the Pillow image cannot be converted to RGB: {error}") from None
        raise _damaged(data, _kind(data) or "", error) from None
    _check_size(pixels.size, limits)  # a decoder may find frames larger than the header said
    key = blake2b(repr(pixels.size).encode(), digest_size=32)
    key.update(pixels.tobytes())
    return LoadedImage(pixels, key.digest())


def _check_bytes(size: int, limits: ImageLimits) -> None:
    if size > limits.max_bytes:
        raise ImageTooLarge(f"the image has {size} bytes; allowed: {limits.max_bytes}")


def _check_size(size: tuple[int, int], limits: ImageLimits) -> None:
    width, height = size
    if width <= 0 or height <= 0:
        raise UnreadableImage(f"the image has no pixels ({width}x{height})")
    if width * height > limits.max_pixels:
        raise TooManyPixels(f"the image is {width}x{height} pixels; allowed: {limits.max_pixels} in all")
    if max(size) > limits.max_aspect * min(size):
        raise TooManyPixels(
            f"the image is {width}x{height} pixels; its longer side may be at most {limits.max_aspect} times"
            " the shorter one"
        )


_SIGNATURES: tuple[tuple[str, str], ...] = (
    ("PNG", r"\x89PNG\r\n\x1a\n"),
    ("JPEG", r"\xff\xd8\xff"),
    ("WEBP", r"RIFF....WEBP"),
    ("GIF", r"GIF8[79]a"),
    ("BMP", r"BM"),
    ("TIFF", r"II[*+]\0|MM\0[*+]"),
    ("AVIF", r"....ftypavi[fs]"),
    ("HEIF", r"....ftyp(hei|hev|mif|msf)"),
    ("JPEG2000", r"\0\0\0\x0cjP  |\xff\x4f\xff\x51"),
    ("JXL", r"\xff\x0a|\0\0\0\x0cJXL "),
    ("ICO", r"\0\0[\1\2]\0"),
    ("PSD", r"8BPS"),
    ("PPM", r"P[1-7]\s"),
    ("PDF", r"%PDF-"),
    ("EPS", r"%!PS"),
    ("SVG", r"(\xef\xbb\xbf)?\s*<(svg|\?xml|!--|!DOCTYPE svg)"),
)


def _kind(data: bytes) -> str | None:
    """Pillow's name of the format, by signature alone: decoders that are not allowed never see the data."""
    head = data[:1024].decode("latin-1")
    return next((name for name, pattern in _SIGNATURES if re.match(pattern, head, re.S)), None)


def _damaged(data: bytes, kind: str, error: Exception) -> BadImage:
    """Data that stops before its format says it ends is cut; anything else is damaged in another way."""
    ends: dict[str, Any] = {
        "PNG": lambda: b"IEND" in data[-12:],
        "JPEG": lambda: data.rstrip(b"\0").endswith(b"\xff\xd9"),
        "WEBP": lambda: len(data) >= 8 + int.from_bytes(data[4:8], "little"),
        "GIF": lambda: data.rstrip(b"\0").endswith(b";"),
        "BMP": lambda: len(data) >= max(54, int.from_bytes(data[2:6], "little")),
    }
    if kind in ends and not ends[kind]():
        return TruncatedImage(f"the {kind} data ends early, after {len(data)} bytes; send the whole file")
    return UnreadableImage(f"the {kind} image cannot be decoded: {error}")
