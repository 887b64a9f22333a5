"""What a worker is started with: its number, and the descriptors that it inherits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

_VARIABLE = "DISAGG_PROXY_SEAT"


@dataclass(frozen=True, slots=True)
class WorkerEnv:
    """One worker's place.

    Attributes:
        worker: from 0; ``workers``: how many there are.
        incarnation: from 1, one more for each that is started in this place.
        memory, listening, channel: descriptors; ``pokes``: one for each worker, and the supervisor's.
    """

    worker: int
    workers: int
    incarnation: int
    memory: int
    pokes: tuple[int, ...]
    listening: int
    channel: int

    @property
    def files(self) -> tuple[int, ...]:
        """All descriptors."""
        return (self.memory, *self.pokes, self.listening, self.channel)

    def environ(self) -> dict[str, str]:
        """The variable that says it all."""
        return {_VARIABLE: json.dumps(asdict(self))}

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> WorkerEnv:
        """The seat of this process.

        Raises:
            KeyError: it was not started by a supervisor.
        """
        given = json.loads(environ[_VARIABLE])
        return cls(**{**given, "pokes": tuple(given["pokes"])})
