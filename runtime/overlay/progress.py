"""Do packets come back from behind an egress? The data's own word, beside the probes': pure.

A path may answer probes and lose data (a grey failure): a filter, a size, a broken tunnel. TCP
acknowledges what it gets, so where packets go out and none come back, something is wrong; but
only where some have come back before, as else the way back may lead elsewhere, or nobody is
there.
"""

from typing import Final

_FEW: Final = 3  # packets that went out, and none came back


class Progress:
    """What the kernel's counters tell of an egress's destinations."""

    __slots__ = ("_at", "_last", "_since", "alive")

    def __init__(self) -> None:
        self.alive = False  # have packets come back?
        self._last: tuple[int, int] | None = None  # the counters, and
        self._at = 0  # packets sent, when some came back last
        self._since: float | None = None  # since then packets went out in vain

    def looked(self, sent: int, returned: int, now: float) -> bool:
        """Cumulative counts of TCP packets, at a time (seconds). Have some come back since the
        last look?"""
        last, self._last = self._last, (sent, returned)
        if last is None or sent < last[0] or returned < last[1]:  # counters that begin anew
            self.again()
            return False
        if returned > last[1]:
            self.alive = True
            self.again()
            return True
        if sent > self._at and self._since is None:
            self._since = now
        return False

    def stalled(self, now: float) -> float:
        """For how many seconds packets have gone out in vain; 0 if that may be nothing."""
        if not self.alive or self._since is None or self._last is None:
            return 0.0
        return now - self._since if self._last[0] - self._at >= _FEW else 0.0

    def again(self) -> None:
        """Count from here: the path is another, or packets came back."""
        self._at = self._last[0] if self._last else 0
        self._since = None
