"""Prompt sizes without a tokenizer."""

import json
import random
from collections import Counter
from math import ceil
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg_proxy.admission.token_estimate import TokenEstimator, in_blocks
from disagg_proxy.openai.fields import CHAT, COMPLETIONS, MESSAGES, RESPONSES, Route
from disagg_proxy.openai.media import STANDS_FOR
from disagg_proxy.openai.prefix_hash import AffinityNeeds
from disagg_proxy.openai.prepare import PromptSize, prepare, prompt_size


@pytest.mark.parametrize(
    ("body", "size"),
    [
        ({"prompt": "abcd"}, (0, 4)),
        ({"prompt": "é漢"}, (0, 5)),
        ({"prompt": "\ud800"}, (0, 3)),
        ({"prompt": [1, 2, 3]}, (3, 0)),
        ({"prompt": [[1, 2], [3]]}, (3, 0)),
        ({"prompt": ["ab", "c"]}, (0, 3)),
        ({"prompt": [1, 2, 3], "n": 4}, (12, 0)),
        ({"prompt": "ab", "n": "4"}, (0, 8)),
        ({"prompt": "ab", "n": "many"}, (0, 2)),
        ({"messages": [{"role": "user", "content": "hi"}]}, (0, 17)),
        ({"prompt": "data: not media"}, (0, 15)),
        ({"messages": [{"role": "user", "content": "data:" + "x" * 999}]}, (0, 4 + 4 + 7 + 1004)),
        ({"messages": [], "tools": [{"properties": {"metres": {"type": "integer"}}}]}, (0, 10 + 6 + 4 + 7)),
        ({"documents": [{"text": "abc"}]}, (0, 7)),
        ({}, (0, 0)),
        ({"messages": 5}, (0, 0)),
        ({"prompt": None}, (0, 0)),
    ],
)
def test_what_counts(body: dict, size: tuple[int, ...]) -> None:
    assert prompt_size(COMPLETIONS if "prompt" in body else CHAT, body) == PromptSize(*size)


ALL_FIELDS = {
    "prompt": ["x", "yz"], "messages": [], "system": "abc", "tools": ["abcd"], "documents": ["abcde"],
    "input": "abcdef", "instructions": "abcdefg", "n": 7, "max_tokens": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("route", "choices", "prompts", "text"),
    [(COMPLETIONS, 7, 2, 7 * 3), (CHAT, 7, 1, 7 * (4 + 5)), (MESSAGES, 1, 1, 3 + 4), (RESPONSES, 1, 1, 4 + 6 + 7)],
)
def test_only_the_fields_of_the_route_count(route: Route, choices: int, prompts: int, text: int) -> None:
    """vLLM ignores unknown fields, ``n`` on /v1/messages among them."""
    prepared = prepare(route, json.dumps(ALL_FIELDS).encode())
    assert (prepared.choices, prepared.prompts, prepared.prompt) == (choices, prompts, (0, text, 0))


def base64(text: str = "") -> dict[str, Any]:
    return {"type": "base64", "media_type": "image/png", "data": "A" * 5000 + text}


URL = {"url": "data:image/png;base64," + "A" * 5000}
MEDIA: list[tuple[Route, dict[str, Any]]] = [
    (CHAT, {"type": "image_url", "image_url": URL}),
    (CHAT, {"type": "image_url", "image_url": {"url": "https://a/b.png"}}),
    (CHAT, {"image_url": URL}),
    (CHAT, {"type": "input_audio", "input_audio": {"data": "A" * 5000, "format": "wav"}}),
    (CHAT, {"type": "audio_url", "audio_url": URL}),
    (CHAT, {"type": "video_url", "video_url": URL}),
    (CHAT, {"type": "image_embeds", "image_embeds": "A" * 5000}),
    (MESSAGES, {"type": "image", "source": base64()}),
    (MESSAGES, {"type": "document", "source": base64()}),
    (RESPONSES, {"type": "input_image", "image_url": URL["url"]}),
    (RESPONSES, {"type": "input_file", "file_data": "A" * 5000}),
]


def with_parts(route: Route, *parts: dict[str, Any], role: str = "user") -> dict[str, Any]:
    return {"input" if route is RESPONSES else "messages": [{"role": role, "content": list(parts)}], "max_tokens": 9}


