"""Prefill's state machine of KV to send to decode engines, without sockets and tensors.

A *job* is one prompt whose blocks are, or will be, in prefill's cache. Blocks are handed out as *segments* once the
job has ready blocks and a decode peer has sent WANT for them, in either order. A job ends once: sent, dropped,
released or expired. A later WANT for it is answered with GONE at once.

Threads: the engine's thread opens, advances and drops jobs. Each decode connection has a reader thread (``on_want``,
``on_release``, ``detach``) and a sender thread (``next``, ``on_sent``). One lock guards everything; only ``next``,
``wait`` and ``suspend`` block.
"""

from __future__ import annotations

import operator
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from disagg_kv.protocol.keys import Key
from disagg_kv.protocol.messages import Gone, Release, Want

_MAX_REMEMBERED = 8192
"""Number of ended keys and of released transfers to remember, so that a late WANT is answered at once."""


@dataclass(eq=False)
class Job:
    """One prompt. ``key`` and ``request`` name it; ``ended`` is the reason, "" while it has not ended."""

    key: Key
    request: str
    total: int
    """Blocks of the complete prompt."""
    adapter: str = ""
    """Digest of the LoRA adapter that the prompt is computed with."""
    tails: tuple[int, ...] = ()
    """How many of the last blocks are of each tail (``engine/groups.py``)."""
    blocks: Sequence[int] = ()
    ready: int = 0
    """Leading blocks that hold their final KV."""
    fence: Any = None
    """What a sender waits for before it reads the ready blocks (a ``StepFence``)."""
    since: float = 0.0
    """When the last block became ready."""
    reading: bool = False
    ended: str = ""


@dataclass(frozen=True)
class Segment:
    """Blocks that a sender thread is to send now; ``SendQueue.on_sent`` must follow."""

    job: Job
    first: int
    blocks: Sequence[int]
    last: bool
    fence: Any

    @property
    def key(self) -> Key:
        return self.job.key


@dataclass(eq=False)
class DecodePeer:
    """One decode connection: its WANTs, and messages to send.

    Attributes:
        kill: closes the connection, from any thread, so that a send in progress fails soon.
        next_block: first block that is still to be sent, by key.
    """

    kill: Callable[[], None] = lambda: None
    messages: deque[bytes] = field(default_factory=deque)
    wants: OrderedDict[Key, Want] = field(default_factory=OrderedDict)
    next_block: dict[Key, int] = field(default_factory=dict)
    closed: bool = False


