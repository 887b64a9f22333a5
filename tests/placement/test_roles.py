"""The decision about roles, on figures and a clock of the test."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import pytest

from disagg_proxy.cluster.assignment import Assignment, Cause
from disagg_proxy.cluster.instance import Role
from disagg_proxy.placement.roles import InstanceFigures, RoleController, RoleLimits

BOTH = frozenset(Role)
LIMITS = RoleLimits()
P, D = Role.PREFILL, Role.DECODE


@dataclass
class Plant:
    """Engines of one group under a load that the test sets, in engines' worth of work of each role.

    Prompts wait once a prefill has more work than it can do; KV and gaps grow with the work of a decode.
    """

    prefill: float = 0.5
    decode: float = 0.5
    noise: float = 0.0
    limits: RoleLimits = LIMITS
    figures: dict[str, InstanceFigures] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.time = 1000.0
        self.controller = RoleController(self.limits)
        self.chance = random.Random(22)
        self.moves: list[tuple[float, str, Assignment]] = []

    def add(self, *keys: str, role: Role | None = None, **figures) -> None:
        """Engines of both roles, with this one assigned."""
        for key in keys:
            assignment = Assignment(role, Cause.FIRST, self.time) if role else None
            self.figures[key] = InstanceFigures(key, "m", BOTH, assignment, **figures)

    def of(self, role: Role) -> list[str]:
        return [key for key, one in self.figures.items() if one.usable and one.role is role]

    def _around(self, value: float) -> float:
        return max(0.0, value * (1 + self.chance.uniform(-self.noise, self.noise)))

    def _now(self, one: InstanceFigures) -> InstanceFigures:
        share = self.prefill / max(1, len(self.of(P))), self.decode / max(1, len(self.of(D)))
        prefills = one.role is P
        return replace(
            one,
            read_at=self.time,
            prefill_wait=self._around(max(0.0, share[0] - 1)) if prefills else 0.0,
            running=int(self.chance.random() < self._around(share[0])) if prefills else round(share[1] * 50),
            kv_usage=min(1.0, self._around(share[1])) if not prefills else 0.05,
        )

    def run(self, seconds: int) -> list[tuple[str, Assignment]]:
        """The assignments of that time, each of them followed at once."""
        made = []
        for _ in range(seconds):
            self.time += 1
            self.figures = {key: self._now(one) for key, one in self.figures.items()}
            for key, assignment in self.controller.decide(self.time, self.figures.values()):
                self.figures[key] = replace(self.figures[key], assignment=assignment)
                made.append((key, assignment))
                self.moves.append((self.time, key, assignment))
        return made

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.of(P)), len(self.of(D))


def plant(prefills: int, decodes: int, **load) -> Plant:
    made = Plant(**load)
    made.add(*(f"p{n}" for n in range(prefills)), role=P)
    made.add(*(f"d{n}" for n in range(decodes)), role=D)
    return made


# -- first assignments


@pytest.mark.parametrize(("engines", "shape"), [(1, (0, 0)), (2, (1, 1)), (3, (1, 2)), (4, (2, 2)), (5, (2, 3))])
def test_new_engines_are_divided(engines: int, shape: tuple[int, int]) -> None:
    here = Plant()
    here.add(*map(str, range(engines)))
    here.run(1)
    assert here.shape == shape
    assert all(one.assignment.cause is Cause.FIRST for one in here.figures.values() if one.assignment)


def test_engines_with_one_role_count_and_keep_it() -> None:
    here = Plant(prefill=3.0)
    here.figures = {key: InstanceFigures(key, "m", frozenset({role})) for key, role in (("a", P), ("b", D), ("c", D))}
    here.add("x")
    assert [(key, a.role) for key, a in here.run(1)] == [("x", P)]
    here.run(300)
    assert {key for _, key, _ in here.moves} == {"x"}


def test_groups_are_decided_apart() -> None:
    here = Plant()
    here.add("a", "b")
    here.figures["c"] = InstanceFigures("c", "other", BOTH)
    assert {key for key, _ in here.run(5)} == {"a", "b"}


# -- moves by load


def test_the_boundary_follows_a_load_that_shifts_one_move_at_a_time() -> None:
    here = plant(1, 3, prefill=2.6, decode=0.6)
    here.run(200)
    assert here.shape == (3, 1)
    times = [time for time, _, _ in here.moves]
    assert len(times) == 2 and times[1] - times[0] >= LIMITS.settle
    assert all(a.role is P and a.cause is Cause.PREFILL_WAITS for _, _, a in here.moves)
    assert here.moves[0][2].reason == "prompts wait 1600 ms for prefill, and decode has capacity (20 % full)"
    here.moves.clear()
    here.prefill, here.decode = 0.4, 1.9
    here.run(300)
    assert here.shape == (1, 3)
    assert all(a.role is D and a.cause is Cause.DECODE_FULL for _, _, a in here.moves) and len(here.moves) == 2
    assert "decode is 100 % full" in here.moves[0][2].reason


def test_a_settled_load_moves_nothing_more() -> None:
    here = plant(1, 3, prefill=1.7, decode=0.8)
    here.run(100)
    assert here.shape == (2, 2)
    here.moves.clear()
    here.run(2000)
    assert not here.moves


@pytest.mark.parametrize("load", [(0.9, 0.8), (1.1, 1.2), (1.7, 0.8), (1.9, 1.7), (0.5, 2.6), (3.5, 3.5)])
def test_noise_causes_no_oscillation(load: tuple[float, float]) -> None:
    here = plant(2, 2, prefill=load[0], decode=load[1], noise=0.3)
    here.run(3000)
    by_engine = [key for _, key, _ in here.moves]
    assert len(by_engine) == len(set(by_engine)) <= 1, here.moves


def test_a_short_burst_moves_nothing() -> None:
    here = plant(1, 3, prefill=0.5)
    here.run(20)
    here.prefill = 3.0
    here.run(4)
    here.prefill = 0.5
    here.run(20)
    assert not here.moves


def test_the_decode_with_the_least_work_is_moved() -> None:
    here = plant(1, 3, prefill=2.0)
    here.run(5)
    running = {"d0": 9, "d1": 2, "d2": 5}
    controller, moved = RoleController(LIMITS), []
    for second in range(30):
        now = here.time + second
        figures = [
            replace(one, read_at=now, running=running.get(key, 1), kv_usage=0.1) for key, one in here.figures.items()
        ]
        moved += controller.decide(now, figures)
        if moved:
            break
    assert [key for key, _ in moved] == ["d1"]


@pytest.mark.parametrize(("prefill", "decode"), [(9.0, 0.1), (0.1, 9.0), (9.0, 9.0)])
def test_one_of_each_role_always_stays(prefill: float, decode: float) -> None:
    here = plant(2, 2, prefill=prefill, decode=decode)
    for _ in range(600):
        here.run(1)
        assert min(here.shape) >= 1


def test_a_role_that_could_not_carry_its_load_gives_nothing_away() -> None:
    """Each prefill computes 90 % of the time; its prompts do not wait yet, but would."""
    here = plant(2, 2, prefill=1.8, decode=2.0)
    assert not here.run(300)


def test_streams_that_are_too_slow_count_where_there_is_a_limit() -> None:
    limited = RoleLimits(token_gap=0.01)
    for limits, expected in ((limited, [("p0", D)]), (LIMITS, [])):
        here = plant(2, 1, prefill=0.2, decode=0.4, limits=limits)
        here.figures = {key: replace(one, token_gap=0.02) for key, one in here.figures.items()}
        made = here.run(20)
        assert [(key, a.role) for key, a in made] == expected
        assert all(a.cause is Cause.DECODE_SLOW for _, a in made)


@pytest.mark.parametrize("figures", [{"kv_promised": 0.95}, {"in_flight": 250}], ids=["KV promised", "requests"])
def test_decode_is_full_also_while_requests_wait_in_the_proxy(figures: dict[str, float]) -> None:
    here = plant(2, 1, prefill=0.2, decode=0.4, limits=RoleLimits(in_flight=256))
    here.figures = {key: replace(one, **figures) for key, one in here.figures.items()}
    assert [(key, a.role, a.cause) for key, a in here.run(20)] == [("p0", D, Cause.DECODE_FULL)]


def test_slow_streams_keep_their_decode() -> None:
    here = plant(1, 2, prefill=2.0, decode=0.2, limits=RoleLimits(token_gap=0.01))
    here.figures = {key: replace(one, token_gap=0.006) for key, one in here.figures.items()}
    assert not here.run(60), "12 ms with one decode less"


# -- what prevents a move


@pytest.mark.parametrize("figure", ["read_at", "prefill_wait", "running", "kv_usage"])
def test_nothing_moves_while_a_figure_is_missing(figure: str) -> None:
    here = plant(1, 3, prefill=3.0)
    here.run(5)
    for second in range(120):
        now = here.time + second
        figures = [replace(one, read_at=now) for one in here.figures.values()]
        assert not here.controller.decide(now, [replace(one, **{figure: None}) for one in figures])


def test_nothing_moves_on_stale_figures_and_the_window_begins_again() -> None:
    here = plant(1, 3, prefill=3.0)
    here.run(9)
    for _ in range(120):
        here.time += 1
        assert not here.controller.decide(
            here.time, [replace(one, read_at=here.time - 6) for one in here.figures.values()]
        )
    assert not here.run(10) and here.run(2)


def test_by_hand_is_by_hand() -> None:
    here = plant(1, 3, prefill=3.0)
    for key in ("d0", "d1", "d2"):
        here.figures[key] = replace(here.figures[key], assignment=Assignment(D, Cause.BY_HAND, 1.0))
    assert not here.run(200)
    here.figures["d1"] = replace(here.figures["d1"], assignment=Assignment(D, Cause.AUTO, 2.0))
    assert [key for key, _ in here.run(40)] == ["d1"]


# -- a role without an instance


def test_a_role_that_is_lost_gets_another_instance_in_a_while() -> None:
    here = plant(1, 3)
    here.run(5)
    here.figures["p0"] = replace(here.figures["p0"], usable=False)
    made = here.run(10)
    assert [(a.role, a.cause) for _, a in made] == [(P, Cause.MISSING)] and here.shape == (1, 2)
    here.figures["p0"] = replace(here.figures["p0"], usable=True)
    here.run(200)
    assert here.shape == (2, 2), "there is no hurry to give it back"


def test_a_role_that_is_away_for_a_moment_gets_none() -> None:
    here = plant(1, 3)
    for _ in range(20):
        here.figures["p0"] = replace(here.figures["p0"], usable=False)
        assert not here.run(2)
        here.figures["p0"] = replace(here.figures["p0"], usable=True)
        assert not here.run(1)


def test_without_figures_a_lost_role_is_replaced_all_the_same() -> None:
    controller = RoleController(LIMITS)
    left = [InstanceFigures(key, "m", BOTH, Assignment(D, Cause.FIRST, 0.0)) for key in "ab"]
    assert [controller.decide(t, left) for t in (10.0, 12.0)] == [[], []]
    assert [(key, a.role) for key, a in controller.decide(13.0, left)] == [("a", P)]


def test_all_by_hand_stay_although_a_role_is_missing() -> None:
    controller = RoleController(LIMITS)
    left = [InstanceFigures(key, "m", BOTH, Assignment(D, Cause.BY_HAND, 0.0)) for key in "ab"]
    assert not any(controller.decide(float(t), left) for t in range(10, 60))
