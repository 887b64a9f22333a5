"""The scheduler half with stand-ins for vLLM's requests: what is loaded, what is offered, and when blocks may go."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from disagg_kv.engine.groups import CacheGroup, CacheGroups
from disagg_kv.engine.params import UNCERTAIN
from disagg_kv.engine.scheduler import ConnectorScheduler
from disagg_kv.settings import Settings
from tests.kv.checkpoints import lora

PEER = "127.0.0.1:21001"


@dataclass
class Request:
    request_id: str
    prompt_token_ids: list[int] | None
    kv_transfer_params: Any
    status: str = "FINISHED_LENGTH_CAPPED"
    outputs: int = 0
    cache_salt: str | None = None
    lora_request: Any = None
    prompt_embeds: Any = None
    max_tokens: int = 1
    mm_features: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.prompt_token_ids or ())
        self._all_token_ids = list(self.prompt_token_ids or ())

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + self.outputs


def _half(decode: bool, **settings: Any) -> ConnectorScheduler:
    return ConnectorScheduler(decode, CacheGroups((CacheGroup(4),)), Settings(**settings))


def _decode_request(name: str = "r", transfer: str = "t", tokens: int = 10, **more: Any) -> Request:
    return Request(name, list(range(tokens)), {"transfer_id": transfer, "from": PEER}, **more)


def _blocks(*ids: int) -> Any:
    return _lists(list(ids))


def _lists(*ids: list[int]) -> Any:
    return SimpleNamespace(get_block_ids=lambda: ids)


def _output(new: dict[str, tuple[list[int], int, int]] | None = None, cached: Any = (), preempted: Any = ()) -> Any:
    """``new``: request -> (blocks, computed, scheduled); ``cached``: (request, new blocks, computed, scheduled,
    resumed). Blocks are a list, or a tuple of lists of several groups."""
    new = new or {}
    scheduled = {name: count for name, (_, _, count) in new.items()} | {one[0]: one[3] for one in cached}
    return SimpleNamespace(
        total_num_scheduled_tokens=sum(scheduled.values()),
        num_scheduled_tokens=scheduled,
        preempted_req_ids=set(preempted),
        scheduled_new_reqs=[
            SimpleNamespace(req_id=name, block_ids=_groups(ids), num_computed_tokens=computed)
            for name, (ids, computed, _) in new.items()
        ],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[one[0] for one in cached],
            new_block_ids=[_groups(one[1]) if one[1] is not None else None for one in cached],
            num_computed_tokens=[one[2] for one in cached],
            resumed_req_ids={one[0] for one in cached if one[4]},
        ),
    )


def _groups(ids: Any) -> tuple[list[int], ...]:
    return ids if isinstance(ids, tuple) else (ids,)


# Decode.


def test_everything_that_is_missing_is_loaded() -> None:
    half, request = _half(True), _decode_request()
    assert half.num_matched_tokens(request, 0) == (10, True)
    assert half.num_matched_tokens(request, 4) == (6, True), "may be asked again before blocks are there"
    half.allocated(request, _blocks(7, 8, 9), 6)
    (load,) = half.plan(_output()).loads
    assert (load.request, load.address, load.first, load.blocks) == ("r", PEER, 1, [8, 9])
    assert not half.plan(_output()).loads


def test_a_failed_load_is_not_tried_again() -> None:
    half, request = _half(True), _decode_request()
    half.num_matched_tokens(request, 0)
    half.allocated(request, _blocks(7, 8, 9), 10)
    half.transfers_finished(set(), {"r"})
    assert half.num_matched_tokens(request, 0) == (0, False)


def test_a_preempted_request_is_computed() -> None:
    half, request = _half(True), _decode_request()
    half.num_matched_tokens(request, 0)
    half.allocated(request, _blocks(7, 8, 9), 10)
    half.transfers_finished(set(), {"r"})
    request.outputs = 5
    assert half.num_matched_tokens(request, 0) == (0, False)


def test_what_fits_one_block_is_computed_and_released() -> None:
    half, request = _half(True), _decode_request(tokens=12)
    assert half.num_matched_tokens(request, 8) == (0, False)
    plan = half.plan(_output())
    assert [(address, key.transfer) for address, key in plan.releases] == [(PEER, "t")]
    assert _half(True, min_load_tokens=1).num_matched_tokens(_decode_request(tokens=12), 8) == (4, True)


@pytest.mark.parametrize(
    "more", [{"skip_reading_prefix_cache": True}, {"sampling_params": SimpleNamespace(prompt_logprobs=0)}]
)
def test_prompt_logprobs_are_computed(more: dict[str, Any]) -> None:
    half, request = _half(True), _decode_request()
    for name, value in more.items():
        setattr(request, name, value)
    assert half.num_matched_tokens(request, 0) == (0, False)
    assert len(half.plan(_output()).releases) == 1


def test_the_second_of_two_answers_waits_for_the_first() -> None:
    half = _half(True)
    first, second = _decode_request("0_r"), _decode_request("1_r")
    assert half.num_matched_tokens(first, 0) == (10, True)
    half.allocated(first, _blocks(7, 8, 9), 10)
    assert half.num_matched_tokens(second, 0) == (None, False)
    half.transfers_finished(set(), {"0_r"})
    assert half.num_matched_tokens(second, 8) == (0, False), "what is missing now is computed"
    plan = half.plan(_output())
    assert len(plan.loads) == 1 and not plan.releases


def test_prompts_of_one_transfer_have_different_keys() -> None:
    half = _half(True)
    first, second = _decode_request("a", tokens=10), _decode_request("b", tokens=11)
    assert half.num_matched_tokens(first, 0) == (10, True)
    half.allocated(first, _blocks(1, 2, 3), 10)
    assert half.num_matched_tokens(second, 0) == (11, True)


@pytest.mark.parametrize("name", ["salt", "adapter"])
def test_salt_and_lora_make_another_key(name: str, tmp_path: Path) -> None:
    more = {"cache_salt": "s"} if name == "salt" else {"lora_request": lora(tmp_path)}
    half = _half(True)
    half.num_matched_tokens(_decode_request("a"), 0)
    half.allocated(_decode_request("a"), _blocks(1, 2, 3), 10)
    assert half.num_matched_tokens(_decode_request("b", **more), 0) == (10, True)


@pytest.mark.parametrize("decode", [True, False])
def test_the_adapters_digest_goes_along(tmp_path: Path, decode: bool) -> None:
    half = _half(decode)
    for folder, seed in (("a", 0), ("b", 1), ("c", 0)):
        request = _decode_request(folder, folder, lora_request=lora(tmp_path / folder, seed, number=ord(folder)))
        half.num_matched_tokens(request, 0)
        half.allocated(request, _blocks(1, 2, 3), 10)
    plan = half.plan(_output())
    first, second, third = (one.adapter for one in (plan.loads if decode else plan.opens))
    assert first == third != second and len(first) == 32


@pytest.mark.parametrize("decode", [True, False])
def test_an_adapter_that_cannot_be_read_is_computed(tmp_path: Path, decode: bool) -> None:
    half, adapter = _half(decode), lora(tmp_path / "a")
    half.adapters.loaded(adapter)
    lora(tmp_path / "a", seed=1)
    request = _decode_request(lora_request=adapter)
    assert half.num_matched_tokens(request, 0) == (0, False)
    half.allocated(request, _blocks(1, 2, 3), 0)
    plan = half.plan(_output())
    assert not plan.loads
    # Neither waits for the other: decode releases the KV, and prefill offers what no WANT fits.
    assert [one.adapter for one in plan.opens] == ([] if decode else [UNCERTAIN])
    assert len(plan.releases) == decode


def test_decode_loads_nothing_once_its_weights_are_written(caplog: pytest.LogCaptureFixture) -> None:
    half, waiting = _half(True), _decode_request("a", "a")
    assert half.num_matched_tokens(waiting, 0) == (10, True)
    half.weights_written("reload_weights")
    half.weights_written("reload_weights")
    assert caplog.text.count("weights are updated in place (reload_weights)") == 1
    assert half.plan(_output()).updated and not half.plan(_output()).updated
    for request in (waiting, _decode_request("b", "b")):
        assert half.num_matched_tokens(request, 0) == (0, False)
        half.allocated(request, _blocks(1, 2, 3), 0)
        assert half.finished(request) is False
    assert not half.plan(_output()).loads


def test_prefill_offers_nothing_once_its_weights_are_written() -> None:
    half, begun, late = _half(False), _decode_request("a", "a"), _decode_request("b", "b")
    half.allocated(begun, _blocks(1), 0)
    half.plan(_output({"a": ([1], 0, 4)}))
    half.weights_written("update_weights")
    half.allocated(late, _blocks(4, 5, 6), 0)
    plan = half.plan(_output({"b": ([4, 5, 6], 0, 10)}, cached=[("a", [2, 3], 4, 6, False)]))
    assert plan.updated and plan.drops == [("a", "the weights were updated")]
    assert not plan.opens and not plan.progress
    assert half.finished(begun) is True and half.finished(late) is False


def test_an_aborted_load_is_cancelled() -> None:
    half, request = _half(True), _decode_request()
    half.num_matched_tokens(request, 0)
    half.allocated(request, _blocks(7, 8, 9), 10)
    assert half.finished(request) is False
    assert half.plan(_output()).cancels == ["r"]


def test_a_request_that_ends_before_it_was_scheduled_is_released() -> None:
    half = _half(True)
    half.finished(_decode_request())
    assert [key.transfer for _, key in half.plan(_output()).releases] == ["t"]


def test_an_aborted_follower_does_not_release_what_the_first_loads() -> None:
    half = _half(True)
    first, second = _decode_request("0_r"), _decode_request("1_r")
    half.num_matched_tokens(first, 0)
    half.allocated(first, _blocks(7, 8, 9), 10)
    half.num_matched_tokens(second, 0)
    half.finished(second)
    plan = half.plan(_output())
    assert not plan.releases and not plan.cancels


@pytest.mark.parametrize(
    "params",
    [
        None,
        {},
        [],
        "x",
        {"transfer_id": "t"},
        {"transfer_id": "t", "from": "10.0.0.1:1"},
        {"transfer_id": {}, "from": PEER},
        {"transfer_id": "t", "from": {"a": 1}},
    ],
)
def test_params_that_make_no_sense_are_ignored(params: Any) -> None:
    half, request = _half(True), Request("r", list(range(10)), params)
    assert half.num_matched_tokens(request, 0) == (0, False)
    half.allocated(request, _blocks(1), 0)
    assert half.finished(request) is False


def test_prompts_given_as_embeddings_are_computed() -> None:
    request = Request("r", None, {"transfer_id": "t", "from": PEER}, prompt_embeds=object())
    assert _half(True).num_matched_tokens(request, 0) == (0, False)


# Prefill.


def _offer(half: ConnectorScheduler, name: str = "r", transfer: str = "t", tokens: int = 10) -> Request:
    request = Request(name, list(range(tokens)), {"transfer_id": transfer})
    assert half.num_matched_tokens(request, 0) == (0, False)
    half.allocated(request, _blocks(), 0)
    return request


def test_a_prompt_is_offered_and_its_blocks_stay() -> None:
    half = _half(False)
    request = _offer(half)
    plan = half.plan(_output({"r": ([1, 2, 3], 0, 10)}))
    assert [(one.request, one.total) for one in plan.opens] == [("r", 3)]
    assert [(one.blocks, one.ready) for one in plan.progress] == [([1, 2, 3], 3)]
    assert half.finished(request) is True
    assert not half.plan(_output()).drops
    half.transfers_finished({"r"}, set())


def test_chunks_of_a_prompt() -> None:
    half = _half(False)
    _offer(half, tokens=11)
    assert [one.ready for one in half.plan(_output({"r": ([1, 2], 0, 6)})).progress] == [1]
    assert not half.plan(_output(cached=[("other", [9], 0, 1, False)])).progress
    step = half.plan(_output(cached=[("r", [3], 6, 5, False)])).progress
    assert [(one.blocks, one.ready) for one in step] == [([1, 2, 3], 3)]
    assert not half.plan(_output(cached=[("r", None, 11, 1, False)])).progress, "decoding adds nothing"


def test_blocks_from_the_prefix_cache_are_offered_too() -> None:
    half = _half(False)
    _offer(half)
    assert [one.ready for one in half.plan(_output({"r": ([1, 2, 3], 8, 2)})).progress] == [3]


def test_a_preempted_prompt_starts_anew() -> None:
    half = _half(False)
    request = _offer(half)
    half.plan(_output({"r": ([1, 2], 0, 8)}))
    assert half.plan(_output(preempted=["r"])).suspends == ["r"]
    half.allocated(request, _blocks(), 0)
    plan = half.plan(_output(cached=[("r", [7, 8, 9], 0, 10, True)]))
    assert not plan.opens
    assert [(one.blocks, one.ready) for one in plan.progress] == [([7, 8, 9], 3)]


def test_an_aborted_prompt_is_dropped_but_its_blocks_wait_for_the_worker() -> None:
    half = _half(False)
    request = _offer(half, tokens=20)
    half.plan(_output({"r": ([1, 2], 0, 8)}))
    request.status = "FINISHED_ABORTED"
    assert half.finished(request) is True
    assert half.plan(_output()).drops == [("r", "aborted")]


def test_the_same_key_is_offered_once() -> None:
    half = _half(False)
    _offer(half, "0_r")
    second = _offer(half, "1_r")
    assert len(half.plan(_output()).opens) == 1
    assert half.finished(second) is False


def test_a_key_can_be_offered_again() -> None:
    half = _half(False)
    half.finished(_offer(half))
    half.transfers_finished({"r"}, set())
    half.plan(_output())
    _offer(half, "again")
    assert [one.request for one in half.plan(_output()).opens] == ["again"]


def test_requests_without_params_leave_no_trace() -> None:
    half = _half(False)
    request = Request("r", [1, 2, 3], None)
    half.num_matched_tokens(request, 0)
    half.allocated(request, _blocks(1), 0)
    plan = half.plan(_output({"r": ([1], 0, 3)}))
    assert not plan.opens and not plan.progress
    assert half.finished(request) is False


def test_an_empty_step_is_marked_idle() -> None:
    half = _half(False)
    assert half.plan(_output()).idle
    assert not half.plan(_output({"r": ([1], 0, 3)})).idle


def test_an_idle_engine_steps_for_what_its_worker_side_must_know() -> None:
    """vLLM's has_pending_push_work: without requests there is no step that would take the plan."""
    half = _half(False)
    assert not half.has_news
    half.weights_written("reload_weights")
    assert half.has_news
    assert half.plan(_output()).updated
    assert not half.has_news, "once, or the engine would never rest"
    decode, request = _half(True), _decode_request()
    decode.num_matched_tokens(request, 0)
    decode.finished(request)
    assert decode.has_news and decode.plan(_output()).releases and not decode.has_news


