"""Images from the network, for operators who allow it: from listed origins, public addresses, within size and time.

A host is resolved once and the connection goes to the address that was checked, so that a name cannot point
somewhere else a moment later. Redirects are not followed.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from urllib.parse import SplitResult, urlsplit

from ..errors import BadImage, BadInput, ImageTooLarge, UnreadableImage, UnsupportedImage

_PORTS = {"https": 443, "http": 80}


def resolve(host: str, port: int) -> list[str]:
    """The host's addresses. Raises OSError."""
    return [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def is_public(address: str) -> bool:
    """Whether an address is of the public internet: none of a private network, this machine, or a special range."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        # An IPv6 address may stand for an IPv4 one, in three ways.
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo[1] if found.teredo else None)
        if inner is not None:
            return is_public(str(inner))
        if found in ipaddress.ip_network("64:ff9b::/96"):
            return is_public(str(ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)))
    return found.is_global and not found.is_multicast and not found.is_reserved


@dataclass(frozen=True)
class RemoteImages:
    """origins: `https://host` or `https://host:port`, the only ones that are asked. timeout: seconds in all.

    Raises `BadInput` for an origin that is none.
    """

    origins: frozenset[str]
    max_bytes: int = 10 << 20
    timeout: float = 5.0
    addresses: Callable[[str, int], list[str]] = resolve
    allowed: Callable[[str], bool] = is_public

    def __post_init__(self) -> None:
        for origin in self.origins:
            if _origin(_split(origin)) != origin:
                raise BadInput(f"an image origin looks like https://images.example.com, not {origin!r}")

    def fetch(self, url: str) -> bytes:
        """The file behind a URL; blocks. Raises `UnsupportedImage`, `UnreadableImage`, `ImageTooLarge`."""
        parts = _split(url)
        if _origin(parts) not in self.origins:
            raise UnsupportedImage("images from this address are not fetched here; send a data: URL")
        host, port = parts.hostname or "", parts.port or _PORTS[parts.scheme]
        ends = monotonic() + self.timeout
        try:
            found = self.addresses(host, port)
            if not found or not all(self.allowed(address) for address in found):
                raise UnsupportedImage("images are fetched from public addresses only")
            return self._get(parts, host, port, found[0], ends)
        except BadImage:
            raise
        except (OSError, http.client.HTTPException, ValueError):
            raise UnreadableImage("the image could not be fetched") from None

    def _get(self, parts: SplitResult, host: str, port: int, address: str, ends: float) -> bytes:
        connection = http.client.HTTPConnection(host, port)
        plain = socket.create_connection((address, port), timeout=_left(ends))
        try:
            connection.sock = plain
            if parts.scheme == "https":
                connection.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=host)
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", path, headers={"Accept": "image/*", "User-Agent": "stockade"})
            connection.sock.settimeout(_left(ends))
            stream = connection.sock
            response = connection.getresponse()
            if response.status != 200:
                raise UnreadableImage(f"the image could not be fetched: status {response.status}")
            data = bytearray()
            while True:
                stream.settimeout(_left(ends))
                piece = response.read1(1 << 16)
                if not piece:
                    return bytes(data)
                data += piece
                if len(data) > self.max_bytes:
                    raise ImageTooLarge(f"the image has more than {self.max_bytes} bytes")
        finally:
            connection.close()
            plain.close()


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.port  # checked when asked for
    except ValueError:
        raise UnsupportedImage("this is no URL of an image") from None
    if any(ord(char) <= 32 or ord(char) == 127 for char in url) or not url.isascii():
        raise UnsupportedImage("this is no URL of an image")
    return parts


def _origin(parts: SplitResult) -> str:
    """Scheme, host and port as in `origins`; "" for what is never fetched."""
    if parts.scheme not in _PORTS or not parts.hostname or "@" in parts.netloc:
        return ""
    port = "" if parts.port is None or parts.port == _PORTS[parts.scheme] else f":{parts.port}"
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}{port}"


def _left(ends: float) -> float:
    left = ends - monotonic()
    if left <= 0:
        raise TimeoutError
    return left
