"""The router of a registry, always fresh and never in the way: it follows the registry's events and hands out snapshots.

A newcomer is routed by its prototypes from the next snapshot on; the head that knows it is solved in the background and swapped in.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from numpy.linalg import LinAlgError

from adapter_hub.errors import CorruptVersion, HubError, InvalidInput, NotRoutable, ReadOnlyRegistry
from adapter_hub.refs import AdapterRef
from adapter_hub.registry.registry import Registry, Standing
from adapter_hub.routing.calibration import Calibration, fit, solved_centres
from adapter_hub.routing.effect import moves
from adapter_hub.routing.head import Head, Solver, can_solve, digest_of
from adapter_hub.routing.router import Router
from adapter_hub.routing.statistics import Exemplars, RoutingState

log = logging.getLogger("adapter_hub")

ROUTING_FILE = "routing.safetensors"
TWINS_MAX = 1000    # versions in production whose exemplars are compared with a newcomer's; with more, `effect` and `calibrate` tell
YOUNG = 0.5         # share of the versions in production that a calibration should know


class LiveRouter:
    """Safe to share between threads. `check` raises for a state that cannot meet the registry's encoder."""

    def __init__(self, registry: Registry, check: Callable[[RoutingState], None]) -> None:
        self._registry = registry
        self._check = check
        self._saved: Path = registry.layout.index / "router"
        self._lock = threading.RLock()
        self._saving = threading.Lock()    # taken before `_lock` where both are
        self._calibrating = threading.Lock()    # taken before both
        self._heads = threading.Lock()          # likewise: snapshots have one head solved at a time, for it takes gigabytes
        self._forgets = 0                       # how often what was derived was dropped
        self._rehearsing = 0                    # how many are within `rehearsing`
        self._router: Router | None = None
        self._event = -1
        self._left_out: set[AdapterRef] = set()     # damaged or without a routing file; listed by `verify`
        self._said: set[AdapterRef] = set()         # those of them that the log has
        self._solving: threading.Thread | None = None
        self._solved: str | None = None             # digest of what a head was last solved for, whether one came out or not
        self._failed: set[tuple[str, str]] = set()  # (task, head digest) that failed in the background: not tried again for each input
        self._keys: Mapping[AdapterRef, frozenset[int]] = {}    # hashes of exemplars
        self._warned: int | None = -1
        self._looked = -1                       # the event as of which it was last seen whether there is something to warn of
        self._begun: int | None = -1                # number of the newest calibration when the router began

    # ---- hand out ---------------------------------------------------------------------------------------------------

    def snapshot(self, *, settled: bool = False, thresholds: bool = True) -> Router:
        """The router over the versions in production now. `settled` waits for the head that knows all of them.

        Where no threshold of it is to be used (`thresholds=False`) it is not warned that they are off: the first that is used will bring that.

        The first snapshot is settled in any case: a process that ends soon would never see what it left to the background.
        """
        while True:
            with self._lock:
                self._follow()
                if thresholds:
                    self._warn_if_young()
                router, event = self._router, self._event
                assert router is not None
                known = self._solved == router.head_digest
                self._begin_in_background(router)
                if known or (self._solved is not None and not settled):
                    return router
            try:
                return self._solve(router)
            except NotRoutable:    # a version was purged meanwhile
                if self._registry.last_event() == event:
                    raise

    def of(self, versions: Iterable[AdapterRef], calibration: int | None) -> Router:
        """The settled router over these versions under a stored calibration: what a snapshot was when they were in production."""
        states = {ref: self.state(ref) for ref in versions}
        router = Router.build(states, self._record(calibration))
        now = self._router
        if now and now.head and now.head.digest == router.head_digest and now.calibration and now.calibration.id == calibration:
            return router.with_head(now.head, now.centres)
        with self._heads:
            return router.with_head(*_solved(states, router))

    def calibrated(self, versions: Iterable[AdapterRef]) -> Router:
        """The router that there would be over these versions, calibrated on them. Nothing is stored."""
        return _fitted(self._states(versions))

    def state(self, ref: AdapterRef) -> RoutingState:
        """What a version brings. Raises CorruptVersion, ModelChanged, InvalidInput where it has no routing file."""
        data = self._registry.read(ref, ROUTING_FILE)
        state = RoutingState.from_bytes(data, source=f"{ref}/{ROUTING_FILE}")
        self._check(state)
        return state

    def twins(self, name: str, state: RoutingState) -> dict[AdapterRef, int]:
        """Who in production has how many of these exemplars too; empty where there are more than TWINS_MAX to look at."""
        others = [ref for ref in self._registry.production() if ref.name != name]
        if len(others) > TWINS_MAX or not state.count or state.from_description:
            return {}
        known = self._keys
        found: dict[AdapterRef, frozenset[int]] = {}
        for ref in others:
            with suppress(HubError):    # whoever routes will say so
                found[ref] = known[ref] if ref in known else self._keys_of(ref)
        self._keys = found
        own = set(map(hash, state.exemplars.keys))
        return {ref: count for ref, keys in found.items() if (count := len(own & keys))}

    def _keys_of(self, ref: AdapterRef) -> frozenset[int]:
        state = self.state(ref)
        return frozenset(map(hash, () if state.from_description else state.exemplars.keys))

    @contextmanager
    def rehearsing(self) -> Iterator[None]:
        """Within it no router is saved, by no thread of this process, and a first calibration is made for the moment alone."""
        with self._lock:
            self._rehearsing += 1
        try:
            yield
        finally:
            if (solving := self._solving) is not None and solving.is_alive():
                solving.join()    # it would save what was begun here
            with self._lock:
                self._rehearsing -= 1
                router = self._router
                if router is not None and router.calibration is not None and router.calibration.id is None:
                    self.forget()

    # ---- follow -----------------------------------------------------------------------------------------------------

    def _follow(self) -> None:
        while self._router is None or self._registry.last_event() != self._event:
            standing = self._registry.snapshot()
            try:
                return self._reach(standing)
            except NotRoutable:    # a version was purged meanwhile: the next standing says so
                if self._registry.last_event() == standing.event:
                    raise

    def _reach(self, standing: Standing) -> None:
        if self._is_over(standing.calibration):
            self._begin(standing)
            self._begun = standing.calibration
        assert self._router is not None
        self._take_back(standing.production)
        wanted = set(standing.production) - self._left_out
        missing, surplus = wanted - set(self._router.versions), set(self._router.versions) - wanted
        if self._router.calibration is None and missing:
            self._router = self._built(standing.production, None)
        else:    # one assignment: a thread that solves must not see half of it
            self._router = self._router.without(*surplus).with_added(self._states(sorted(missing)))
        if self._event < 0 and self._solved != self._router.head_digest:    # the saved router was behind
            self._solved = None
        self._event = standing.event

    def _is_over(self, newest: int | None) -> bool:
        """Whether the router must begin again: under another calibration than its own, or than the one that its own stands in for."""
        if self._router is None:
            return True
        own = self._router.calibration
        if own is not None and own.id is None and self._registry.writable:    # a purge was in the way of storing it
            return True
        return newest not in (own and own.id, self._begun)

    def _begin(self, standing: Standing) -> None:
        """The saved router where it fits, else a new one; with the first calibration where there is none.

        A damaged one is fitted again on those of its versions that are left: to the same numbers, whoever does it. It gets the next
        number; who may only read keeps it to himself, until another is stored.
        """
        try:
            calibration = self._own(self._record(standing.calibration))
        except CorruptVersion as error:
            log.error("%s Fitted again on the versions it knew.", error)
            states = self._states(self._registry.calibrated_on(standing.calibration or 0))
            known = any(state.count for state in states.values())
            calibration = self._made(fit(states).calibration, f"calibration {standing.calibration} is damaged") if known else None
        if calibration is not None and self._router is None and self._saved.exists():
            try:
                self._router = Router.open(self._saved, calibration)
                self._solved = self._router.head_digest    # what is saved is settled, also where there is no head to solve
                return
            except HubError as error:
                log.info("%s Made anew.", error)
        self._router = self._built(standing.production, calibration)

    def _built(self, refs: Iterable[AdapterRef], calibration: Calibration | None) -> Router:
        states = self._states(refs)
        if calibration is None and any(state.count for state in states.values()):
            return self._calibrated(states, "the first inputs are about to be routed")
        router, before = Router.build(states, calibration), self._router
        if before is None or before.calibration is None or calibration is None or before.calibration.id != calibration.id:
            return router.with_head(before.head if before else None)
        return router.with_head(before.head, before.centres)

    def _states(self, refs: Iterable[AdapterRef]) -> dict[AdapterRef, RoutingState]:
        """Without those that are damaged, or were stored without a routing file: one must not stop the others."""
        states = {}
        for ref in refs:
            if ref in self._left_out:
                continue
            try:
                states[ref] = self.state(ref)
            except CorruptVersion as error:
                self._leave_out(ref, logging.ERROR, f"{ref} is left out of routing: {error}")
            except InvalidInput:
                self._leave_out(ref, logging.WARNING, f"{ref} has no {ROUTING_FILE}: only its name reaches it.")
        return states

    def _leave_out(self, ref: AdapterRef, level: int, why: str) -> None:
        self._left_out.add(ref)
        if ref not in self._said:
            self._said.add(ref)
            log.log(level, "%s", why)

    def _take_back(self, refs: Iterable[AdapterRef]) -> None:
        """What was damaged and is whole again, restored from a copy."""
        for ref in sorted(self._left_out.intersection(refs)):
            try:
                self.state(ref)
            except (CorruptVersion, InvalidInput):
                continue
            self._left_out.discard(ref)
            if self._router is not None and ref in self._router.versions:    # found damaged when the head was solved, which lacks it
                self._solved = None

    def _record(self, number: int | None) -> Calibration | None:
        """Raises CorruptVersion."""
        return None if number is None else Calibration.from_bytes(self._registry.calibration(number), id=number)

    def _own(self, calibration: Calibration | None) -> Calibration | None:
        """None for a record of another encoder than the registry's: nothing can be measured by it."""
        known = self._registry.config.encoder_fingerprint    # empty until it is known
        return calibration if calibration is not None and known in ("", calibration.encoder_fingerprint) else None

    def latest(self) -> Calibration | None:
        """The newest record, where it is whole and of the registry's encoder."""
        try:
            return self._own(self._record(self._registry.latest_calibration()))
        except CorruptVersion:
            return None

    def _warn_if_young(self) -> None:
        assert self._router is not None
        calibration, refs = self._router.calibration, self._router.refs
        if calibration is None or not refs or self._warned == calibration.id or self._looked == self._event:
            return
        self._looked = self._event
        if calibration.of_earlier_head:
            self._warned = calibration.id
            log.warning("calibration %s was measured under an earlier head, and thresholds are off: see `adapter-hub calibrate`.", calibration.id)
            return
        known = sum(ref in calibration.centres for ref in refs)
        if known < YOUNG * len(refs):
            self._warned = calibration.id
            whom = f"{known} of the {len(refs)} adapters in production, thresholds of the others" if known else "no version in production, thresholds"
            log.warning("calibration %s knows %s are estimates: see `adapter-hub calibrate`.", calibration.id, whom)

    # ---- calibrate --------------------------------------------------------------------------------------------------

    def calibrate(self, reason: str) -> Calibration:
        """Fit scores and thresholds anew on the versions in production; the record gets the next number. Raises InvalidInput.

        Inputs are routed meanwhile, under the calibration before.
        """
        with self._calibrating:
            with self._lock:
                if (latest := self.latest()) is not None:
                    self._warned = latest.id    # what it would be warned of is being done
                    self._follow()    # so that what the new record moves can be said
                before, forgets = self._router, self._forgets
            standing = self._registry.snapshot()
            states = self._states(standing.production)
            if not any(state.count for state in states.values()):
                raise InvalidInput("no version in production has examples to calibrate on.", hint="Register one with examples.")
            router = _fitted(states, before)
            assert router.calibration is not None
            with self._saving:
                with self._lock:    # also while it is stored: who meets the record here, meets its router
                    calibration = self._stored(router.calibration, reason)
                    if self._forgets != forgets:    # what was purged may be in the router: the next snapshot begins with the record
                        return calibration
                    self._router = router = router.numbered(calibration)
                    self._solved = router.head_digest
                    self._event = standing.event    # later ones may have been followed by the router that this one replaces
                    self._begun = standing.calibration if calibration.id is None else calibration.id
                self._save(router)
            return calibration

    def _calibrated(self, states: Mapping[AdapterRef, RoutingState], reason: str) -> Router:
        """The first router: nobody has one meanwhile."""
        router = _fitted(states)
        assert router.calibration is not None
        router = router.numbered(self._made(router.calibration, reason))
        self._router, self._solved = router, router.head_digest
        self._save(router)
        return router

    def _made(self, calibration: Calibration, reason: str) -> Calibration:
        """Without being asked for: stored, but for a rehearsal."""
        return calibration if self._rehearsing else self._stored(calibration, reason)

    def _stored(self, calibration: Calibration, reason: str) -> Calibration:
        """With its number; with None where it is this process's alone."""
        data, number = calibration.to_bytes(), None
        try:
            number = self._registry.add_calibration(data, calibration.members, reason)
        except NotRoutable as error:    # a version was purged meanwhile; the next event says so
            log.warning("calibrated for this process alone: %s", error)
        except ReadOnlyRegistry:
            log.warning("the registry is read-only: calibrated for this process alone")
        return Calibration.from_bytes(data, id=number)

    # ---- solve ------------------------------------------------------------------------------------------------------

    def _begin_in_background(self, router: Router) -> None:
        idle = self._solving is None or not self._solving.is_alive()
        if idle and self._solved is not None and self._left_to_do(router):
            self._solving = threading.Thread(target=self._work_in_background, name="adapter_hub head", daemon=True)
            self._solving.start()

    def _left_to_do(self, router: Router) -> str | None:
        """For the background: "head" or "index"; None: nothing, or nothing that has not failed."""
        due = {"head": router.head_digest != self._solved, "index": router.scattered}
        return next((task for task, is_due in due.items() if is_due and (task, router.head_digest) not in self._failed), None)

    def _work_in_background(self) -> None:
        while (router := self._router) is not None and (task := self._left_to_do(router)):
            try:
                if task == "head":
                    self._solve(router)
                else:
                    self._compact(router)
            except (HubError, OSError, MemoryError, LinAlgError) as error:
                log.error("the %s could not be made; the router goes on without: %s", task, str(error) or repr(error))
                self._failed.add((task, router.head_digest))

    def _compact(self, router: Router) -> None:
        """Index what lies in many small segments, while the router of that moment goes on with these."""
        merged = router.compaction()
        with self._saving:
            with self._lock:
                now = self._router
                if merged is None or now is None or now.calibration is not router.calibration:
                    return
                self._router = compacted = now.compacted(merged)
                settled = self._solved == compacted.head_digest
            if settled:
                self._save(compacted)

    def _solve(self, router: Router) -> Router:
        """`router` under its own head, which goes to the router of that moment too, if that has moved on meanwhile."""
        states = self._states(router.versions) if router.has_head else {}
        whole = not router.has_head or len(states) == len(router.versions)    # else a file is damaged: nothing to keep for later
        digest = router.head_digest
        with self._heads:
            with self._lock:
                now = self._router
                if now is not None and now.calibration is router.calibration and digest == now.head_digest == self._solved:
                    return now    # settled by another thread, for which this one waited
            head, centres = _solved(states, router)
            with self._saving:
                with self._lock:
                    now = self._router
                    if now is None or self._solved == now.head_digest != digest:    # forgotten, or settled by another thread
                        return router.with_head(head, centres)
                    self._router = settled = now.with_head(head, centres if now.calibration is router.calibration else {})
                    self._solved = digest
                if settled.head_digest == digest and whole:
                    self._save(settled)
        return router.with_head(head, centres)

    def _save(self, router: Router) -> None:
        """Without a trace of what was purged. Where a purge is yet to be followed, what it leaves will be saved instead."""
        if self._rehearsing or not self._registry.writable or router.calibration is None or router.calibration.id is None:
            return
        try:
            with self._registry.deriving() as purged:
                kept = router.erased(purged)
                if purged.isdisjoint(kept.refs):
                    kept.save(self._saved)
        except (HubError, OSError) as error:
            log.info("the router is not saved, and will be made anew next time: %s", error)
            return
        with self._lock:
            if self._router is router:
                self._router = kept

    def forget(self) -> None:
        """Drop what was derived; the next snapshot is made from the versions that are left."""
        with self._lock:
            self._router, self._event, self._solved = None, -1, None
            self._failed.clear()
            self._left_out.clear()
            self._keys = {}
            self._forgets += 1


def _fitted(states: Mapping[AdapterRef, RoutingState], before: Router | None = None) -> Router:
    """The router of a new calibration, which has no number yet and says what it moves."""
    fitted = fit(states)
    router = Router.build(states, fitted.calibration, fitted.head)
    if before is None or not before.refs or before.calibration is None:
        return router
    if before.calibration.encoder_fingerprint != fitted.calibration.encoder_fingerprint:
        return router
    found = moves(fitted.bench, before.calibration, fitted.calibration)
    return router.numbered(replace(fitted.calibration, facts={**fitted.calibration.facts, **found}))


def _solved(states: Mapping[AdapterRef, RoutingState], router: Router) -> tuple[Head | None, Mapping[AdapterRef, float]]:
    """The head over the versions of this router, and the centres on its scale of those that the calibration does not know."""
    states = {ref: state for ref, state in states.items() if state.count}
    exemplars = {ref: Exemplars.of(state) for ref, state in states.items()}
    if router.calibration is None or not can_solve(exemplars):
        return None, {}
    solver = Solver(exemplars, next(iter(states.values())).dim)
    head = solver.head(digest_of({ref: state.digest for ref, state in states.items()}))
    return head, solved_centres(router.calibration, states, exemplars, solver, head)
