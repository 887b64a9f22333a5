"""Attacks on the registration port in a run of :mod:`fuzz.zmq_side`, from a separate process."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import random
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import zmq

from fuzz.announcement import SEEDS, WORDS, ping
from fuzz.mutate import mutants

_PER_ROUND = 60
"""Messages of one attack."""

_GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01NULL" + bytes(16) + b"\0" + bytes(31)
_READY = b"\x04\x29\x05READY\x0bSocket-Type\0\0\0\x06DEALER\x08Identity\0\0\0\0"
_PING = b"\x04\x07\x04PING\0\1"


@dataclass(frozen=True)
class Engine:
    """A live instance, as everybody may know it."""

    role: str
    http: str
    kv: str


class Attacks:
    """What is done to the port; every method sends something and returns how many messages or connections."""

    def __init__(self, port: int, engines: Sequence[Engine], seed: int) -> None:
        self.engines = engines
        self.rng = random.Random(seed)
        self.mutants = mutants(seed, SEEDS, WORDS)
        self.context = zmq.Context()
        self.endpoint = ("127.0.0.1", port)
        self.url = f"tcp://127.0.0.1:{port}"
        self.socket = self.dial()

    def dial(self, identity: bytes | None = None, kind: int = zmq.DEALER) -> zmq.Socket[bytes]:
        made = self.context.socket(kind)
        made.setsockopt(zmq.LINGER, 50)
        made.setsockopt(zmq.SNDHWM, 10_000)
        if identity is not None:
            made.setsockopt(zmq.IDENTITY, identity)
        made.connect(self.url)
        return made

    def close(self) -> None:
        self.context.destroy(linger=0)

    def send(self, made: zmq.Socket[bytes], frames: list[bytes]) -> int:
        with contextlib.suppress(zmq.Again):
            made.send_multipart(frames, zmq.NOBLOCK)
            return 1
        return 0

    def frames(self) -> int:
        """Mutated pings in one to four frames."""
        sent = 0
        for data in itertools.islice(self.mutants, _PER_ROUND):
            more = [self.rng.randbytes(self.rng.randrange(40)) for _ in range(self.rng.choice((0, 0, 0, 1, 2)))]
            sent += self.send(self.socket, [*more, data[1:] or b"\0"])
        return sent

    def oversized(self) -> int:
        """Large frames, and very many small ones."""
        return self.send(self.socket, [b"x" * self.rng.choice((5000, 900_000, 2_000_000))]) + self.send(
            self.socket, [b"x"] * self.rng.choice((300, 5000))
        )

    def identities(self) -> int:
        """Many peers, each with its own identity: random, empty, or of maximum length."""
        admission_peers = []
        for _ in range(_PER_ROUND // 4):
            length = self.rng.choice((1, 5, 255))
            admission_peers.append(self.dial(b"i" + self.rng.randbytes(length - 1)))
        sent = sum(self.send(made, [next(self.mutants)]) for made in admission_peers)
        for made in admission_peers:
            made.close()
        return sent

    def thieves(self) -> int:
        """The identities of the live instances' own sockets, over and over."""
        sent = 0
        for engine in self.engines:
            made = self.dial(engine.kv.encode())
            sent += self.send(made, [self.rng.choice((b"", ping(type="D"), ping(zmq_address=engine.kv)))])
            made.close()
        return sent

    def forgeries(self) -> int:
        """Registrations for the live instances' addresses that contradict them."""
        sent = 0
        for engine in self.engines:
            role = engine.role
            other = "D" if role == "P" else "P"
            for message in (
                ping(type=other, http_address=engine.http, zmq_address=engine.kv),
                ping(type=role, http_address=engine.http, zmq_address=f"127.0.0.9:{self.rng.randrange(1, 65536)}"),
                ping(type=role, http_address=f"127.0.0.9:{self.rng.randrange(1, 65536)}", zmq_address=engine.kv),
            ):
                sent += self.send(self.socket, [message])
        return sent

    def inventions(self) -> int:
        """Instances that do not exist, on addresses that may register."""
        sent = 0
        for _ in range(_PER_ROUND):
            address = f"127.{self.rng.randrange(1, 255)}.{self.rng.randrange(255)}.9:{self.rng.randrange(1, 1024)}"
            kv = address.replace(".9:", ".8:")
            sent += self.send(self.socket, [ping(type=self.rng.choice("PD"), http_address=address, zmq_address=kv)])
        return sent

    def raw(self) -> int:
        """Bytes on a bare connection: broken greetings, half handshakes, lengths that lie."""
        with socket.create_connection(self.endpoint, timeout=5) as bare, contextlib.suppress(OSError):
            start = self.rng.choice((b"", _GREETING, _GREETING + _READY, b"GET / HTTP/1.1\r\n\r\n"))
            lie = self.rng.choice(
                (b"\2" + struct.pack(">Q", 2**63 - 1), b"\2" + bytes(8), b"\4\xff", b"\7", b"\1\0" * 90, _PING * 9)
            )
            bare.sendall(start + lie + self.rng.randbytes(self.rng.randrange(200)))
        return 1

    def kinds(self) -> int:
        """Sockets that no ROUTER talks with, and one that waits for an answer."""
        made = self.dial(kind=self.rng.choice((zmq.PUSH, zmq.PUB, zmq.SUB, zmq.REQ, zmq.PAIR, zmq.ROUTER)))
        with contextlib.suppress(zmq.ZMQError):
            made.send(ping(), zmq.NOBLOCK)
        made.close()
        return 1

    def all(self) -> list[Callable[[], int]]:
        """Every attack."""
        return [
            *(self.frames, self.oversized, self.identities, self.thieves, self.forgeries, self.inventions, self.raw),
            self.kinds,
        ]


_attacks: Attacks | None = None


def begin(port: int, engines: Sequence[Engine], seed: int) -> None:
    """Once in the process, which ends with the one that started it, however that ends."""
    global _attacks
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _attacks = Attacks(port, engines, seed)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def attack() -> tuple[str, int]:
    """One attack of the seed's choice: its name, and how many messages or connections it made."""
    assert _attacks is not None
    chosen = _attacks.rng.choice(_attacks.all())
    return chosen.__name__, chosen()
