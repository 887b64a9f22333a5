"""What the supervisor decides. Everything that it sees and does goes through a :class:`World`, its clock too.

:data:`DECISIONS` is the whole of it for a part that runs or does not. An engine that the proxy wants restarted is ended
first and then treated as one that died. When a decode falls, the prefills that have sent KV to it are restarted with
it (disagg_machine.dependents). Waits double with every fall; a part that falls too often is given up.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Protocol

from disagg_machine.dependents import paired_prefills
from disagg_machine.layout import Layout, Place
from disagg_machine.messages import text
from disagg_machine.parts import Part
from disagg_machine.proxy_view import ProxyView


class Condition(Enum):
    """What the PID file of a part says."""

    STOPPED = auto()
    """There is none: it was stopped on purpose."""
    TERMINAL = auto()
    """It is the business of a terminal."""
    RUNS = auto()
    GONE = auto()


class Watch(Enum):
    """What the supervisor has decided about a part before."""

    QUIET = auto()
    WAITING = auto()
    """It will be started when its wait is over."""
    GIVEN_UP = auto()


class Action(Enum):
    """What is to be done about a part."""

    NOTHING = auto()
    CANCEL = auto()
    """No restart is due any more: another command has seen to it."""
    FORGIVE = auto()
    """It was brought back: forget its falls."""
    FALL = auto()
    """Count a fall; wait for a restart, or give up."""
    START = auto()
    """Start it once its wait is over, its ports are free, and no engine on its GPU still starts."""


DECISIONS: dict[tuple[Condition, Watch], Action] = {
    (Condition.STOPPED, Watch.QUIET): Action.NOTHING,
    (Condition.STOPPED, Watch.WAITING): Action.CANCEL,
    (Condition.STOPPED, Watch.GIVEN_UP): Action.NOTHING,
    (Condition.TERMINAL, Watch.QUIET): Action.NOTHING,
    (Condition.TERMINAL, Watch.WAITING): Action.CANCEL,
    (Condition.TERMINAL, Watch.GIVEN_UP): Action.FORGIVE,
    (Condition.RUNS, Watch.QUIET): Action.NOTHING,
    (Condition.RUNS, Watch.WAITING): Action.CANCEL,
    (Condition.RUNS, Watch.GIVEN_UP): Action.FORGIVE,
    (Condition.GONE, Watch.QUIET): Action.FALL,
    (Condition.GONE, Watch.WAITING): Action.START,
    (Condition.GONE, Watch.GIVEN_UP): Action.NOTHING,
}
"""What is done, by what is seen and what was decided before."""

LOOK, LOOK_AGAIN_AFTER_SILENCE = 2.0, 10.0
"""Seconds between two questions to the proxy. One that hangs is asked less often: waiting for it takes the time that a
part which died needs."""

PORT_WAIT = 5.0
"""Seconds until a taken port is looked at again."""

LONGEST_WAIT = 60.0
"""Seconds before a restart, at most."""

SETTLED = 60
"""Seconds after which a wish of the proxy is about this process for certain, not about the one before."""


def condition(part: Part | None) -> Condition:
    """What a PID file says."""
    if part is None:
        return Condition.STOPPED
    if part.foreground:
        return Condition.TERMINAL
    return Condition.RUNS if part.alive else Condition.GONE


def back_off(falls: int, first: float) -> float:
    """Seconds before the restart after so many falls: doubled each time."""
    return min(first * (1 << (min(falls, 7) - 1)), LONGEST_WAIT)


@dataclass
class Watched:
    """One part.

    Attributes:
        falls: when it died or froze, in monotonic seconds.
        restart_at: when it will be started; None while no restart is due.
        content_with: the PID with which the proxy was seen content.
        said: message keys to the PID about which they were said.
    """

    falls: list[float] = field(default_factory=list)
    restart_at: float | None = None
    given_up: bool = False
    content_with: int = 0
    said: dict[str, int] = field(default_factory=dict)

    @property
    def watch(self) -> Watch:
        """What was decided before."""
        if self.given_up:
            return Watch.GIVEN_UP
        return Watch.QUIET if self.restart_at is None else Watch.WAITING


@dataclass(frozen=True, slots=True)
class Rules:
    """RESTART_LIMIT, RESTART_WINDOW and RESTART_BACKOFF, and whether engines are vLLM's, which measure free memory."""

    limit: int
    window: float
    first_wait: float
    engines_share_memory: bool