@pytest.mark.parametrize(("route", "medium"), MEDIA)
@pytest.mark.parametrize("wanted", [None, AffinityNeeds(prefix=True)], ids=["undecoded", "decoded"])
def test_media_are_counted_and_their_base64_is_no_text(
    route: Route, medium: dict[str, Any], wanted: AffinityNeeds | None
) -> None:
    text = {"type": "text", "text": "Which is larger? " * 200}
    both = prepare(route, json.dumps(with_parts(route, text, medium, medium)).encode(), wanted)
    alone = prepare(route, json.dumps(with_parts(route, text)).encode(), wanted)
    assert both.prompt == alone.prompt._replace(media=2) and both.prompt.text < 3600
    if wanted is not None and both.affinity.size:
        # Their bytes do not use up the length that is hashed: what follows an image still tells prompts apart.
        assert both.affinity.size == alone.affinity.size + 2 * STANDS_FOR


def test_the_media_of_a_users_tool_results_count() -> None:
    """A screenshot; vLLM renders the parts of a user's tool result, and the JSON of another's as text."""
    result = {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "x"}, MEDIA[7][1]]}
    assert prompt_size(MESSAGES, with_parts(MESSAGES, result)).media == 1
    size = prompt_size(MESSAGES, with_parts(MESSAGES, result, role="assistant"))
    assert size.media == 0 and size.text > 5000


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "type": "image", "content": "A" * 5000}]},
        with_parts(MESSAGES, {"type": "tool_use", "id": "t", "name": "f", "input": MEDIA[7][1]}),
        with_parts(MESSAGES, {"type": "text", "text": "data:" + "A" * 5000}),
        {"messages": [], "tools": [{"name": "f", "input_schema": {"properties": {"a": MEDIA[7][1]}}}]},
    ],
)
def test_text_that_looks_like_media_is_text(body: dict[str, Any]) -> None:
    """Otherwise a long prompt could pass the limit on waiting KV unseen."""
    assert prompt_size(MESSAGES, body).media == 0 and prompt_size(MESSAGES, body).text > 5000


def test_what_is_not_rendered_does_not_count() -> None:
    thinking = {"type": "redacted_thinking", "data": "A" * 5000}
    assert prompt_size(MESSAGES, with_parts(MESSAGES, thinking, role="assistant")).text < 50


# -- the estimate

TEMPLATED = {"templated": True}
ENOUGH = 64 * 1024
"""Bytes of text after which a guess does not depend on what was assumed at first."""

DENSITIES = (0.8, 1.0, 1.3, 2.0, 2.7, 3.5, 4.0, 4.6, 6.0, 9.0)
"""Bytes per token: tool schemas, digits, base64, JSON, code, languages, repeated words, escaped scripts."""


def taught(*prompts: tuple[int, float], times: int = 1) -> TokenEstimator:
    """A guess that has seen texts of these bytes and bytes per token."""
    estimator = TokenEstimator()
    for size, density in prompts * times:
        estimator.observe("m", PromptSize(0, size), ceil(size / density))
    return estimator


def test_at_first_text_is_likely_four_bytes_a_token_and_at_most_one() -> None:
    estimator = TokenEstimator()
    assert estimator.tokens("m", PromptSize(10, 400)) == 110
    assert estimator.upper_bound("m", PromptSize(0, 400)) == 400
    assert estimator.upper_bound("m", PromptSize(0, 400), **TEMPLATED) == 464 == in_blocks(464)


def test_token_ids_are_exact_but_for_full_blocks() -> None:
    estimator = taught((20_000, 6.0), times=20)
    for tokens in (1, 16, 17, 400, 2000):
        assert estimator.tokens("m", PromptSize(tokens, 0)) == tokens
        assert estimator.upper_bound("m", PromptSize(tokens, 0), **TEMPLATED) == in_blocks(tokens) < tokens + 16
    # Three prompts of 21 tokens take six blocks, one of 63 takes four.
    assert estimator.upper_bound("m", PromptSize(63, 0), prompts=3) == in_blocks(63, 3) >= 3 * in_blocks(21)