# Several cache groups: full attention, a window of 8 tokens and chunks of 8, in blocks of 4.


IMAGE = SimpleNamespace(identifier="image", mm_position=SimpleNamespace(offset=15, length=4))
"""It ends with the prompts of these tests."""


def _hybrid(decode: bool) -> ConnectorScheduler:
    groups = CacheGroups((CacheGroup(4), CacheGroup(4, window=8), CacheGroup(4, chunk=8)))
    return ConnectorScheduler(decode, groups, Settings(min_load_tokens=1))


def _prompt(half: ConnectorScheduler, name: str = "r", tokens: int = 19, **more: Any) -> Request:
    request = Request(name, list(range(tokens)), {"transfer_id": name}, **more)
    half.added(request)
    half.allocated(request, _lists([], [], []), 0)
    return request


def test_decode_loads_all_but_the_last_token_into_the_blocks_it_has() -> None:
    half, request = _hybrid(True), _decode_request(tokens=19)
    half.added(request)
    assert half.num_matched_tokens(request, 0) == (18, True)
    assert half.num_matched_tokens(request, 8) == (10, True)
    half.allocated(request, _lists([1, 2, 3, 4, 5], [0, 0, 6, 7, 8], [0, 0, 0, 0, 9]), 10)
    (load,) = half.plan(_output()).loads
    assert (load.first, load.blocks, load.tails) == (2, [3, 4, 5, 6, 7, 8, 9], (3, 1))


