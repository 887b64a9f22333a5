"""The proxy's control connection to an engine's KV port: RELEASE, MEET, and detection of the end of the process.

Uses only asyncio and this package's protocol: no torch, no vLLM.
"""

from __future__ import annotations

import asyncio
import contextlib

from disagg_kv import PROTOCOL_NAME, PROTOCOL_VERSION
from disagg_kv.protocol.frames import Kind, WireError, decode_body, encode, frame_length
from disagg_kv.protocol.handshake import Identity, Refused, check_proof, nonce, proof
from disagg_kv.protocol.keys import parse_address
from disagg_kv.protocol.messages import Release
from disagg_kv.protocol.proven import ANNOUNCED
from disagg_kv.within import within


class Control:
    """An open control connection.

    Attributes:
        boot: boot id of the engine.
        announced: what the engine says of its announcements, see ``disagg_kv.protocol.proven``; None where it does not.
    """

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, boot: str, announced: object
    ) -> None:
        self._reader, self._writer = reader, writer
        self.boot, self.announced = boot, announced

    @classmethod
    async def open(cls, address: str, secret: str = "", seconds: float = 5.0) -> Control:
        """Connect to an engine's KV address, as it was announced.

        Args:
            address: ``ip:port``.
            secret: the shared secret, "" without one.
            seconds: limit of the TCP connect, and again of the handshake.

        Raises:
            OSError, TimeoutError: the engine cannot be reached.
            Refused: the secret or the protocol version differs.
            WireError: the port speaks another protocol.
        """
        host, port = parse_address(address)
        async with within(seconds):
            reader, writer = await asyncio.open_connection(host, port)
        try:
            async with within(seconds):
                boot, announced = await cls._handshake(reader, writer, secret)
        except BaseException:
            writer.close()
            raise
        return cls(reader, writer, boot, announced)

    async def release(self, transfer: str) -> None:
        """Send RELEASE: the transfer is over.

        A prefill engine frees the blocks and sends GONE to the decode engine that waits for them. A decode engine
        computes the prompt at once.

        Raises:
            OSError: the connection is closed.
        """
        self._writer.write(Release(transfer).encode())
        await self._writer.drain()

    async def meet(self, address: str) -> None:
        """Send MEET: a decode engine connects to the prefill engine at ``address`` now, before a request needs it.

        Creating an NCCL communicator takes about a second.

        Raises:
            OSError: the connection is closed.
        """
        self._writer.write(encode(Kind.MEET, {"from": address}))
        await self._writer.drain()

    async def wait_closed(self) -> None:
        """Return when the engine's process ends or closes the connection."""
        with contextlib.suppress(OSError):
            while await self._reader.read(4096):
                pass

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    @staticmethod
    async def _handshake(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: str) -> tuple[str, object]:
        async def frame(wanted: Kind) -> dict[str, object]:
            try:
                kind, body = decode_body(await reader.readexactly(frame_length(await reader.readexactly(4))))
            except asyncio.IncompleteReadError:
                raise ConnectionError("the engine closed the connection") from None
            if kind is Kind.REFUSE:
                raise Refused(str(body.get("reason", ""))[:1000])
            if kind is not wanted:
                raise WireError(f"received {kind.name}, expected {wanted.name}")
            return body

        hello = {"name": PROTOCOL_NAME, "version": PROTOCOL_VERSION, "role": "control", "boot": "proxy", "rank": 0,
                 "shape": None, "nonce": nonce()}  # fmt: skip
        writer.write(encode(Kind.HELLO, hello))
        welcome = await frame(Kind.WELCOME)
        theirs = Identity.from_wire(welcome)
        check_proof(proof(secret, theirs.role, hello, welcome), welcome.get("proof"))
        writer.write(encode(Kind.PROOF, {"proof": proof(secret, "control", hello, welcome)}))
        await frame(Kind.READY)
        return theirs.boot, welcome.get(ANNOUNCED)
