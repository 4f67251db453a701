"""A process that runs the controllers of a policy: sample, law, parameter.

A controller of a parameter writes a map's elements, which lead to the rules for the new value
(`itmlang/nft/variants.py`); what flows have left until a threshold is moved with them, in the
same transaction. Elements end by themselves after some seconds: a controller that is gone
leaves the file's value behind. A controller of a link writes the rate of its qdisc, which
the runtime sets right where the controller ends.

Every decision is a line of JSON in the policy's log, of bounded size.
"""

import json
import logging
import logging.handlers
import math
import selectors
import signal
import socket
import sys
import time
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from typing import Any, Final

from itmlang.control import Controller
from itmlang.diagnostics import CompileError
from itmlang.nft.model import FlowSet, duration
from itmlang.nft.variants import chain_of
from runtime import decisions, laws, links, nft
from runtime.decisions import log_file
from runtime.errors import MachineError
from runtime.handlers import HandlerError, HungError, load
from runtime.jobs import ControlJob
from runtime.laws import Decision, Settings
from runtime.measures import Machine, Meter
from runtime.migrate import Contents, Move
from runtime.nft import NftRefusalError
from runtime.server import watching
from runtime.store import directory, unchanged
from runtime.units import replay
from runtime.worker import TICK, die_with_parent, hear, say

_ALIVE: Final = 5.0  # seconds for which what was written holds, beyond three periods
_RENEWED: Final = 1.0  # seconds between two renewals at least
_MOST_MOVED: Final = 4096  # flows that follow a moved threshold; of more, only new ones do
_LOOKS: Final = 8  # of the alarm, four a second, that a user's function may take
_PATIENCE: Final = 10.0  # seconds between two lines of the same trouble


def work(job: ControlJob, link: socket.socket) -> None:
    """Run the controllers until the parent says "stop" or is gone."""
    die_with_parent()
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.dont_write_bytecode = True
    try:
        functions = load([target for target, _ in job.calls], job.unit.beside, "the situation")
        loops = [
            Loop(one, job, functions[one.law].function if ":" in one.law else None)
            for one in job.controllers
        ]
    except HandlerError as error:
        say(link, {"error": str(error), "target": error.target})
        return
    except (OSError, ValueError) as error:
        say(link, {"error": f"the controller cannot start: {error}"})
        return
    _Process(job, loops, link).run()


class _Process:
    def __init__(self, job: ControlJob, loops: list["Loop"], link: socket.socket) -> None:
        self._loops, self._link = loops, link
        self._stopping = self._going = False
        self._turns = self._calling = self._seen = self._late = 0
        self._log = logging.getLogger(f"itm.control.{job.policy}")
        self._log.propagate = False
        self._log.setLevel(logging.INFO)
        path = log_file(directory(), job.policy)
        self._log.handlers = [
            logging.handlers.RotatingFileHandler(
                path, maxBytes=decisions.LARGEST, backupCount=1, delay=True
            )
        ]
        self._told: dict[str, float] = {}
        signal.signal(signal.SIGTERM, self._stop)

    def _stop(self, *_: object) -> None:
        self._stopping = True

    def run(self) -> None:
        with watching(self._look), selectors.DefaultSelector() as selector:
            selector.register(self._link, selectors.EVENT_READ, self._listen)
            for loop in self._loops:
                prober = loop.meter.prober
                if prober is not None:
                    selector.register(
                        prober, selectors.EVENT_READ, lambda p=prober: p.read(time.monotonic())
                    )
            say(self._link, {"ready": True})
            due = 0.0
            while not self._stopping:
                now = time.monotonic()
                if now >= due:
                    say(self._link, {"counts": {}})
                    due = now + TICK
                turns = [self._turn(loop) for loop in self._loops] if self._going else []
                wait = min([due, *turns]) - time.monotonic()
                for key, _ in selector.select(max(0.0, wait)):
                    key.data()
        for loop in self._loops:
            with suppress(MachineError, NftRefusalError, OSError):
                loop.go_back()

    def _look(self) -> None:
        """Called by the alarm: break off a law of the user's that does not come back."""
        if self._calling and self._calling == self._seen:
            self._late += 1
            if self._late > _LOOKS:
                raise HungError
            say(self._link, {"alive": True})
        else:
            self._seen, self._late = self._calling, 0

    def _turn(self, loop: "Loop") -> float:
        """Let a controller do what is due; when it is again."""
        now = time.monotonic()
        again = loop.meter.tick(now)
        if now < loop.due:
            return min(again, loop.due)
        self._turns += 1
        self._calling = self._turns
        try:
            line = loop.turn(now)
        except HungError:
            line = {"written": loop.controller.written, "blocked": "its function takes too long"}
            loop.put_off(now)
        except (MachineError, NftRefusalError, OSError) as error:
            told = error.message if isinstance(error, MachineError) else str(error)
            line = {"written": loop.controller.written, "blocked": told}
            self._trouble(told, now)
        finally:
            self._calling = 0
        if line is not None:
            self._log.info("%s", json.dumps({"time": round(time.time(), 3), **line}))
        return min(again, loop.due)

    def _trouble(self, told: str, now: float) -> None:
        if now - self._told.get(told, -_PATIENCE) >= _PATIENCE:
            self._told = {text: at for text, at in self._told.items() if now - at < _PATIENCE}
            self._told[told] = now
            say(self._link, {"log": told})

    def _listen(self) -> None:
        message = hear(self._link)
        if message is None or message.get("command") == "stop":
            self._stopping = True
        elif message.get("command") == "go":
            self._going = True
            for loop in self._loops:
                loop.put_off(time.monotonic())
        elif message.get("command") == "reload":
            say(self._link, {"restarting": True})
            self._stopping = True


