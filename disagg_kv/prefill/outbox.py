"""What prefill holds for decode engines, as a state machine without sockets and tensors.

A *job* is one prompt whose blocks are, or will be, in prefill's cache. A *lane* is one decode connection. Blocks are
handed out as *segments* when both sides are there: the job has ready blocks and a lane wants them. Either may come
first. A job ends once: sent, dropped, released or expired; whoever asks for it later is told so at once.

Threads: the engine's thread opens, advances and drops jobs; each lane has a reader thread (want, release, detach) and a
sender thread (next, sent). Everything happens under one lock, nothing here blocks except ``next`` and ``suspend``.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from disagg_kv.protocol.keys import Key
from disagg_kv.protocol.messages import Gone, Release, Want

_REMEMBERED = 8192
"""Ended keys and released transfers that are remembered, so that a late WANT is answered at once."""


@dataclass(eq=False)
class Job:
    key: Key
    request: str
    total: int
    """Blocks of the whole prompt."""
    adapter: str = ""
    """Digest of the LoRA adapter that it is computed with."""
    blocks: Sequence[int] = ()
    ready: int = 0
    """Leading blocks that hold their final KV."""
    fence: Any = None
    """What a sender has to wait for before it reads the ready blocks (a CUDA event, or None)."""
    since: float = 0.0
    """When the last block became ready."""
    reading: bool = False
    ended: str = ""


@dataclass(frozen=True)
class Segment:
    """Blocks that a sender thread has to send now; ``Outbox.sent`` must follow."""

    job: Job
    first: int
    blocks: Sequence[int]
    last: bool
    fence: Any

    @property
    def key(self) -> Key:
        return self.job.key


@dataclass(eq=False)
class Lane:
    """One decode connection. ``kill`` breaks it, from any thread, so that a send in progress fails soon."""

    kill: Callable[[], None] = lambda: None
    messages: deque[bytes] = field(default_factory=deque)
    wants: OrderedDict[Key, Want] = field(default_factory=OrderedDict)
    next_block: dict[Key, int] = field(default_factory=dict)
    closed: bool = False


class Outbox:
    """Jobs, lanes and what connects them. ``max_waiting``: WANTs that may wait for a job, over all lanes;
    ``hold_blocks``: blocks of finished requests that may wait for a WANT, None for any number."""

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
        self._lanes: set[Lane] = set()
        self._wanted_by: dict[Key, Lane] = {}
        self._ended: OrderedDict[Key, str] = OrderedDict()
        self._released: OrderedDict[str, None] = OrderedDict()
        self._finished: set[str] = set()

    # The engine's thread.

    def open(self, key: Key, request: str, total: int, adapter: str = "") -> None:
        """A prompt of this request will be ready some time. Opening a request again starts it anew, unless decode has
        said that it does not need the KV."""
        with self._changed:
            replaced = self._jobs.get(key)
            if replaced is not None:
                replaced.ended = "replaced"
            job = Job(key, request, total, adapter)
            if self._ended.pop(key, "") == "released" or key.transfer in self._released:
                job.ended = "released"
            self._jobs[key] = self._by_request[request] = job
            if job.ended:
                self._end(job, job.ended)

    def progress(self, request: str, blocks: Sequence[int], ready: int, fence: Any) -> None:
        """The first ``ready`` blocks are computed once the fence is passed. ``blocks`` are all the request has."""
        with self._changed:
            job = self._by_request.get(request)
            if job is not None and not job.ended:
                job.blocks, job.ready, job.fence, job.since = blocks, min(ready, job.total), fence, self._clock()
                self._changed.notify_all()

    def suspend(self, request: str, seconds: float) -> bool:
        """The request's blocks are about to be overwritten. Returns once nobody reads them; False if a lane had to
        be broken for that."""
        with self._changed:
            job = self._by_request.get(request)
            if job is None:
                return True
            job.ready, job.blocks = 0, ()
            if self._changed.wait_for(lambda: not job.reading, seconds):
                return True
            lane = self._wanted_by.get(job.key)
        if lane is not None:
            lane.kill()
        with self._changed:
            self._changed.wait_for(lambda: not job.reading, seconds)
        return False

    def drop(self, request: str, reason: str) -> None:
        """The request was aborted, or its blocks are needed: whoever wants it is told that it is gone."""
        with self._changed:
            job = self._by_request.get(request)
            if job is not None:
                self._end(job, reason)

    def finish(self, requests: Iterable[str]) -> None:
        """These requests are over for the engine: their blocks stay until ``collect`` names them. A prompt that is not
        computed by now never will be."""
        with self._changed:
            for request in requests:
                job = self._by_request.get(request)
                if job is not None:
                    self._finished.add(request)
                    if job.ready < job.total:
                        self._end(job, "not computed")

    def collect(self) -> set[str]:
        """Finished requests whose blocks may be freed; each is named once. Ends what nobody fetched in time, or what
        is too much."""
        with self._changed:
            now = self._clock()
            for job in list(self._jobs.values()):
                if job.ready >= job.total and not job.reading and now - job.since > self._hold:
                    self._give_up(job, "expired")
            self._bound()
            free = {name for name in self._finished if (job := self._by_request[name]).ended and not job.reading}
            for name in free:
                del self._by_request[name]
            self._finished -= free
            return free

    def wait(self, seconds: float) -> None:
        """Returns early when something changes; at once if no finished request waits for its end."""
        with self._changed:
            if self._finished:
                self._changed.wait(seconds)

    def take_unfetched(self) -> Counter[str]:
        """Prompts that were given up though all their KV was there, by reason, since the last call."""
        with self._changed:
            unfetched, self._unfetched = self._unfetched, Counter()
            return unfetched

    def held(self) -> dict[str, int]:
        """Counts for logs and tests."""
        with self._changed:
            waiting = sum(len(lane.wants) for lane in self._lanes)
            return {"jobs": len(self._jobs), "requests": len(self._by_request), "wants": waiting,
                    "lanes": len(self._lanes)}  # fmt: skip

    # A lane's reader thread.

    def attach(self, kill: Callable[[], None]) -> Lane:
        with self._changed:
            lane = Lane(kill)
            self._lanes.add(lane)
            return lane

    def detach(self, lane: Lane) -> None:
        """The connection is gone, and with it every load that waited for it: decode computes those prompts, and a retry
        elsewhere has another transfer id. Their KV is given up."""
        with self._changed:
            lane.closed = True
            self._lanes.discard(lane)
            for key in list(lane.wants):
                self._forget(lane, key)
                if key in self._jobs:
                    self._end(self._jobs[key], "decode is gone")
                else:
                    self._remember(key, "released")
            lane.messages.clear()
            self._changed.notify_all()

    def want(self, lane: Lane, want: Want) -> None:
        with self._changed:
            if lane.closed:
                return
            key, job = want.key, self._jobs.get(want.key)
            reason = self._ended.get(key, "released" if key.transfer in self._released else "")
            if not reason and key in self._wanted_by:
                reason = "wanted twice"
            if not reason and job is None and len(self._wanted_by) >= self._max_waiting:
                reason = "too many requests wait"
                self._remember(key, "released")
            if not reason and job is not None and (reason := _unfit(job, want)):
                self._end(job, reason)
            if reason:
                lane.messages.append(Gone(key, reason).encode())
            else:
                lane.wants[key], lane.next_block[key], self._wanted_by[key] = want, want.first, lane
            self._changed.notify_all()

    def release(self, lane: Lane | None, release: Release) -> None:
        """From a decode lane: that key is not needed by it. From the proxy (None): the whole transfer is over."""
        with self._changed:
            if lane is not None and release.key is not None:
                if release.key in lane.wants or release.key not in self._wanted_by:
                    self._forget(lane, release.key)
                    if release.key in self._jobs:
                        self._end(self._jobs[release.key], "released")
                    else:
                        self._remember(release.key, "released")
            elif lane is None:
                self._released[release.transfer] = None
                while len(self._released) > _REMEMBERED:
                    self._released.popitem(last=False)
                for key in [key for key in self._wanted_by if key.transfer == release.transfer]:
                    self._tell_gone(key, "released")
                for job in [job for job in self._jobs.values() if job.key.transfer == release.transfer]:
                    self._end(job, "released")
            self._changed.notify_all()

    def post(self, lane: Lane, message: bytes) -> None:
        """Something for the lane's sender to say next; once, if the same still waits to be sent."""
        with self._changed:
            if not lane.closed and message not in lane.messages:
                lane.messages.append(message)
                self._changed.notify_all()

    # A lane's sender thread.

    def next(self, lane: Lane, seconds: float | None = None) -> bytes | Segment | None:
        """What to send next on this lane, waiting for it. None once the lane is closed or the time is over."""
        with self._changed:
            found: list[bytes | Segment] = []

            def look() -> bool:
                if lane.closed:
                    return True
                if lane.messages:
                    found.append(lane.messages.popleft())
                elif (segment := self._ready_segment(lane)) is not None:
                    found.append(segment)
                elif lane.messages:
                    # Looking for a segment has refused a WANT that does not fit its job.
                    found.append(lane.messages.popleft())
                return bool(found)

            self._changed.wait_for(look, seconds)
            return found[0] if found else None

    def sent(self, lane: Lane, segment: Segment, ok: bool) -> None:
        """The segment's blocks are no longer read. ``ok`` False: the connection broke, ``detach`` follows."""
        with self._changed:
            segment.job.reading = False
            if ok and segment.key in lane.wants:
                lane.next_block[segment.key] = segment.first + len(segment.blocks)
                if segment.last:
                    self._forget(lane, segment.key)
                    self._end(segment.job, "sent")
            self._changed.notify_all()

    # Under the lock.

    def _bound(self) -> None:
        """Gives up the newest prompts when too many blocks wait for a WANT. Decode takes its requests first come, first
        served: the oldest are those that it asks for next. What it has asked for is on its way, and does not count."""
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

    def _ready_segment(self, lane: Lane) -> Segment | None:
        for key, want in lane.wants.items():
            job = self._jobs.get(key)
            if job is None or job.reading:
                continue
            if reason := _unfit(job, want):
                # No other decode has this transfer: nobody will fetch what this one cannot use.
                self._end(job, reason)
                return self._ready_segment(lane)
            start = lane.next_block[key]
            if job.ready > start:
                job.reading = True
                return Segment(job, start, job.blocks[start : job.ready], job.ready == job.total, job.fence)
        return None

    def _end(self, job: Job, reason: str) -> None:
        job.ended = job.ended or reason
        if self._jobs.get(job.key) is job:
            del self._jobs[job.key]
            self._remember(job.key, reason)
            if job.key in self._wanted_by:
                self._tell_gone(job.key, reason)
        self._changed.notify_all()

    def _tell_gone(self, key: Key, reason: str) -> None:
        lane = self._wanted_by[key]
        lane.messages.append(Gone(key, reason).encode())
        self._forget(lane, key)

    def _forget(self, lane: Lane, key: Key) -> None:
        lane.wants.pop(key, None)
        lane.next_block.pop(key, None)
        if self._wanted_by.get(key) is lane:
            del self._wanted_by[key]

    def _remember(self, key: Key, reason: str) -> None:
        self._ended[key] = reason
        self._ended.move_to_end(key)
        while len(self._ended) > _REMEMBERED:
            self._ended.popitem(last=False)


def _unfit(job: Job, want: Want) -> str:
    """Why the job is not the KV that decode wants; "" if it is."""
    if want.first + want.count != job.total:
        return f"the prompt has {job.total} blocks, not {want.first + want.count}"
    if want.adapter != job.adapter:
        return "the LoRA adapter has other content here"
    return ""
