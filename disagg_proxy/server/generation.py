"""What both ways into the generation routes share: ``direct`` takes requests off uvicorn's connection, ``generate``
takes the others through Quart.
"""

from __future__ import annotations

from disagg_proxy.downstream.refusal import ClientResponse
from disagg_proxy.downstream.reply import Reply
from disagg_proxy.errors import UnsupportedEncoding
from disagg_proxy.http1.headers import Headers, value_of


def answer_head(outcome: ClientResponse, client_id: str | None, reply: Reply) -> Headers:
    """The headers of the answer, without those of its framing."""
    return [*outcome.headers, (b"x-request-id", answer_id(client_id, reply).encode())]


def answer_id(client_id: str | None, reply: Reply) -> str:
    """The X-Request-Id of the answer: the client's own, or one that is unique."""
    return client_id or reply.public_id[:32]


def check_encoding(headers: Headers) -> None:
    """
    Raises:
        UnsupportedEncoding: the body is compressed.
    """
    encoding = value_of(headers, b"content-encoding").lower()
    if encoding not in (b"", b"identity"):
        shown = encoding.decode("latin-1")
        raise UnsupportedEncoding(f"Content-Encoding {shown!r} is not read; send the body uncompressed.")