class Loop:
    """One controller: its law's state, its meter, and what it has written."""

    def __init__(self, controller: Controller, job: ControlJob, function: Any) -> None:
        self.controller, self._job = controller, job
        gains = dict(controller.gains)
        cooldown = gains.pop("cooldown", 0.0)
        self._settings = Settings(
            law="call" if function is not None else controller.law,
            setpoint=controller.target, low=controller.low, high=controller.high,
            base=controller.base, period=controller.period / 1000, gains=gains, cooldown=cooldown,
            integer=controller.whole and not controller.link, function=function,
            measure=controller.measure.text, unit=controller.measure.unit, show=self._show,
        )  # fmt: skip
        self._state = laws.begin(self._settings)
        link = job.links.get(controller.link) if controller.link else None
        self.meter = Meter(
            controller.measure,
            Machine(job.table, job.policy, job.links),
            controller.period / 1000,
            link,
        )
        self.due = time.monotonic() + controller.period / 1000
        self._place = controller.step(controller.base) if controller.values else 0
        self._begun = controller.dry  # was the file's value put in force?
        self._moved = False  # is another value than the file's in force?
        self._renewed = 0.0
        self._sets: dict[int, tuple[FlowSet, ...]] = {}

    def _show(self, value: float) -> str:
        if self.controller.link:
            return f"{value * 8 / 1e6:.3g} mbit"
        return f"{value:.6g}"

    def put_off(self, now: float) -> None:
        """The next turn comes a period from now."""
        self.due = now + self._settings.period

    def turn(self, now: float) -> dict[str, object] | None:
        """Sample, decide, write; the line for the log. Raises `MachineError`, `NftRefusalError`."""
        late = now - self.due
        self.due += self._settings.period * (1 + max(0, math.floor(late / self._settings.period)))
        try:
            sample = self.meter.sample(now)
        except MachineError:
            sample = laws.Sample(None)
        refused = "" if self._begun else self._write(self.controller.base)
        if refused:
            return self._line(sample, Decision(None, "", refused), now)
        self._begun = True
        state, decision = laws.step(self._settings, self._state, sample, now)
        if decision.value is not None and not self.controller.dry:
            refused = self._write(decision.value)
            if refused:  # as if it had not been decided
                return self._line(sample, replace(decision, value=None, blocked=refused), now)
        elif self._moved and now - self._renewed >= _RENEWED and not self.controller.link:
            self._renew(now)
        self._state = state
        return self._line(sample, decision, now)

    def _line(self, sample: laws.Sample, decision: Decision, now: float) -> dict[str, object]:
        def short(value: float | None) -> float | None:
            return None if value is None else float(f"{value:.6g}")

        return {
            "written": self.controller.written, "value": short(self._state.written),
            "wanted": short(decision.value), "measure": self.controller.measure.text,
            "sample": short(sample.value), "unit": self.controller.measure.unit,
            "target": short(self.controller.target), "load": short(sample.load),
            "reason": decision.reason, "blocked": decision.blocked, "dry": self.controller.dry,
        }  # fmt: skip

    # Writing.

    def _write(self, value: float) -> str:
        """Put a value in force; why it cannot be now, "" if it can."""
        with unchanged() as free:
            if not free:
                return "a change of policies is under way"
            if self.controller.link:
                link = self._job.links[self.controller.link]
                here = links.interfaces(link)
                for interface in here:
                    links.set_rate(link, interface, round(value))
                return "" if here else f"there is no interface {link.interface} here"
            place = self.controller.step(value)
            self._lead(place)
            self._place, self._moved = place, True
            return ""

    def _renew(self, now: float) -> None:
        with unchanged() as free:
            if free:
                nft.load("".join(f"{line}\n" for line in self._leading(self._place)))
                self._renewed = now

    def _leading(self, place: int) -> list[str]:
        """Commands that have the rules for a value in force."""
        alive = duration(int(1000 * (_ALIVE + 3 * self._settings.period)))
        path, found = self._job.table.path, []
        for site in self.controller.sites:
            to = f"timeout {alive} : goto {chain_of(site, self.controller.steps[place])}"
            found += [
                f"flush map {path} {site}",
                f"add element {path} {site} {{ ipv4 {to}, ipv6 {to} }}",
            ]
        return found

    def _lead(self, place: int) -> None:
        """Have the rules for a value in force, and let the flows that are known follow."""
        from runtime.apply import correct

        path = self._job.table.path
        if place == self._place and self._begun:
            nft.load("".join(f"{line}\n" for line in self._leading(place)))
            self._renewed = time.monotonic()
            return
        moves = self._moves(place)
        known: dict[str, int] = {}
        contents = Contents(moves, nft.elements)
        for move in moves:
            ((_, counts),) = move.sources
            if counts.name not in known:
                known[counts.name] = len(contents.of(path, counts.name))
        lines = self._leading(place)
        if sum(known.values()) <= _MOST_MOVED:
            for move in moves:
                lines.append(f"flush set {path} {move.target.name}")
                lines += contents.commands(move)
        else:
            moves = []
        nft.load("".join(f"{line}\n" for line in lines))
        self._renewed = time.monotonic()
        correct(moves, contents)

    def _moves(self, place: int) -> list[Move]:
        """How the flows that are known follow the parameter to a value."""
        path, found = self._job.table.path, []
        before, after = self._thresholds(self._place), self._thresholds(place)
        for was, one in zip(before, after, strict=True):
            # Who was here before may have left another threshold behind.
            stays = was.threshold == one.threshold and self._begun
            if stays or one.name not in self._depending:
                continue
            counts = next(
                s for s in after
                if (s.role, s.policy, s.flow, s.family) == ("count", one.policy, one.flow, one.family)
            )  # fmt: skip
            how = "over" if one.role == "over" else "budget"
            found.append(Move(path, one, how, ((path, counts),), emptied=True))
        return found

    @cached_property
    def _depending(self) -> set[str]:
        """The sets that follow from the parameter and from what was counted."""
        low, high = self._thresholds(0), self._thresholds(len(self.controller.steps) - 1)
        return {
            one.name for one, other in zip(low, high, strict=True)
            if one.role in ("meter", "over") and one.threshold != other.threshold
        }  # fmt: skip

    def _thresholds(self, place: int) -> tuple[FlowSet, ...]:
        """The table's sets as they are for a value."""
        if place not in self._sets:
            from itmlang.diagnostics import Findings
            from itmlang.pipeline import analyse, lowered

            unit, policy = self._job.unit, self._job.policy
            own = {
                **unit.given.get(policy, {}),
                self.controller.written: self.controller.steps[place],
            }
            try:
                checked = analyse(unit.source, replay(unit), {**unit.given, policy: own})
                compiled = lowered(checked.source, checked.policies, (), Findings())
            except CompileError as error:
                raise MachineError(error.diagnostics[0].message) from error
            self._sets[place] = tuple(compiled.ruleset.table_of(policy).sets)
        return self._sets[place]

    def go_back(self) -> None:
        """The file's value again, as the controller ends. Raises `MachineError`."""
        self.meter.close()
        if not self._moved or self.controller.link:
            return  # a link's rate is the runtime's to set right
        with unchanged() as free:
            if not free:
                return  # what was written ends by itself
            place = self.controller.step(self.controller.base)
            self._lead(place)
            path = self._job.table.path
            nft.load("".join(f"flush map {path} {site}\n" for site in self.controller.sites))
