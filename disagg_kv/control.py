"""The proxy's connection to an engine's KV port: ends waits for KV that will not come, and shows that it lives.

Only asyncio and this package's protocol: no torch, no vLLM.
"""

from __future__ import annotations

import asyncio
import contextlib

from disagg_kv import PROTOCOL_NAME, PROTOCOL_VERSION
from disagg_kv.protocol.frames import Kind, WireError, decode_body, encode, frame_length
from disagg_kv.protocol.handshake import Identity, Refused, check_proof, nonce, proof
from disagg_kv.protocol.keys import parse_address
from disagg_kv.protocol.messages import Release
from disagg_kv.within import within


class Control:
    """An open control connection; ``boot`` is the engine's boot id."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, boot: str) -> None:
        self._reader, self._writer, self.boot = reader, writer, boot

    @classmethod
    async def open(cls, address: str, secret: str = "", seconds: float = 5.0) -> Control:
        """To an engine's KV address, as it was announced. OSError or TimeoutError if it is not there, Refused if the
        secret or the version differs, WireError if it is something else."""
        host, port = parse_address(address)
        async with within(seconds):
            reader, writer = await asyncio.open_connection(host, port)
        try:
            async with within(seconds):
                boot = await cls._handshake(reader, writer, secret)
        except BaseException:
            writer.close()
            raise
        return cls(reader, writer, boot)

    async def release(self, transfer: str) -> None:
        """The transfer is over: a prefill engine frees its blocks and tells the decode engine that waits for them, a
        decode engine computes at once. OSError if the engine is gone."""
        self._writer.write(Release(transfer).encode())
        await self._writer.drain()

    async def meet(self, address: str) -> None:
        """Tells a decode engine to connect to this prefill engine now: the first request does not have to wait for it
        (NCCL takes about a second). OSError if the engine is gone."""
        self._writer.write(encode(Kind.MEET, {"from": address}))
        await self._writer.drain()

    async def wait_closed(self) -> None:
        """Returns when the engine's process ends or closes the connection."""
        with contextlib.suppress(OSError):
            while await self._reader.read(4096):
                pass

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    @staticmethod
    async def _handshake(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: str) -> str:
        async def frame(wanted: Kind) -> dict[str, object]:
            try:
                kind, body = decode_body(await reader.readexactly(frame_length(await reader.readexactly(4))))
            except asyncio.IncompleteReadError:
                raise ConnectionError("the engine closed the connection") from None
            if kind is Kind.REFUSE:
                raise Refused(str(body.get("reason", ""))[:1000])
            if kind is not wanted:
                raise WireError(f"{kind.name} came instead of {wanted.name}")
            return body

        hello = {"name": PROTOCOL_NAME, "version": PROTOCOL_VERSION, "role": "control", "boot": "proxy", "rank": 0,
                 "shape": None, "nonce": nonce()}  # fmt: skip
        writer.write(encode(Kind.HELLO, hello))
        welcome = await frame(Kind.WELCOME)
        theirs = Identity.from_wire(welcome)
        check_proof(proof(secret, theirs.role, hello, welcome), welcome.get("proof"))
        writer.write(encode(Kind.PROOF, {"proof": proof(secret, "control", hello, welcome)}))
        await frame(Kind.READY)
        return theirs.boot
