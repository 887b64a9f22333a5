"""Messages between processes, the replay log, the history of KV transfers, and shared flags."""

from __future__ import annotations

import asyncio
import socket

import msgpack

from disagg_proxy.cluster.instance import Role, State
from disagg_proxy.config import Config, StaticInstance
from disagg_proxy.discovery.announcement import decode
from disagg_proxy.workers.channel import Channel
from disagg_proxy.workers.kv_history import SharedKvHistory
from disagg_proxy.workers.replay_log import ReplayLog
from disagg_proxy.workers.shared_flags import SharedFlags
from disagg_proxy.workers.shared_load import RowIndex, WorkerLoad
from disagg_proxy.workers.shared_table import FlagColumn, RowHeader, SharedTable, now
from disagg_proxy.workers.worker_process import WorkerEnv
from tests.cluster.conftest import World
from tests.conftest import soon

SECOND = 1_000_000_000


# -- messages


async def test_a_side_that_does_not_read_blocks_no_sender_and_gets_the_newest_messages() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    taken: list[object] = []
    done = asyncio.Event()

    def take(message) -> None:
        taken.append(message)
        if message[0] == "last":
            done.set()

    sender, receiver = Channel(ours, taken.append), Channel(theirs, take)
    sender.open()
    for number in range(20_000):
        sender.send(["ping", number % 5, number, "x" * 100], ("ping", number % 5))
    assert len(sender._unsent) <= 5, "bounded"
    sender.send(["last"])
    receiver.open()
    await soon(done.wait())
    assert {m[1]: m[2] for m in taken[:-1]} == {n: 19_995 + n for n in range(5)}, "the newest of each"
    sender.close()
    receiver.close()


async def test_the_end_of_the_other_side_is_noticed_after_its_last_message() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    received: list[object] = []
    ended = asyncio.Event()
    receiver, sender = Channel(ours, received.append, ended.set), Channel(theirs, received.append)
    sender.send(["sent", "a", "b", 1])
    sender.close()
    receiver.open()
    await soon(ended.wait())
    assert received == [["sent", "a", "b", 1]]
    receiver.send(["ping"])
    receiver.close()


def test_a_worker_environment_is_read_as_written() -> None:
    env = WorkerEnv(1, 2, 3, 4, (5, 6, 7), 8, 9)
    assert WorkerEnv.read(env.environ()) == env and env.files == (4, 5, 6, 7, 8, 9)


# -- the replay log


def replay_log(**settings) -> tuple[ReplayLog, SharedTable]:
    table = SharedTable(memoryview(bytearray(SharedTable.size(2))), 2)
    return ReplayLog(Config(**settings), RowIndex(table)), table


def ping(port: int, kv: int = 0):
    fields = {"type": "P", "http_address": f"h:{port}", "zmq_address": f"h:{kv or port + 10000}"}
    return decode([msgpack.packb(fields)])


def test_a_new_worker_gets_all_messages_and_then_synced() -> None:
    kept, _ = replay_log(prefill=(StaticInstance("s:1"),))
    first = kept.on_ping(ping(1), 0.0)
    assert first is not None and first[:2] == ["ping", 1]
    assert kept.on_message(["sent", "h:1", "kv:2", 5]) is not None
    assert kept.on_message(["sent", "h:1", "kv:2", 5]) is None, "known"
    assert kept.on_message(["ended", "h:3", "kv:2", 7]) is not None
    assert kept.on_message(["ended", "h:3", "kv:2", 8]) is None, "another worker has noticed the same"
    replayed = [message for message, _ in kept.replay(1.0)]
    assert replayed == [["slot", 0, "s:1"], ["ended", "h:3", "kv:2", 7], ["sent", "h:1", "kv:2", 5], first, ["synced"]]
    assert first not in [message for message, _ in kept.replay(60.0)], "its pings have stopped"


def test_the_history_of_a_prefill_process_ends_with_it() -> None:
    kept, _ = replay_log()
    kept.on_message(["sent", "h:1", "kv:2", 5])
    kept.on_message(["ended", "h:1", "kv:1", 6])
    assert "sent" not in [message[0] for message, _ in kept.replay(0.0)]