class SendQueue:
    """Jobs, decode peers and their WANTs.

    Args:
        hold_seconds: how long computed KV is held for a WANT.
        max_waiting: WANTs that may wait for a job, divided between the peers that have some.
        hold_blocks: blocks of finished requests that may wait for a WANT; None: unlimited.
    """

    def __init__(
        self,
        hold_seconds: float,
        max_waiting: int = 4096,
        clock: Callable[[], float] = time.monotonic,
        hold_blocks: int | None = None,
    ) -> None:
        self._hold, self._max_waiting, self._clock = hold_seconds, max_waiting, clock
        self._hold_blocks = hold_blocks
        self._unfetched: Counter[str] = Counter()
        self._changed = threading.Condition()
        self._jobs: dict[Key, Job] = {}
        self._by_request: dict[str, Job] = {}
        self._peers: set[DecodePeer] = set()
        self._wanted_by: dict[Key, DecodePeer] = {}
        self._ended: OrderedDict[Key, str] = OrderedDict()
        self._released: OrderedDict[str, None] = OrderedDict()
        self._finished: set[str] = set()

    # The engine's thread.

    def open(self, key: Key, request: str, total: int, adapter: str = "", tails: tuple[int, ...] = ()) -> None:
        """Register a prompt that will be computed.

        Opening a request again restarts its job, unless decode has released it.
        """
        with self._changed:
            replaced = self._jobs.get(key)
            if replaced is not None:
                replaced.ended = "replaced"
            job = Job(key, request, total, adapter, tails)
            if self._ended.pop(key, "") == "released" or key.transfer in self._released:
                job.ended = "released"
            self._jobs[key] = self._by_request[request] = job
            if job.ended:
                self._end(job, job.ended)

    def progress(self, request: str, blocks: Sequence[int], ready: int, fence: Any) -> None:
        """Record that the first ``ready`` of ``blocks`` are computed once the fence is passed."""
        with self._changed:
            job = self._by_request.get(request)
            if job is not None and not job.ended:
                job.blocks, job.ready, job.fence, job.since = blocks, min(ready, job.total), fence, self._clock()
                self._changed.notify_all()

    def suspend(self, request: str, seconds: float) -> bool:
        """Stop reading the request's blocks, which are about to be overwritten.

        Returns when no sender reads them; False if a connection had to be closed for that.
        """
        with self._changed:
            job = self._by_request.get(request)
            if job is None:
                return True
            job.ready, job.blocks = 0, ()
            if self._changed.wait_for(lambda: not job.reading, seconds):
                return True
            peer = self._wanted_by.get(job.key)
        if peer is not None:
            peer.kill()
        with self._changed:
            self._changed.wait_for(lambda: not job.reading, seconds)
        return False

    def drop(self, request: str, reason: str) -> None:
        """End the job of a request that was aborted or whose blocks are needed; its decode gets GONE."""
        with self._changed:
            job = self._by_request.get(request)
            if job is not None:
                self._end(job, reason)

    def finish(self, requests: Iterable[str]) -> None:
        """Record that the engine has finished these requests; their blocks stay until ``collect`` returns them.

        A prompt that is not computed by now never will be.
        """
        with self._changed:
            for request in requests:
                job = self._by_request.get(request)
                if job is not None:
                    self._finished.add(request)
                    if job.ready < job.total:
                        self._end(job, "not computed")

    def collect(self) -> set[str]:
        """Return finished requests whose blocks may be freed, each once.

        Ends jobs that were not fetched within the hold time, and the newest ones above the limit of held blocks.
        """
        with self._changed:
            now = self._clock()
            for job in list(self._jobs.values()):
                if job.ready >= job.total and not job.reading and now - job.since > self._hold:
                    self._give_up(job, "expired")
            self._limit_held_blocks()
            free = {name for name in self._finished if (job := self._by_request[name]).ended and not job.reading}
            for name in free:
                del self._by_request[name]
            self._finished -= free
            return free

    def wait(self, seconds: float) -> None:
        """Wait up to ``seconds`` for a change. Returns at once if no finished request holds blocks."""
        with self._changed:
            if self._finished:
                self._changed.wait(seconds)

    def take_unfetched(self) -> Counter[str]:
        """Count the fully computed prompts that were given up since the last call, by reason."""
        with self._changed:
            unfetched, self._unfetched = self._unfetched, Counter()
            return unfetched

    def counts(self) -> dict[str, int]:
        """Sizes, for logs and tests."""
        with self._changed:
            waiting = sum(len(peer.wants) for peer in self._peers)
            return {"jobs": len(self._jobs), "requests": len(self._by_request), "wants": waiting,
                    "peers": len(self._peers)}  # fmt: skip

    # Reader thread of a decode connection.

    def attach(self, kill: Callable[[], None]) -> DecodePeer:
        """Register a connection."""
        with self._changed:
            peer = DecodePeer(kill)
            self._peers.add(peer)
            return peer

    def detach(self, peer: DecodePeer) -> None:
        """Remove a closed connection and give up the KV of its WANTs.

        Decode computes those prompts; a retry elsewhere has another transfer id.
        """
        with self._changed:
            peer.closed = True
            self._peers.discard(peer)
            for key in list(peer.wants):
                self._remove_want(peer, key)
                if key in self._jobs:
                    self._end(self._jobs[key], "decode is gone")
                else:
                    self._remember(key, "released")
            peer.messages.clear()
            self._changed.notify_all()

    def on_want(self, peer: DecodePeer, want: Want) -> None:
        """Handle WANT: queue it, or answer with GONE."""
        with self._changed:
            if peer.closed:
                return
            key, job = want.key, self._jobs.get(want.key)
            reason = self._ended.get(key, "released" if key.transfer in self._released else "")
            if not reason and key in self._wanted_by:
                reason = "wanted twice"
            if not reason and job is None and len(peer.wants) >= self._share():
                reason = "too many requests wait"
                self._remember(key, "released")
            if not reason and job is not None and (reason := _mismatch(job, want)):
                self._end(job, reason)
            if reason:
                peer.messages.append(Gone(key, reason).encode())
            else:
                peer.wants[key], peer.next_block[key], self._wanted_by[key] = want, want.first, peer
            self._changed.notify_all()

    def on_release(self, peer: DecodePeer | None, release: Release) -> None:
        """Handle RELEASE: of one key from a decode peer, of a complete transfer from the proxy (None)."""
        with self._changed:
            if peer is not None and release.key is not None:
                if release.key in peer.wants or release.key not in self._wanted_by:
                    self._remove_want(peer, release.key)
                    if release.key in self._jobs:
                        self._end(self._jobs[release.key], "released")
                    else:
                        self._remember(release.key, "released")
            elif peer is None:
                self._released[release.transfer] = None
                while len(self._released) > _MAX_REMEMBERED:
                    self._released.popitem(last=False)
                for key in [key for key in self._wanted_by if key.transfer == release.transfer]:
                    self._send_gone(key, "released")
                for job in [job for job in self._jobs.values() if job.key.transfer == release.transfer]:
                    self._end(job, "released")
            self._changed.notify_all()

    def enqueue(self, peer: DecodePeer, message: bytes) -> None:
        """Queue a message for the peer's sender thread, unless an equal one is queued."""
        with self._changed:
            if not peer.closed and message not in peer.messages:
                peer.messages.append(message)
                self._changed.notify_all()

    # Sender thread of a decode connection.

    def next(self, peer: DecodePeer, seconds: float | None = None) -> bytes | Segment | None:
        """Wait for the next message or segment to send to this peer. None when it is closed or ``seconds`` have
        passed."""
        with self._changed:
            found: list[bytes | Segment] = []

            def poll() -> bool:
                if peer.closed:
                    return True
                if peer.messages:
                    found.append(peer.messages.popleft())
                elif (segment := self._ready_segment(peer)) is not None:
                    found.append(segment)
                elif peer.messages:
                    # _ready_segment has queued GONE for a WANT that does not fit its job.
                    found.append(peer.messages.popleft())
                return bool(found)

            self._changed.wait_for(poll, seconds)
            return found[0] if found else None

    def on_sent(self, peer: DecodePeer, segment: Segment, ok: bool) -> None:
        """Record that a segment's blocks are no longer read. ``ok`` False: the connection broke, ``detach`` follows."""
        with self._changed:
            segment.job.reading = False
            if ok and segment.key in peer.wants:
                peer.next_block[segment.key] = segment.first + len(segment.blocks)
                if segment.last:
                    self._remove_want(peer, segment.key)
                    self._end(segment.job, "sent")
            self._changed.notify_all()

    # Under the lock.

    def _share(self) -> int:
        """WANTs that one peer may have waiting, so that none takes the share of others."""
        return max(1, self._max_waiting // max(1, sum(1 for peer in self._peers if peer.wants)))

    def _limit_held_blocks(self) -> None:
        """Give up the newest prompts when too many blocks wait for a WANT.

        Decode schedules first come, first served, so it requests the oldest next. KV that it has requested does not
        count.
        """
        if self._hold_blocks is None:
            return
        waiting = [
            job for job in self._jobs.values() if job.request in self._finished and job.key not in self._wanted_by
        ]
        held = sum(job.total for job in waiting)
        while held > self._hold_blocks:
            job = waiting.pop()
            held -= job.total
            self._give_up(job, "too much KV waits to be fetched")

    def _give_up(self, job: Job, reason: str) -> None:
        self._unfetched[reason] += 1
        self._end(job, reason)

    def _ready_segment(self, peer: DecodePeer) -> Segment | None:
        for key, want in peer.wants.items():
            job = self._jobs.get(key)
            if job is None or job.reading:
                continue
            if reason := _mismatch(job, want):
                # No other decode has this transfer, so its KV will not be fetched.
                self._end(job, reason)
                return self._ready_segment(peer)
            start, blocks = peer.next_block[key], _ready_blocks(job, want)
            if len(blocks) > start:
                job.reading = True
                return Segment(job, start, blocks[start:], job.ready == job.total, job.fence)
        return None

    def _end(self, job: Job, reason: str) -> None:
        job.ended = job.ended or reason
        if self._jobs.get(job.key) is job:
            del self._jobs[job.key]
            self._remember(job.key, reason)
            if job.key in self._wanted_by:
                self._send_gone(job.key, reason)
        self._changed.notify_all()

    def _send_gone(self, key: Key, reason: str) -> None:
        peer = self._wanted_by[key]
        peer.messages.append(Gone(key, reason).encode())
        self._remove_want(peer, key)

    def _remove_want(self, peer: DecodePeer, key: Key) -> None:
        peer.wants.pop(key, None)
        peer.next_block.pop(key, None)
        if self._wanted_by.get(key) is peer:
            del self._wanted_by[key]

    def _remember(self, key: Key, reason: str) -> None:
        self._ended[key] = reason
        self._ended.move_to_end(key)
        while len(self._ended) > _MAX_REMEMBERED:
            self._ended.popitem(last=False)


def _ready_blocks(job: Job, want: Want) -> Sequence[int]:
    """Blocks of the job that may be read, numbered as decode does: of a tail it may need only the end."""
    if job.ready < job.total or want.tails == job.tails:
        return job.blocks[: job.ready]
    at = job.total - sum(job.tails)
    blocks = list(job.blocks[:at])
    for has, needed in zip(job.tails, want.tails, strict=True):
        at += has
        blocks += job.blocks[at - needed : at]
    return blocks


def _mismatch(job: Job, want: Want) -> str:
    """Why the job does not fit decode's WANT; "" if it does."""
    before_tails = job.total - sum(job.tails)
    if want.first + want.count - sum(want.tails) != before_tails:
        return f"the prompt has {before_tails} blocks, not {want.first + want.count - sum(want.tails)}"
    if len(want.tails) != len(job.tails) or any(map(operator.gt, want.tails, job.tails)):
        return f"the prompt's tails have {list(job.tails)} blocks, not {list(want.tails)}"
    if want.adapter != job.adapter:
        return "the LoRA adapter has different content here"
    return ""