@pytest.mark.parametrize("size", [1, 7, 100, 255])
def test_a_tiny_prompt_teaches_nothing_of_text(size: int) -> None:
    estimator = TokenEstimator()
    before = estimator.tokens("m", PromptSize(0, 10_000)), estimator.upper_bound("m", PromptSize(0, 10_000))
    for tokens in (1, size, 200):
        estimator.observe("m", PromptSize(0, size), tokens)
        estimator.observe("m", PromptSize(0, size), tokens, **TEMPLATED)
    assert (estimator.tokens("m", PromptSize(0, 10_000)), estimator.upper_bound("m", PromptSize(0, 10_000))) == before


def test_one_prompt_however_long_does_not_settle_it() -> None:
    estimator = taught((8000, 2.0), times=200)
    estimator.observe("m", PromptSize(0, 50_000_000), 4_000_000)
    assert estimator.upper_bound("m", PromptSize(0, 10_000)) >= 5000
    assert estimator.tokens("m", PromptSize(0, 10_000)) == pytest.approx(5000, rel=0.07)


@pytest.mark.parametrize("tokens", [5, 10_000])
def test_what_was_not_all_text_teaches_nothing(tokens: int) -> None:
    """A truncated prompt, base64 of an image; few words beside an image."""
    estimator = taught((8000, 4.0), times=20)
    before = estimator.tokens("m", PromptSize(0, 10_000)), estimator.upper_bound("m", PromptSize(0, 10_000))
    estimator.observe("m", PromptSize(0, 1000), tokens)
    assert (estimator.tokens("m", PromptSize(0, 10_000)), estimator.upper_bound("m", PromptSize(0, 10_000))) == before


def test_the_likely_number_follows_all_text_by_its_bytes() -> None:
    estimator = taught((300, 1.5), (9700, 5.0), times=200)
    assert estimator.tokens("m", PromptSize(0, 10_000)) == pytest.approx(300 / 1.5 + 9700 / 5.0, rel=0.02)
    for _ in range(400):
        estimator.observe("m", PromptSize(0, 10_000), 5000)
    assert estimator.tokens("m", PromptSize(0, 10_000)) == pytest.approx(5000, rel=0.03)
    assert estimator.tokens("other", PromptSize(0, 400)) == 100


@pytest.mark.parametrize("density", DENSITIES)
def test_the_limit_is_safe_from_the_first_prompt_and_soon_close(density: float) -> None:
    estimator, seen = TokenEstimator(), 0
    while seen < 4 * ENOUGH:
        size = 500 + 997 * seen % 16_000
        tokens = ceil(size / density)
        found = estimator.upper_bound("m", PromptSize(0, size))
        assert found >= tokens or (density < 1 and seen < ENOUGH)
        if seen >= ENOUGH:
            # A class of density is 19 % wide, and no text is taken to be less dense than four bytes a token.
            assert found <= max(1.19, density / 4) * tokens + 16
        estimator.observe("m", PromptSize(0, size), tokens)
        seen += size


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    kinds=st.lists(st.tuples(st.sampled_from(DENSITIES), st.floats(0.1, 1)), min_size=1, max_size=6),
)
def test_a_burst_of_any_kind_that_is_usual_is_never_underestimated(seed: int, kinds: list[tuple[float, float]]) -> None:
    """Usual: at least 1/16 of the bytes of the last mebibyte. Then no prompt of that kind has more tokens than its
    estimate, so neither has any burst, whatever kinds it mixes in whatever order."""
    chance, estimator = random.Random(seed), TokenEstimator()
    sent: list[tuple[int, float]] = []
    while sum(size for size, _ in sent) < 3 << 20:
        density = chance.choices([kind[0] for kind in kinds], [kind[1] for kind in kinds])[0]
        size = int(chance.lognormvariate(8.5, 1))
        sent.append((size, density))
        estimator.observe("m", PromptSize(0, size), ceil(size / density))
    late, left = Counter[float](), 1 << 20
    for size, density in reversed(sent):
        late[density] += size if left > 0 else 0
        left -= size
    usual = [density for density, size in late.items() if size >= late.total() / 16]
    assert usual
    for density in usual:
        for size in (300, 5000, 100_000):
            assert estimator.upper_bound("m", PromptSize(0, size)) >= ceil(size / density)
    # And by no more than the densest asks for.
    densest = min(late)
    assert estimator.upper_bound("m", PromptSize(0, 100_000)) <= 100_000 / min(densest, 4.0) * 1.19 + 16


