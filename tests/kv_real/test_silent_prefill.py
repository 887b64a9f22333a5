"""Prefill's process is stopped: its kernel still accepts what decode sends, and nothing comes back."""

from __future__ import annotations

import asyncio
import os
import signal
import time

from tests.kv_real.conftest import LOAD_SECONDS, Trio, texts
from tests.kv_real.test_pair import _body


async def test_requests_on_a_stopped_prefill_are_computed_long_before_their_deadline(trio: Trio) -> None:
    await trio.both(_body(trio.prompt(40)))
    bodies = [_body(trio.prompt(100)) for _ in range(3)]
    want = [texts(await trio.plain.post(body)) for body in bodies]
    assert trio.prefill.process is not None
    os.killpg(trio.prefill.process.pid, signal.SIGSTOP)
    try:
        start = time.monotonic()
        found = await asyncio.gather(
            *(
                trio.decode.post(body, transfer_id=f"stopped-{number}", from_=trio.prefill.kv_address)
                for number, body in enumerate(bodies)
            )
        )
        assert time.monotonic() - start < LOAD_SECONDS - 1, "liveness probes notice, not the deadline"
        assert [texts(answer) for answer in found] == want
        assert "did not answer 10 liveness probes" in trio.decode.log.read_text()
    finally:
        os.killpg(trio.prefill.process.pid, signal.SIGCONT)
    before = (await trio.decode.tokens_by_source()).get("external_kv_transfer", 0.0)
    body = _body(trio.prompt(100))
    assert texts((await trio.both(body))[1]) == texts(await trio.plain.post(body))
    assert (await trio.decode.tokens_by_source())["external_kv_transfer"] - before >= 99
