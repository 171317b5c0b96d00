import base64
import os
import struct
import zlib
from io import BytesIO
from typing import Any

import pytest
from PIL import Image

from stockade.engine.errors import (
    AnimatedImage,
    ImageTooLarge,
    TooManyPixels,
    TruncatedImage,
    UnreadableImage,
    UnsupportedImage,
)
from stockade.engine.images import ImageLimits, decode_base64, load_image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


def picture(mode: str = "RGB", size: tuple[int, int] = (24, 16)) -> Image.Image:
    image = Image.frombytes("RGB", size, bytes(i * 37 % 251 for i in range(size[0] * size[1] * 3)))
    return image.convert(mode)


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises width x height pixels and has hardly any."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


def test_every_kind_of_source_gives_the_same_image(tmp_path):
    data = encoded(picture())
    (tmp_path / "a.png").write_bytes(data)
    loaded = load_image(data)
    assert loaded.pixels.mode == "RGB"
    assert loaded.pixels.tobytes() == picture().tobytes()
    assert len(loaded.key) == 32
    path = tmp_path / "a.png"
    for source in (path, str(path), bytearray(data), memoryview(data), data_url(data), picture(), loaded):
        again = load_image(source)
        assert (again, again.key, hash(again)) == (loaded, loaded.key, hash(loaded))


def test_the_key_covers_size_and_pixels():
    keys = {load_image(image).key for image in (picture(), picture(size=(16, 24)), picture().rotate(180))}
    assert len(keys) == 3


@pytest.mark.parametrize("format", FORMATS)
def test_all_listed_formats_load(format):
    assert load_image(encoded(picture(), format)).pixels.size == (24, 16)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16", "CMYK"])
def test_modes_become_rgb_as_pillow_converts_them(mode):
    image = Image.new("I;16", (24, 16), 300) if mode == "I;16" else picture(mode)
    data = encoded(image, "JPEG" if mode == "CMYK" else "PNG")
    assert load_image(data).pixels.tobytes() == Image.open(BytesIO(data)).convert("RGB").tobytes()


def test_exif_orientation_is_applied_and_the_callers_image_left_alone():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(picture(), exif=exif)
    assert load_image(data).pixels.size == (16, 24)
    mine = picture()
    loaded = load_image(mine)
    mine.putpixel((0, 0), (9, 9, 9))
    assert loaded.pixels.tobytes() == picture().tobytes()


@pytest.mark.parametrize(
    "url", ["http://a/b.png", "HTTPS://a/b.png", "ftp://a/b", "file:///etc/hosts", "file:/etc/hosts", "s3://a/b"]
)
def test_remote_addresses_are_not_fetched(url):
    with pytest.raises(UnsupportedImage, match="not fetched"):
        load_image(url)


def test_bytes_are_bounded_for_every_source(tmp_path):
    data = encoded(picture(size=(64, 64)), "BMP")
    (tmp_path / "a.bmp").write_bytes(data)
    limits = ImageLimits(max_bytes=len(data) - 1)
    for source in (data, tmp_path / "a.bmp", data_url(data), "data:image/png;base64," + " " * 99999):
        with pytest.raises(ImageTooLarge, match="allowed"):
            load_image(source, limits)
    assert load_image(tmp_path / "a.bmp", ImageLimits(max_bytes=len(data)))


@pytest.mark.parametrize("size", [(40_000, 40_000), (6_000, 6_000), (2**31 - 1, 2**31 - 1)])
def test_pixels_are_bounded_before_decoding(size):
    with pytest.raises(TooManyPixels):
        load_image(png_header(*size))


def test_pixels_of_a_pillow_image_and_the_aspect_are_bounded():
    with pytest.raises(TooManyPixels, match="24x16"):
        load_image(picture(), ImageLimits(max_pixels=383))
    with pytest.raises(TooManyPixels, match="200 times"):
        load_image(Image.new("RGB", (1, 201)))
    loaded = load_image(picture())
    with pytest.raises(TooManyPixels):
        load_image(loaded, ImageLimits(max_pixels=383))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_animations_are_refused_as_bytes_and_as_pillow_image(format):
    data = encoded(picture(), format, save_all=True, append_images=[picture().rotate(180)])
    for source in (data, Image.open(BytesIO(data))):
        with pytest.raises(AnimatedImage):
            load_image(source)


def test_a_cameras_multi_picture_jpeg_is_its_first_picture():
    data = encoded(picture(), "MPO", save_all=True, append_images=[picture().rotate(180)])
    first = Image.open(BytesIO(data))
    assert load_image(data).pixels.tobytes() == first.convert("RGB").tobytes()


@pytest.mark.parametrize("format", ["TIFF", "ICO", "PPM", "JPEG2000"])
def test_formats_not_listed_never_reach_a_decoder(format, monkeypatch):
    data = encoded(picture(size=(32, 32)), format)
    monkeypatch.setattr(Image, "open", None)
    with pytest.raises(UnsupportedImage, match=format):
        load_image(data)
    with pytest.raises(UnsupportedImage, match="PNG"):
        load_image(encoded(picture()), ImageLimits(formats=("JPEG",)))


@pytest.mark.parametrize("data", [b"", b"hello", b"BM", b"GIF89a", bytes(64), b"\xff\xd8\xff" + bytes(99)])
def test_garbage_is_refused(data):
    with pytest.raises(UnreadableImage):
        load_image(data)


@pytest.mark.parametrize("format", FORMATS)
def test_cut_data_is_called_truncated(format):
    data = encoded(picture(size=(60, 40)), format)
    for length in (30, len(data) // 2, len(data) - 40):
        with pytest.raises(TruncatedImage, match=format):
            load_image(data[:length])


def test_damaged_but_complete_data_is_unreadable():
    data = bytearray(encoded(picture(size=(60, 40))))
    data[60:90] = bytes(30)
    with pytest.raises(UnreadableImage) as error:
        load_image(bytes(data))
    assert not isinstance(error.value, TruncatedImage)


def test_compressed_text_chunks_cannot_fill_the_memory():
    data = encoded(picture())
    body = b"k\0\0" + zlib.compress(bytes(80 << 20), 9)
    bomb = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    with pytest.raises(UnreadableImage):
        load_image(data[:33] + bomb + data[33:])


def test_images_without_pixels_are_unreadable():
    for source in (png_header(0, 8), Image.new("RGB", (0, 8))):
        with pytest.raises(UnreadableImage):
            load_image(source)


def test_only_regular_files_are_read(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (fifo, tmp_path, "/dev/zero", tmp_path / "none.png", "", "a\0b", "x" * 9999):
        with pytest.raises(UnreadableImage):
            load_image(path)
    with pytest.raises(UnsupportedImage, match="local files"):
        load_image(tmp_path / "none.png", ImageLimits(local_files=False))


def test_data_urls_and_base64_are_checked():
    data = encoded(picture())
    assert decode_base64(base64.encodebytes(data).decode().replace("=", "")) == data
    for url in ("data:image/png,abc", "data:image/png;base64", "data:"):
        with pytest.raises(UnsupportedImage):
            load_image(url)
    for body in ("!!!", "é", "A", "QUJD=QUJD"):
        with pytest.raises(UnreadableImage):
            load_image("data:image/png;base64," + body)


@pytest.mark.parametrize("source", [None, 3, ["a"], {"url": "x"}, object()])
def test_other_types_are_refused(source):
    with pytest.raises(UnsupportedImage, match="allowed"):
        load_image(source)
