"""Which request heads are refused because another HTTP server could read them differently. Pure rules, without I/O.

The parser (httptools with llhttp, strict) refuses these itself: Content-Length with Transfer-Encoding, a second
Content-Length, one that is not a plain number, malformed chunks, bare CR or LF, obs-fold, white space before a colon,
and control characters. These rules refuse in addition:

1. **Body length**: any Transfer-Encoding other than a single ``chunked``; any Transfer-Encoding in HTTP/1.0.
2. **Host**: none in HTTP/1.1, more than one, or a malformed one.
3. **Target**: anything but a path (absolute-form, authority-form, a fragment); ``*`` except for OPTIONS; CONNECT.
4. **Version**: other than HTTP/1.0 and HTTP/1.1.
5. **Size**: more than MAX_HEADER_BYTES or 100 headers.
6. **Content-Encoding**: compressed bodies of generation requests, which vLLM does not read either.
"""

from __future__ import annotations

import re
from typing import Final

from disagg_proxy.errors import BadRequest, HeadTooLarge, UnsupportedEncoding, UnsupportedVersion
from disagg_proxy.http1.headers import Headers, value_of

MAX_HEADERS = 100

_HOST = re.compile(
    rb"(?:(?:L{1,63}\.)*L{1,63}\.?)?(?::(?:L|[.:])*)?".replace(b"L", rb"[\w~!$&'()*+,;=%\[\]-]"), re.ASCII
)
"""Any name or address, with an optional port. Werkzeug fails on labels that are empty or longer than 63 bytes."""


CHECKED_HEADERS: Final = frozenset({b"content-length", b"expect", b"host", b"transfer-encoding"})
"""Names, in lower case, of the headers that :class:`HeadFields` needs."""


class HeadFields:
    """The headers of one request that decide how it is read; :meth:`add` is called for each while the head is parsed.

    Attributes:
        has_host: whether there is a Host header.
        chunked: whether the body is chunked.
        length: Content-Length in bytes; 0 if there is none.
        expects_continue: whether the client waits for 100 (Continue) before it sends the body.
    """

    __slots__ = ("_has_length", "chunked", "expects_continue", "has_host", "length")

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget the previous request."""
        self.has_host = self.chunked = self.expects_continue = self._has_length = False
        self.length = 0

    def add(self, name: bytes, value: bytes) -> None:
        """Check and store one header.

        Args:
            name: in lower case, one of :data:`CHECKED_HEADERS`.
            value: without surrounding white space.

        Raises:
            BadRequest: a malformed or repeated Host, or an ambiguous body length.
        """
        if name == b"host":
            if self.has_host or not _HOST.fullmatch(value):
                raise BadRequest("There must be one Host header, with a host name or address.")
            self.has_host = True
        elif name == b"expect":
            self.expects_continue = value.lower() == b"100-continue"
        else:
            if self._has_length:
                raise BadRequest("The length of the body must be given once.")
            self._has_length = True
            if name == b"content-length":
                self.length = int(value) if value.isdigit() else 0
            elif value.lower() == b"chunked":
                self.chunked = True
            else:
                raise BadRequest("The only supported Transfer-Encoding is chunked.")


def check_version(version: str, fields: HeadFields) -> None:
    """
    Raises:
        UnsupportedVersion: neither HTTP/1.0 nor HTTP/1.1.
        BadRequest: HTTP/1.0 with Transfer-Encoding, or HTTP/1.1 without Host.
    """
    if version == "1.1":
        if not fields.has_host:
            raise BadRequest("The Host header is missing.")
    elif version != "1.0":
        raise UnsupportedVersion(f"HTTP/{version} is not supported, only HTTP/1.0 and HTTP/1.1.")
    elif fields.chunked:
        raise BadRequest("HTTP/1.0 has no Transfer-Encoding.")


def check_target(method: bytes, target: bytes) -> None:
    """
    Raises:
        BadRequest: the target is not a path, or the method is CONNECT.
    """
    is_path = target.startswith(b"/") or (target == b"*" and method == b"OPTIONS")
    if not is_path or b"#" in target or method == b"CONNECT":
        raise BadRequest("The request target must be a path: this is not a forward proxy.")


def check_size(target: bytes, headers: Headers, other: int, limit: int) -> None:
    """
    Args:
        other: bytes received for this head that are in neither the target nor a header, such as those of a header that
            is still incomplete.
        limit: MAX_HEADER_BYTES.

    Raises:
        HeadTooLarge: more than ``limit`` bytes, or more than 100 headers.
    """
    size = len(target) + sum(len(name) + len(value) + 4 for name, value in headers)
    if max(size, other) > limit:
        raise HeadTooLarge(f"The request line and headers exceed {limit} bytes (MAX_HEADER_BYTES).")
    if len(headers) > MAX_HEADERS:
        raise HeadTooLarge(f"The request has more than {MAX_HEADERS} headers.")


def check_encoding(headers: Headers) -> None:
    """
    Raises:
        UnsupportedEncoding: the body is compressed.
    """
    encoding = value_of(headers, b"content-encoding").lower()
    if encoding not in (b"", b"identity"):
        shown = encoding.decode("latin-1")
        raise UnsupportedEncoding(f"Content-Encoding {shown!r} is not supported; send the body uncompressed.")