def test_a_prefix_without_its_state_is_loaded_however_little_follows() -> None:
    """If nothing is loaded, vLLM computes from the last state that it has."""
    groups = CacheGroups((CacheGroup(4), CacheGroup(4, state=True)))
    half, request = ConnectorScheduler(True, groups, Settings()), _decode_request(tokens=19)
    assert half.num_matched_tokens(request, 16) == (2, True)
    half.allocated(request, _lists([1, 2, 3, 4, 5], [0, 0, 0, 0, 9]), 2)
    (load,) = half.plan(_output()).loads
    assert (load.first, load.blocks, load.tails) == (4, [5, 9], (1,))


def test_both_sides_have_one_key_although_prefill_cuts_the_prompt() -> None:
    decode, prefill, request = _hybrid(True), _hybrid(False), _decode_request("r", "r", tokens=19)
    decode.num_matched_tokens(request, 0)
    decode.allocated(request, _lists([1] * 5, [0, 0, 2, 2, 2], [0] * 4 + [3]), 18)
    cut = _prompt(prefill)
    (load,), (offer,) = decode.plan(_output()).loads, prefill.plan(_output()).opens
    assert load.key == offer.key and len(load.blocks) == offer.total == 9 and load.tails == offer.tails == (3, 1)
    assert (cut.num_prompt_tokens, cut.prompt_token_ids, cut._all_token_ids) == (18, [*range(18)], [*range(18)])