def test_a_kind_that_was_never_seen_is_underestimated_four_times_at_most() -> None:
    """Clients can teach the densest text only; a burst of digits after English is bounded by that."""
    estimator = taught((16_000, 16.0), times=1000)
    assert estimator.upper_bound("m", PromptSize(0, 100_000)) == 25_008 == in_blocks(25_000)
    for _ in range(3):
        # Its first answers are enough.
        estimator.observe("m", PromptSize(0, 16_000), 16_000)
    assert estimator.upper_bound("m", PromptSize(0, 100_000)) == 100_000


def test_dense_texts_are_forgotten_when_they_stop() -> None:
    estimator = taught((8000, 1.0), times=300)
    for _ in range(600):
        estimator.observe("m", PromptSize(0, 8000), 2000)
    assert estimator.upper_bound("m", PromptSize(0, 8000)) == 2000


def test_a_chat_template_is_learnt_from_tiny_prompts() -> None:
    estimator = taught((8000, 4.0), times=20)
    for _ in range(200):
        estimator.observe("m", PromptSize(0, 20), 35, **TEMPLATED)
        estimator.observe("m", PromptSize(0, 20), 5)
    assert in_blocks(35) <= estimator.upper_bound("m", PromptSize(0, 20), **TEMPLATED) <= in_blocks(35) + 16
    assert estimator.upper_bound("m", PromptSize(0, 20)) == 16
    assert estimator.upper_bound("m", PromptSize(0, 80), prompts=4, **TEMPLATED) >= 4 * 35
    estimator.observe("m", PromptSize(0, 20), 1200, **TEMPLATED)
    assert estimator.upper_bound("m", PromptSize(0, 20), **TEMPLATED) <= in_blocks(35) + 16


@pytest.mark.parametrize(("text", "tokens"), [(0, 10), (10, 0), (-1, 1), (1000, 0)])
def test_odd_counts_teach_nothing(text: int, tokens: int) -> None:
    estimator = TokenEstimator()
    estimator.observe(None, PromptSize(0, text), tokens)
    assert estimator.tokens(None, PromptSize(0, 1000)) == 250 and estimator.upper_bound(
        None, PromptSize(0, 1000)
    ) == in_blocks(1000)


def test_media_teach_nothing_of_text() -> None:
    estimator = taught((8000, 4.0), times=20)
    before = estimator.tokens("m", PromptSize(0, 10_000)), estimator.upper_bound("m", PromptSize(0, 10_000))
    for text in (0, 10, 3000, 100_000):
        for tokens in (1, 1200, 50_000):
            estimator.observe("m", PromptSize(0, text, 1), tokens)
    assert (estimator.tokens("m", PromptSize(0, 10_000)), estimator.upper_bound("m", PromptSize(0, 10_000))) == before


def test_the_tokens_of_media_are_learnt_from_media() -> None:
    estimator = taught((8000, 4.0), times=20)
    assert estimator.tokens("m", PromptSize(0, 400, 2)) == 100 + 2 * 1024
    assert estimator.upper_bound("m", PromptSize(media=1), **TEMPLATED) >= 4096
    for number in range(600):
        estimator.observe("m", PromptSize(0, 400, 3), 100 + 3 * (2000 if number % 20 == 0 else 300))
        # Of mostly text: the error of the text's estimate may be larger than the image.
        estimator.observe("m", PromptSize(0, 40_000, 1), 15_000)
    assert 300 <= estimator.tokens("m", PromptSize(media=1)) < 600
    # The largest of the last twenty fades by a tenth.
    assert 1800 <= estimator.upper_bound("m", PromptSize(media=1)) < 2100 + 16
    assert estimator.upper_bound("m", PromptSize(media=4)) >= 4 * 1800


def test_names_made_up_by_clients_do_not_fill_memory() -> None:
    estimator = TokenEstimator()
    for i in range(1000):
        estimator.observe(f"m{i}", PromptSize(0, 100), 50)
    assert len(estimator._texts) == 256
