"""The faults of pairs once more with PLACEMENT=elastic, which splits requests while it has learnt nothing.

Not here is what ends differently: where every decode fails, a prefill serves alone (test_elastic.py).
"""

from tests.e2e.conftest import two
from tests.e2e.test_together import (
    pair,
    test_a_frozen_prefill_releases_decode_and_decode_is_not_blamed,
    test_a_prefill_that_fails_costs_the_client_nothing,
    test_a_prefill_that_is_dead_before,
    test_a_prefill_that_is_killed_after,
    test_a_prefill_that_is_killed_during,
)
from tests.e2e.test_together_decode import (
    test_a_client_that_leaves,
    test_a_refusal_of_decode_is_the_clients,
    test_another_decode_with_a_new_transfer,
    test_decode_broken_in_mid_stream_is_a_cut,
    test_no_try_for_a_client_that_has_left,
)
from tests.faults.test_elastic import machine

__all__ = [
    "machine",
    "pair",
    "test_a_client_that_leaves",
    "test_a_frozen_prefill_releases_decode_and_decode_is_not_blamed",
    "test_a_prefill_that_fails_costs_the_client_nothing",
    "test_a_prefill_that_is_dead_before",
    "test_a_prefill_that_is_killed_after",
    "test_a_prefill_that_is_killed_during",
    "test_a_refusal_of_decode_is_the_clients",
    "test_another_decode_with_a_new_transfer",
    "test_decode_broken_in_mid_stream_is_a_cut",
    "test_no_try_for_a_client_that_has_left",
    "two",
]
