"""Rates as nftables and the kernel have them: an amount in a period, and its token bucket.

The bucket is that of net/netfilter/nft_limit.c, in its own units: tokens are
nanoseconds, of which a packet (or a byte) costs a fixed part of the period.
"""

from dataclasses import dataclass, field
from typing import Final

# (how many a day, seconds, nftables' name), as `values.PERIODS` numbers them.
_PERIODS: Final = (
    (86_400, 1, "second"), (1_440, 60, "minute"), (24, 3_600, "hour"), (1, 86_400, "day"),
)  # fmt: skip
_NANOSECONDS: Final = 10**9
# The kernel compares what is left with what a packet costs as signed 64-bit numbers: of
# more tokens than that, every packet finds too few.
_MOST_TOKENS: Final = 2**63
_LARGEST_PACKET: Final = 2**19  # bytes, with all offloads (GSO_MAX_SIZE)


def period(rate: int, in_bytes: bool) -> tuple[int, int, str]:
    """(amount, seconds, nftables' name of the period) of a rate, in the period it was given in.

    `rate` is a value of `values.RATE` (of bits; then the amount is in bytes) or of
    `values.PACKET_RATE`. The period matters: a bucket is one period deep.
    """
    size, seconds, name = _PERIODS[rate % len(_PERIODS)]
    return rate // len(_PERIODS) // size // (8 if in_bytes else 1), seconds, name


def unit(seconds: int) -> str:
    """nftables' name of a period."""
    return next(name for _, length, name in _PERIODS if length == seconds)


def fits(amount: int, seconds: int, burst: int, in_bytes: bool) -> bool:
    """Does the kernel take a limit of this rate (nft_limit_init)?"""
    length = seconds * _NANOSECONDS
    if not amount > 0 or burst >= 2**32:
        return False
    if in_bytes:
        most = length * (amount + burst)
        return most < 2**64 and most // amount < _MOST_TOKENS
    return amount <= length and length // amount * burst < _MOST_TOKENS


def slowest(burst: int, in_bytes: bool) -> str:
    """nftables' name of the longest period in which a bucket of `burst` may refill by one.

    The slower it refills, the more exactly it counts. At least one packet (or as many
    bytes as the largest has), fewer than 2**33.
    """
    most = max(burst, _LARGEST_PACKET) if in_bytes else burst
    slow = (("week", 604_800), *((name, seconds) for _, seconds, name in reversed(_PERIODS)))
    return next(name for name, seconds in slow if most * seconds * _NANOSECONDS < _MOST_TOKENS)


def advice(amount: int, seconds: int, burst: int, in_bytes: bool) -> str:
    """What to write instead of a limit that does not fit."""
    if amount == 0:
        return "the least is 8 bits in the same time"
    if burst and fits(amount, seconds, 0, in_bytes):
        return "use a smaller burst"
    if seconds > 1:
        what = "bytes" if in_bytes else "packets"
        return f"give it for a second instead: `{max(1, amount // seconds)} {what}/s`"
    return "the most are 147 gbit, and 1000000000 packets/s"


@dataclass
class Bucket:
    """One token bucket: `amount` packets or bytes in every `seconds`, `burst` beside them."""

    amount: int
    seconds: int
    in_bytes: bool
    burst: int
    tokens: int = field(init=False)
    last: int | None = None  # nanoseconds

    def __post_init__(self) -> None:
        self._length = self.seconds * _NANOSECONDS
        if self.in_bytes:
            self._most = self._length * (self.amount + self.burst) // self.amount
            self._cost = 0
        else:
            self._cost = self._length // self.amount
            self._most = self._cost * self.burst
        self.tokens = self._most

    def over(self, length: int, now: float) -> bool:
        """Does a packet of so many bytes find too little at `now` (seconds)? If not, it takes it."""
        time = int(now * _NANOSECONDS)
        if self.last is not None:
            self.tokens = min(self._most, self.tokens + time - self.last)
        self.last = time
        cost = self._length * length // self.amount if self.in_bytes else self._cost
        if cost > self.tokens:
            return True
        self.tokens -= cost
        return False