def test_slots_of_expired_instances_are_reassigned() -> None:
    kept, table = replay_log()
    for port in range(1, 1025):
        assert kept.on_ping(ping(port), 0.0) is not None
    assert kept.on_ping(ping(2000), 10.0) is None
    table.rows[0].loads[0] = 1
    again = kept.on_ping(ping(2000), 1000.0)
    assert again is not None and again[1] == 1, "something is still on the first"


# -- history of KV transfers


class Pair:
    def __init__(self) -> None:
        self.world = World()
        self.sent: list[list] = []
        self.due: list = []
        self.kv_history = SharedKvHistory(self.world.registry, self.sent.append, lambda s, then: self.due.append(then))
        self.prefill, self.decode = self.world.ready(Role.PREFILL, 1), self.world.ready(Role.DECODE, 2)

    @property
    def possible(self) -> bool:
        return self.world.registry.kv_compatibility.compatible(self.prefill, self.decode)


def test_the_first_transfer_to_a_process_is_broadcast_once() -> None:
    here = Pair()
    for _ in range(3):
        here.world.registry.kv_compatibility.record_send(here.prefill, here.decode)
    assert [m[:3] for m in here.sent] == [["sent", here.prefill.key, here.decode.kv.text]]


def test_what_another_worker_has_sent_counts_here_when_the_decode_ends() -> None:
    here = Pair()
    here.kv_history.on_message(["sent", here.prefill.key, here.decode.kv.text, now()])
    assert here.possible
    here.world.registry.process_ended(here.decode)
    assert not here.possible and here.sent[0][0] == "ended"


def test_a_transfer_before_a_known_end_went_to_the_former_process() -> None:
    here = Pair()
    sent = now()
    here.world.registry.process_ended(here.decode)
    here.kv_history.on_message(["sent", here.prefill.key, here.decode.kv.text, sent])
    assert not here.possible
    here.world.registry.process_ended(here.prefill)
    assert here.possible
    here.kv_history.on_message(["sent", here.prefill.key, here.decode.kv.text, sent])
    assert here.possible, "that was its predecessor"


def test_an_end_reported_by_another_worker_waits_for_the_own_lifeline() -> None:
    here = Pair()
    here.world.registry.kv_compatibility.record_send(here.prefill, here.decode)
    registry = here.world.registry
    registry.has_liveness_connection = lambda instance: True
    here.kv_history.on_message(["ended", here.decode.key, here.decode.kv.text, now()])
    assert here.possible
    registry.process_ended(here.decode)
    registry.process_ended(here.prefill)
    registry.kv_compatibility.record_send(here.prefill, here.decode)
    for believe in here.due:
        believe()
    assert here.possible, "it was noticed here meanwhile"


def test_a_reported_end_is_applied_if_the_lifeline_missed_it() -> None:
    """The successor answered the first probe after it."""
    here = Pair()
    registry = here.world.registry
    registry.kv_compatibility.record_send(here.prefill, here.decode)
    registry.has_liveness_connection = lambda instance: True
    here.kv_history.on_message(["ended", here.decode.key, here.decode.kv.text, now()])
    here.due[0]()
    assert not here.possible and [m[0] for m in here.sent] == ["sent"], "it is not broadcast again"


def test_without_a_lifeline_a_reported_end_is_applied_at_once() -> None:
    here = Pair()
    here.world.registry.kv_compatibility.record_send(here.prefill, here.decode)
    here.kv_history.on_message(["ended", here.decode.key, here.decode.kv.text, now()])
    assert not here.possible and not here.due


# -- flags


class Two:
    """Two workers that both know one pair."""

    def __init__(self) -> None:
        self.table = SharedTable(memoryview(bytearray(SharedTable.size(2))), 2)
        self.worlds = [World(), World()]
        self.wakeups = 0
        self.flags, self.prefills, self.decodes = [], [], []
        for number, world in enumerate(self.worlds):
            load = WorkerLoad(self.table, number, world.registry, lambda: None)
            self.flags.append(SharedFlags(self.table, number, world.registry, self._poked))
            self.prefills.append(world.ready(Role.PREFILL, 1))
            self.decodes.append(world.ready(Role.DECODE, 2))
            load.assign_slot(self.prefills[-1], 0)
            load.assign_slot(self.decodes[-1], 1)
            self.table.rows[number].head[RowHeader.HEARTBEAT] = now()

    def _poked(self) -> None:
        self.wakeups += 1


