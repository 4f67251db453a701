"""`itmc top`: what runs, live, with rates.

Two glances make a rate. Nothing that grows with what is loaded is read twice: no rule, no
flow; the state only when it changed, and no change has to wait for us.
"""

import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import click

from itmlang.links import rate_text
from runtime.cli.output import console, laid_out
from runtime.cli.span import seconds
from runtime.cli.status import told_pending
from runtime.cli.words import (
    absence,
    controllers,
    decided,
    link_line,
    overlay_line,
    paths,
    policy_line,
    routed,
    timers,
    uncalled,
)
from runtime.errors import MachineError, UsageError
from runtime.status import Glance, LinkStatus, PolicyStatus, glance, refuse_unknown

if TYPE_CHECKING:
    from rich.console import Group, RenderableType

_LEAST: Final = 0.1  # seconds between two glances


@dataclass(frozen=True)
class Rate:
    """What came by between two glances, a second."""

    packets: float
    bytes: float
    drops: float = 0.0


# By policy or link, and class ("" for what a policy has in Python).
Rates = Mapping[tuple[str, str], Rate]


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option(
    "--interval", default="1s", show_default=True, metavar="TIME", help="Between two looks."
)
def command(names: tuple[str, ...], interval: str) -> None:
    """Show policies and links (or those named) live: what they pass a second, what waits.

    q ends it. Where stdout is no terminal, it shows one interval and ends.
    """
    every = seconds(interval)
    if every < _LEAST:
        raise UsageError(f"`{interval}` is too short", "100ms at least")
    refuse_unknown(names)
    first = glance(names)
    if sys.stdout.isatty() and not console().is_dumb_terminal:
        _live(names, every, first)
        return
    time.sleep(every)
    now = glance(names, first.state)
    console().print(_screen(now, rates(first, now)))


def rates(before: Glance, now: Glance) -> Rates:
    """What came by from one glance to the next; what began to count anew meanwhile is left out."""
    passed = now.at - before.at
    if passed <= 0:
        return {}
    old, new = _counted(before), _counted(now)
    found = {}
    for key, counts in new.items():
        differences = [n - o for n, o in zip(counts, old.get(key, counts), strict=True)]
        if key in old and all(one >= 0 for one in differences):
            found[key] = Rate(*(one / passed for one in differences))
    return found


def _counted(one: Glance) -> dict[tuple[str, str], tuple[int, int, int]]:
    """Packets, bytes, drops."""
    found = {(p.name, c.name): (c.packets, c.bytes, 0) for p in one.policies for c in p.classes}
    found |= {
        (p.name, f"by {w.name}"): (w.packets, w.bytes, 0) for p in one.policies for w in p.ways
    }
    found |= {
        (p.name, ""): (p.python.handled, 0, p.python.dropped)
        for p in one.policies
        if p.python is not None
    }
    found |= {
        (link.name, c.name): (c.packets, c.bytes, c.drops)
        for link in one.links
        for c in link.classes
        if link.state == "on"
    }
    return found


# The terminal.


def _live(names: Sequence[str], every: float, before: Glance) -> None:
    from rich.live import Live

    out = console()
    with _keys() as ended, _ended_politely():
        first = _screen(before, {})
        with Live(first, console=out, screen=True, auto_refresh=False) as live:
            live.refresh()
            shown, trouble = before, ""
            while not ended(every):
                try:
                    now, trouble = glance(names, before.state), ""
                    shown, passed, before = now, rates(before, now), now
                except MachineError as error:
                    passed, trouble = {}, error.message
                live.update(_screen(shown, passed, trouble), refresh=True)


