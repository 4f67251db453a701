"""A link under `autorate`, in front of a bottleneck whose true rate halves and comes back.

How fast it is, `bench/autorate.py` measures; here it has to get there at all.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from bench.autorate import POLICY, bottleneck, network, streams
from runtime import apply as runtime_apply
from runtime import links, store
from runtime.decisions import decisions
from runtime.traffic import TrafficError
from tests.support import commands
from tests.support.commands import until
from tests.support.needs import unavailable

RATE = 1_000_000.0  # bytes a second


def near(rate: float) -> Callable[[], bool]:
    """Is the link's rate about this one, and the delay where it should be?"""

    def holds() -> bool:
        (link,) = store.load().links
        found = links.rate(link) or 0
        last = [one["sample"] for one in decisions(store.directory(), "shaped", 10)]
        calm = [one for one in last if one is not None and one < 30]
        return 0.85 * rate < found < 1.15 * rate and len(calm) == 10

    return holds


def test_the_rate_follows_the_bottleneck_down_and_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ITM_STATE_DIR", str(tmp_path))
    path = tmp_path / "shaped.itm"
    path.write_text(POLICY.format(base=7200, low=800, high=12_000))
    try:
        entered = network()
        hosts = entered.__enter__()
    except TrafficError as error:
        unavailable(error)
    try:
        bottleneck(hosts["next"], RATE, "add")
        with hosts["manager"].entered(), commands.nothing_left():
            done = commands.run("apply", str(path))
            assert done.returncode == 0, done.stderr
            ends = streams(hosts, 2, "cubic")
            try:
                until(near(RATE), limit=30)
                bottleneck(hosts["next"], RATE / 2, "change")
                until(near(RATE / 2), limit=30)
                bottleneck(hosts["next"], RATE, "change")
                until(near(RATE), limit=30)
            finally:
                for end in ends:
                    end.close()
                runtime_apply.remove([])
            until(lambda: not commands.processes())
    finally:
        entered.__exit__(None, None, None)