def test_tails_are_sent_with_the_last_chunk_only() -> None:
    """By then vLLM has freed blocks behind the window, and others may have them."""
    half = _hybrid(False)
    request = _prompt(half)
    plan = half.plan(_output({"r": (([1, 2], [11, 12], [21, 22]), 0, 8)}))
    assert [(one.blocks, one.ready) for one in plan.progress] == [([1, 2], 2)]
    plan = half.plan(_output(cached=[("r", ([3, 4], [13, 14], [23, 24]), 8, 8, False)]))
    assert [one.blocks for one in plan.progress] == [[1, 2, 3, 4]]
    plan = half.plan(_output(cached=[("r", ([5], [15], [25]), 16, 2, False)]))
    assert [(one.blocks, one.ready) for one in plan.progress] == [([1, 2, 3, 4, 5, 13, 14, 15, 25], 9)]
    assert half.finished(request, ([1, 2, 3, 4, 5], [0, 0, 13, 14, 15], [0, 0, 0, 0, 25])) is True
    assert not half.plan(_output()).drops


def test_a_preempted_prompt_of_several_groups_starts_anew() -> None:
    half = _hybrid(False)
    request = _prompt(half)
    half.plan(_output({"r": (([1, 2], [11, 12], [21, 22]), 0, 8)}))
    half.plan(_output(preempted=["r"]))
    half.allocated(request, _lists([], [], []), 0)
    lists = ([31, 32, 33, 34, 35], [0, 0, 43, 44, 45], [0, 0, 0, 0, 55])
    plan = half.plan(_output(cached=[("r", lists, 12, 6, True)]))
    assert [one.blocks for one in plan.progress] == [[31, 32, 33, 34, 35, 43, 44, 45, 55]] and not plan.opens