@contextmanager
def _ended_politely() -> Iterator[None]:
    """Ctrl-C and SIGTERM end it as `q` does: the terminal is as it was."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _keys() -> Iterator[Callable[[float], bool]]:
    """Waits so many seconds; was `q` pressed, or the terminal closed?"""
    if not sys.stdin.isatty():
        yield _only_wait
        return
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)

    def pressed(patience: float) -> bool:
        due = time.monotonic() + patience
        while (left := due - time.monotonic()) > 0:
            if select.select([terminal], [], [], left)[0]:
                keys = os.read(terminal, 64)
                if not keys or b"q" in keys.lower():
                    return True
        return False

    try:
        tty.setcbreak(terminal)
        mode = termios.tcgetattr(terminal)
        mode[6][termios.VSUSP] = b"\0"  # stopped, it would leave the terminal as it is
        termios.tcsetattr(terminal, termios.TCSANOW, mode)
        yield pressed
    finally:
        termios.tcsetattr(terminal, termios.TCSAFLUSH, before)


def _only_wait(patience: float) -> bool:
    time.sleep(patience)
    return False


# What is shown.


def _screen(now: Glance, passed: Rates, trouble: str = "") -> "Group":
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [
        Text(line, style="yellow") for line in (told_pending(), trouble) if line
    ]
    if not now.policies and not now.links:
        parts.append(Text("no policy is loaded"))
    for policy in now.policies:
        parts += _policy(policy, passed)
    for link in now.links:
        parts += _link(link, passed)
    return Group(*parts)


def _policy(policy: PolicyStatus, passed: Rates) -> Iterator["RenderableType"]:
    from rich.text import Text

    yield _heading(policy_line(policy))
    if policy.state == "missing":
        yield Text("  its table is gone from the kernel: `itmc apply` brings it back", "yellow")
    if policy.classes:
        rows = [
            (c.name, *_rate(passed.get((policy.name, c.name))), c.packets) for c in policy.classes
        ]
        yield laid_out(("class", "packets/s", "rate", "packets"), rows)
    if policy.python is not None:
        one = passed.get((policy.name, ""))
        told = f"  in Python: {_number(one.packets) if one else '-'} packets/s handled, "
        told += f"{policy.python.waiting} wait"
        told += f", {_number(one.drops)}/s dropped" if one is not None and one.drops else ""
        yield Text(told)
        if policy.python.trouble:
            yield Text(f"  not served: {policy.python.trouble}", "yellow")
    if policy.ways:
        rows = [
            (w.name, *_rate(passed.get((policy.name, f"by {w.name}"))), w.packets)
            for w in policy.ways
        ]
        yield laid_out(("by", "packets/s", "rate", "packets"), rows)
    if policy.overlay is not None:
        yield Text(f"  {overlay_line(policy.overlay)}")
        if policy.overlay.destinations:
            yield laid_out(*paths(policy.overlay))
        for line in routed(policy.overlay):
            yield Text(f"  {line}", "yellow" if policy.overlay.trouble else "")
    if policy.control:
        yield laid_out(*controllers(policy))
        for line, controller in zip(decided(policy), policy.control, strict=True):
            yield Text(f"  {line}", "yellow" if controller.trouble else "")
    if policy.timers:
        yield laid_out(*timers(policy))
        for line in uncalled(policy):
            yield Text(f"  {line}", "yellow")
    yield Text()


def _link(link: LinkStatus, passed: Rates) -> Iterator["RenderableType"]:
    from rich.text import Text

    yield _heading(link_line(link))
    if absence(link):
        yield Text(f"  {absence(link)}", "yellow")
    if link.state == "on":
        found = [passed.get((link.name, c.name)) for c in link.classes]
        shown = laid_out(
            ("class", "priority", "packets/s", "rate", "drops/s", "waiting"),
            [
                (c.name, c.priority, *_rate(one), _number(one.drops) if one else "-", c.waiting)
                for c, one in zip(link.classes, found, strict=True)
            ],
        )
        for row, one in zip(shown.rows, found, strict=True):
            row.style = "red" if one is not None and one.drops else ""
        yield shown
    yield Text()


def _heading(line: str) -> "RenderableType":
    from rich.text import Text

    return Text(line, style="bold", no_wrap=True, overflow="ellipsis")


def _rate(one: Rate | None) -> tuple[str, str]:
    return ("-", "-") if one is None else (_number(one.packets), rate_text(one.bytes, 3))


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 or value == 0 else f"{value:.1f}"