class World(Protocol):
    """What the supervisor sees and does."""

    def clock(self) -> float:
        """Monotonic seconds."""

    def now(self) -> float:
        """Seconds since 1970, as in PID files."""

    def part(self, name: str) -> Part | None:
        """The PID file of a part."""

    def take_lock(self) -> bool:
        """False while another command changes what runs."""

    def release_lock(self) -> None:
        """Give it back."""

    def ask_proxy(self) -> ProxyView:
        """What the proxy says of the engines."""

    def listens(self, port: int) -> bool:
        """Whether a port is taken."""

    def holder(self, port: int) -> str:
        """By whom, in words."""

    def ready(self, place: Place) -> bool:
        """Whether an engine answers."""

    def end(self, parts: Sequence[tuple[Place, Part | None]]) -> None:
        """End what is left of these parts, all at once, and leave PID files that stand for "wanted, not running"."""

    def start(self, place: Place, view: ProxyView) -> int:
        """Start a part, and return its PID."""

    def say(self, line: str) -> None:
        """One line for the log."""

    def show_log(self, name: str) -> None:
        """The end of a part's log, for the log."""

    def note(self, name: str, state: str, reason: str = "") -> None:
        """What `status` shows: ``waiting``, ``running`` or ``given-up``. A start counts; the reason stays."""