def test_blocks_that_vllm_has_freed_are_not_sent() -> None:
    half = _hybrid(False)
    request = _prompt(half)
    plan = half.plan(_output({"r": (([1, 2, 3, 4, 5], [0, 0, 0, 14, 15], [0, 0, 0, 0, 25]), 16, 2)}))
    assert not plan.progress and [name for name, _ in plan.drops] == ["r"]
    assert half.finished(request, ([1], [], [])) is True


def test_blocks_that_change_until_the_end_of_the_request_are_dropped(caplog: pytest.LogCaptureFixture) -> None:
    half = _hybrid(False)
    request = _prompt(half)
    half.plan(_output({"r": (([1, 2, 3, 4, 5], [0, 0, 13, 14, 15], [0, 0, 0, 0, 25]), 16, 2)}))
    assert half.finished(request, ([1, 2, 3, 4, 5], [0, 0, 0, 14, 15], [0, 0, 0, 0, 25])) is True
    assert half.plan(_output()).drops == [("r", "its blocks have changed")]
    assert "ended with other blocks" in caplog.text


@pytest.mark.parametrize("more", [{"tokens": 1}, {"max_tokens": 2}, {"max_tokens": None}, {"mm_features": [IMAGE]}])
def test_what_prefill_cannot_cut_is_gone_at_once(more: dict[str, Any]) -> None:
    half = _hybrid(False)
    request = _prompt(half, **more)
    assert request.num_prompt_tokens == len(request._all_token_ids) == more.get("tokens", 19)
    plan = half.plan(_output({"r": (([1, 2, 3, 4, 5], [0] * 5, [0] * 5), 0, request.num_prompt_tokens)}))
    assert len(plan.opens) == 1 and [name for name, _ in plan.drops] == ["r"] and not plan.progress
    assert half.finished(request, ([1], [2], [3])) is True


def test_requests_without_a_transfer_are_not_cut() -> None:
    half, request = _hybrid(False), Request("r", list(range(19)), None)
    half.added(request)
    assert request.num_prompt_tokens == 19


def test_one_group_is_not_cut() -> None:
    half, request = _half(False), _decode_request(tokens=19)
    half.added(request)
    assert request.num_prompt_tokens == 19