def test_the_newest_drain_or_undrain_holds() -> None:
    two = Two()
    here, there = two.flags
    here.drain(two.decodes[0], True)
    assert not there.drain_applied_by_all(two.decodes[1])
    there.apply_drain(two.decodes[1])
    assert two.decodes[1].draining and there.drain_applied_by_all(two.decodes[1])
    there.drain(two.decodes[1], False)
    here.apply_drain(two.decodes[0])
    assert not two.decodes[0].draining and here.drain_applied_by_all(two.decodes[0])
    here.drain(two.decodes[0], True)
    there.apply_drain(two.decodes[1])
    assert two.decodes[1].draining


def test_a_drain_survives_the_worker_that_received_it() -> None:
    two = Two()
    two.flags[0].drain(two.decodes[0], True)
    two.table.retire(0)
    two.flags[1].apply_drain(two.decodes[1])
    assert two.decodes[1].draining


def test_a_stall_is_reported_once_and_ends_for_all() -> None:
    two = Two()
    here, there = two.flags
    assert here.report_stall(two.decodes[0]) and not there.report_stall(two.decodes[1])
    for world, one in zip(two.worlds, two.decodes, strict=True):
        world.registry.freeze(one, "is stalled")
    assert there.frozen(two.decodes[1]) and not there.given_up(two.decodes[1])
    here.give_up(two.decodes[0])
    assert there.given_up(two.decodes[1])
    two.worlds[1].registry.unfreeze(two.decodes[1], "moves")
    assert not here.frozen(two.decodes[0])
    here.apply_recovery(two.decodes[0])
    assert two.decodes[0].state is State.PROBING
    assert there.report_stall(two.decodes[1]), "the next time is another one"
    assert not here.given_up(two.decodes[0])


async def test_the_likeliest_prefill_of_all_workers_is_replayed_first() -> None:
    two = Two()
    two.flags[0].report_stall(two.decodes[0])
    for world, one in zip(two.worlds, two.decodes, strict=True):
        world.registry.freeze(one, "is stalled")
    unlikely = asyncio.create_task(two.flags[0].may_replay(two.decodes[0], 0.5))
    assert await soon(two.flags[1].may_replay(two.decodes[1], 0.1))
    assert not unlikely.done()
    nothing_more = asyncio.create_task(two.flags[1].may_replay(two.decodes[1], None))
    assert await soon(unlikely)
    assert not nothing_more.done(), "the other one is still trying"
    assert not await soon(two.flags[0].may_replay(two.decodes[0], None))
    assert not await soon(nothing_more)


async def test_unresponsive_workers_are_not_waited_for() -> None:
    two = Two()
    two.table.rows[1].head[RowHeader.HEARTBEAT] = 1
    two.flags[0].report_stall(two.decodes[0])
    two.worlds[0].registry.freeze(two.decodes[0], "is stalled")
    assert await soon(two.flags[0].may_replay(two.decodes[0], 0.5))
    assert not await soon(two.flags[0].may_replay(two.decodes[0], None))


def test_stalled_prefills_are_counted_once_over_all_workers() -> None:
    two = Two()
    assert two.flags[0].report_blocked_prefill(two.prefills[0], two.decodes[0]) == 1
    assert two.flags[1].report_blocked_prefill(two.prefills[1], two.decodes[1]) == 1, "the same one"
    other = two.worlds[1].ready(Role.PREFILL, 3)
    other.slot = 2
    assert two.flags[1].report_blocked_prefill(other, two.decodes[1]) == 2
    for world, one in zip(two.worlds, two.decodes, strict=True):
        world.registry.process_ended(one)
    assert two.table.rows[1].flag(1, FlagColumn.STALLED_SENDERS) == 0


def test_a_hung_process_is_reported_once_until_it_shows_a_sign_of_life() -> None:
    two = Two()
    here, there = two.flags
    last_sign = now() / 1e9
    assert here.report_hung(two.decodes[0], last_sign) and not there.report_hung(two.decodes[1], last_sign)
    two.table.retire(0)
    assert not there.report_hung(two.decodes[1], last_sign), "a report outlives the worker that made it"
    assert there.report_hung(two.decodes[1], now() / 1e9)


def test_progress_of_other_workers_is_added_up() -> None:
    two = Two()
    two.decodes[0].progress.outputs = 7
    assert two.flags[0].outputs(two.decodes[0]) == 0
    assert two.flags[1].outputs(two.decodes[1]) == 7