class Supervisor:
    """Restarts the parts of one layout."""

    def __init__(self, layout: Layout, rules: Rules, world: World) -> None:
        self._layout = layout
        self._rules = rules
        self._world = world
        self._watched = {name: Watched() for name in layout.names}
        self._next_look = 0.0

    def step(self) -> None:
        """One look at everything. A quiet machine costs next to nothing: no lock, and the proxy every other second."""
        if self._something_to_do() and self._world.take_lock():
            try:
                self._act()
            finally:
                self._world.release_lock()
        if self._world.clock() >= self._next_look:
            self._look_for_frozen()

    def _say(self, key: str, *arguments: object) -> None:
        self._world.say(text(key, *arguments))

    def _say_once(self, key: str, name: str, pid: int, *more: object) -> None:
        """Not again about the same process."""
        said = self._watched[name].said
        if said.get(key) != pid:
            said[key] = pid
            self._say(key, name, pid, *more)

    def _decide(self, name: str) -> tuple[Action, Part | None]:
        part = self._world.part(name)
        return DECISIONS[condition(part), self._watched[name].watch], part

    def _something_to_do(self) -> bool:
        return any(self._decide(name)[0] is not Action.NOTHING for name in self._watched)

    # -- what died

    def _act(self) -> None:
        """Do what the table says. A death while another command has the lock is that command's doing."""
        for place in self._layout.parts:
            watched = self._watched[place.name]
            action, part = self._decide(place.name)
            if action is Action.CANCEL:
                watched.restart_at = None
            elif action is Action.FORGIVE:
                watched.given_up, watched.falls = False, []
            elif action is Action.FALL and part is not None:
                self._fall(place, part)
        view: ProxyView | None = None
        for place in self._layout.parts:
            restart_at = self._watched[place.name].restart_at
            if restart_at is not None and self._world.clock() >= restart_at and self._may_start(place):
                # For the PID files. Once is enough, should it not answer.
                view = self._world.ask_proxy() if view is None else view
                self._start(place, view)

    def _fall(self, place: Place, part: Part, frozen: str = "") -> None:
        """``part`` died, or is frozen for the reason given: it goes, with the prefills that depend on it."""
        name, watched, rules = place.name, self._watched[place.name], self._rules
        key, why = "sup_died", text("sup_why_died", part.pid)
        if frozen:
            key, why = "sup_ended", text("sup_why_froze", part.pid, frozen)
        now = self._world.clock()
        watched.falls = [*(fall for fall in watched.falls if now - fall < rules.window), now]
        falls = len(watched.falls)
        partners = self._partners(place, part) if place.role == "decode" else []
        self._world.end([(place, part), *partners])
        if falls > rules.limit:
            watched.given_up, watched.restart_at = True, None
            self._say("sup_given_up", name, falls, f"{rules.window:g}")
            self._world.show_log(name)
            self._world.note(name, "given-up", text("sup_why_loop", falls, why))
        else:
            wait = back_off(falls, rules.first_wait)
            watched.restart_at = self._world.clock() + wait
            self._say(key, name, part.pid, f"{int(wait * 10) / 10:.1f}", falls, rules.limit)
            self._world.note(name, "waiting", why)
        for prefill, its_part in partners:
            self._say("sup_partner", prefill.name, its_part.pid, name)
            self._watched[prefill.name].restart_at = self._world.clock()
            self._world.note(prefill.name, "waiting", text("sup_why_partner", name))

    def _partners(self, decode: Place, part: Part) -> list[tuple[Place, Part]]:
        """Prefills that must go with a decode. One in a terminal is only named."""
        known = {place.name: self._world.part(place.name) for place in self._layout.parts}
        known[decode.name] = part
        found: list[tuple[Place, Part]] = []
        for name in paired_prefills(self._layout, decode.name, known, self._world.ask_proxy):
            prefill = known[name]
            if prefill is None or self._watched[name].watch is not Watch.QUIET:
                continue
            if prefill.foreground:
                self._say_once("sup_partner_terminal", name, prefill.pid, decode.name)
            else:
                found.append((self._layout[name], prefill))
        return found

    def _may_start(self, place: Place) -> bool:
        """Whether its ports are free, and no other engine on its GPU still starts."""
        taken = next((port for port in place.ports if self._world.listens(port)), None)
        if taken is not None:
            self._say("sup_port", place.name, taken, self._world.holder(taken))
            self._watched[place.name].restart_at = self._world.clock() + PORT_WAIT
            return False
        return not (self._rules.engines_share_memory and self._starts_beside(place))

    def _starts_beside(self, place: Place) -> bool:
        for other in self._layout.engines:
            if other.name != place.name and place.shares_gpu_with(other):
                part = self._world.part(other.name)
                if part is not None and part.alive and not self._world.ready(other):
                    return True
        return False

    def _start(self, place: Place, view: ProxyView) -> None:
        self._watched[place.name].restart_at = None
        pid = self._world.start(place, view)
        self._say("sup_started", place.name, pid)
        self._world.note(place.name, "running")

    # -- what the proxy wants restarted

    def _look_for_frozen(self) -> None:
        """Asks without the lock, which is taken only when there is something to do."""
        world = self._world
        self._next_look = world.clock() + LOOK_AGAIN_AFTER_SILENCE
        engines = [*self._layout.decodes, *self._layout.prefills]
        alive = self._alive(engines)
        if not alive:
            return
        view = world.ask_proxy()
        if not view.answered:
            return
        self._next_look = world.clock() + LOOK
        for name, part in alive.items():
            if not view.wanted(self._layout[name].http):
                self._watched[name].content_with = part.pid
        wanted = [place for place in engines if place.name in alive and view.wanted(place.http)]
        if not wanted or not world.take_lock():
            return
        try:
            # A decode first: a prefill that goes with it is no case of its own.
            for place in wanted:
                still = self._alive([place]).get(place.name)
                if still is not None and still.pid == alive[place.name].pid:
                    self._end_frozen(place, still, view.wanted(place.http))
        finally:
            world.release_lock()

    def _alive(self, places: Iterable[Place]) -> dict[str, Part]:
        found = {place.name: self._world.part(place.name) for place in places}
        return {name: part for name, part in found.items() if part is not None and part.alive}

    def _end_frozen(self, place: Place, part: Part, reason: str) -> None:
        if not self._wish_is_for(place, part):
            return
        if part.foreground:
            self._say_once("sup_frozen_terminal", place.name, part.pid, reason)
        else:
            self._say("sup_frozen", place.name, part.pid, reason)
            self._fall(place, part, reason)

    def _wish_is_for(self, place: Place, part: Part) -> bool:
        """Whether the proxy means this process: it needs a moment to see that an engine was restarted.

        It must have been seen content with this one, or this one must be a minute old and listen.
        """
        if self._watched[place.name].content_with == part.pid:
            return True
        age = self._world.now() - part.number("since", int(self._world.now()))
        return age >= SETTLED and self._world.listens(place.http)
