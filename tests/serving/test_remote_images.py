"""Images from the network: listed origins only, public addresses only, within size and time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from stockade.engine.errors import BadInput, ImageTooLarge, UnreadableImage, UnsupportedImage
from stockade.engine.serving.remote_images import RemoteImages, is_public
from tests.serving.live import picture


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/elsewhere":
            self.send_response(302)
            self.send_header("Location", "/picture")
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        if self.path == "/picture":
            self.wfile.write(picture())
        elif self.path == "/large":
            self.wfile.write(b"x" * 300_000)
        elif self.path == "/slow":
            for _ in range(100):
                self.wfile.write(b"x")
                time.sleep(0.02)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            pass

    with Quiet(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def source(port: int, **options: Any) -> RemoteImages:
    """One that takes this machine for the public internet."""
    return RemoteImages(
        frozenset({f"http://images.test:{port}"}),
        **{"addresses": lambda *_: ["127.0.0.1"], "allowed": lambda _: True, "timeout": 5.0, **options},
    )


def test_an_image_of_a_listed_origin_is_fetched(port: int) -> None:
    assert source(port).fetch(f"http://images.test:{port}/picture") == picture()


@pytest.mark.parametrize(
    "url",
    [
        "http://other.test/picture",
        "https://images.test/picture",
        "http://images.test/picture",
        "http://images.test:PORT@evil.test/picture",
        "http://user@images.test:PORT/picture",
        "http://images.test:PORT\\@evil.test/",
        "ftp://images.test:PORT/picture",
        "file:///etc/passwd",
        "/etc/passwd",
        "http://127.0.0.1:PORT/picture",
        "http://images.test:PORT/a\r\nHost: evil.test",
        "http://images.test:99999/",
        "http://[::1/",
        "http://images.tes\u0442:PORT/picture",
        "",
    ],
)
def test_any_other_address_is_refused_before_anything_is_asked(port: int, url: str) -> None:
    def never(*_: Any) -> list[str]:
        raise AssertionError("nothing is looked up")

    with pytest.raises(UnsupportedImage):
        source(port, addresses=never).fetch(url.replace("PORT", str(port)))


def test_a_listed_name_that_points_inside_is_refused(port: int) -> None:
    for inside in ("127.0.0.1", "10.0.0.8", "169.254.169.254", "::1", "fd00::1", "::ffff:127.0.0.1", "0.0.0.0"):
        found = source(port, addresses=lambda *_, i=inside: ["93.184.216.34", i], allowed=is_public)
        with pytest.raises(UnsupportedImage, match="public"):
            found.fetch(f"http://images.test:{port}/picture")


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        ("192.168.1.1", False),
        ("100.64.0.1", False),
        ("224.0.0.1", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("fe80::1%eth0", False),
        ("ff02::1", False),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::a9fe:a9fe", False),
        ("2002:7f00:1::", False),
        ("::ffff:10.0.0.1", False),
    ],
)
def test_what_is_public(address: str, public: bool) -> None:
    assert is_public(address) == public


def test_redirects_large_files_and_slow_servers_are_refused(port: int) -> None:
    with pytest.raises(UnreadableImage, match="302"):
        source(port).fetch(f"http://images.test:{port}/elsewhere")
    with pytest.raises(ImageTooLarge):
        source(port, max_bytes=100_000).fetch(f"http://images.test:{port}/large")
    began = time.monotonic()
    with pytest.raises(UnreadableImage):
        source(port, timeout=0.3).fetch(f"http://images.test:{port}/slow")
    assert time.monotonic() - began < 1.5


def test_a_name_that_is_not_known_and_a_port_where_nobody_listens_say_no_more_than_that(port: int) -> None:
    def unknown(*_: Any) -> list[str]:
        raise OSError("internal.corp: no such host")

    with pytest.raises(UnreadableImage) as refused:
        source(port, addresses=unknown).fetch(f"http://images.test:{port}/picture")
    assert "corp" not in str(refused.value)
    with pytest.raises(UnreadableImage):
        RemoteImages(frozenset({"http://images.test:1"}), addresses=lambda *_: ["127.0.0.1"], allowed=bool).fetch(
            "http://images.test:1/x"
        )


def test_origins_that_are_none_are_refused() -> None:
    for origin in ("images.test", "https://images.test/", "https://images.test:443", "ftp://images.test", "https://"):
        with pytest.raises(BadInput):
            RemoteImages(frozenset({origin}))
