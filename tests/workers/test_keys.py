"""Client keys with several workers: one limit for all of them, and a file that is bad when a worker is replaced."""

from __future__ import annotations

import os
import signal

from disagg_proxy.config.keys_file import digest
from tests.workers.conftest import samples, until

KEY = "sk-alice"
TABLE = (
    f'[[keys]]\nname = "alice"\nhash = "sha256:{digest(KEY.encode()).hex()}"\n'
    "requests_per_minute = 4\nmonitoring = true\n"
)


async def test_all_workers_keep_one_limit_and_count_together(fleet, engines, tmp_path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(TABLE)
    proxy = await fleet(2, API_KEYS_FILE=str(file))
    proxy.headers = {"Authorization": f"Bearer {KEY}"}
    for engine in await engines(proxy.zmq):
        await proxy.until_known(engine)
    doors = await proxy.doors()
    answers = [(await doors[n % 2].ask())[0] for n in range(8)]
    assert answers == [200] * 4 + [429] * 4
    for door in doors:
        found = samples(await door.text("/metrics"))
        assert found['disagg_proxy_key_requests_total{key="alice",outcome="ok"}'] == 4
        assert found['disagg_proxy_key_refusals_total{key="alice",limit="requests"}'] == 4


async def test_a_worker_that_is_replaced_while_the_file_is_bad_waits_for_a_good_one(fleet, tmp_path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(TABLE)
    proxy = await fleet(2, API_KEYS_FILE=str(file))
    proxy.headers = {"Authorization": f"Bearer {KEY}"}
    doors = await proxy.doors()
    pids = await proxy.pids()
    file.write_text("[[keys]")
    before = len(proxy.lines)
    os.kill(pids[0], signal.SIGKILL)
    await proxy.until_written(rf"disagg-proxy: API_KEYS_FILE: {file}: is not valid TOML", before)
    assert (await doors[1].get("/stats"))["answered_by"] == 1, "the other one serves with the keys that it has"
    file.write_text(TABLE)
    await proxy.until_written("Worker 0 serves again", before)
    assert "Traceback" not in proxy.written

    async def replaced() -> bool:
        return (await proxy.door()).worker == 0

    await until(replaced)


async def test_sighup_rereads_the_file_in_every_worker_and_a_bad_one_changes_nothing(fleet, engines, tmp_path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(TABLE.replace("requests_per_minute = 4", ""))
    proxy = await fleet(2, API_KEYS_FILE=str(file))
    proxy.headers = {"Authorization": f"Bearer {KEY}"}
    for engine in await engines(proxy.zmq):
        await proxy.until_known(engine)
    doors = await proxy.doors()

    async def statuses() -> list[int]:
        return [(await door.ask())[0] for door in doors]

    assert await statuses() == [200, 200]
    file.write_text("[[keys]")
    before = len(proxy.lines)
    proxy.process.send_signal(signal.SIGHUP)
    for worker in range(2):
        await proxy.until_written(rf"worker {worker} [^\n]*Not reloaded: API_KEYS_FILE: {file}: is not valid", before)
    assert await statuses() == [200, 200]
    file.write_text(TABLE.replace("alice", "bob").replace(digest(KEY.encode()).hex(), "0" * 64))
    before = len(proxy.lines)
    proxy.process.send_signal(signal.SIGHUP)
    for worker in range(2):
        await proxy.until_written(rf"worker {worker} [^\n]*Reloaded: API_KEYS_FILE: added bob; removed alice", before)
    assert await statuses() == [401, 401]
