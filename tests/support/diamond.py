"""A diamond with overlays: the mesh on which they are tested, and measured against others.

A client behind the traffic manager `near`, a server behind `far`; between these a plain router,
`core`, and, one link further, the relays `one` and `two`, each behind a plain router (`left`,
`right`).
"""

from collections.abc import Mapping

from tests.support.commands import lasting, until
from tests.support.mesh import Box, Download, Mesh, Stream

LINKS = (
    ("client", "near"), ("near", "core"), ("core", "far"), ("far", "server"),
    ("near", "left"), ("left", "one"), ("one", "far"),
    ("near", "right"), ("right", "two"), ("two", "far"),
)  # fmt: skip
MANAGERS = {"near": "192.0.2.1", "one": "192.0.2.2", "two": "192.0.2.3", "far": "192.0.2.9"}
HOSTS = {"client": "10.1.0.0/16", "server": "10.3.0.0/16"}
NEAR, FAR = MANAGERS["near"], MANAGERS["far"]
CLIENT, SERVER = "10.1.0.2", "10.3.0.2"
OURS = "10.1.0.1"  # the near one's own address among its clients
BEHIND = {"near": {HOSTS["server"]: FAR}, "far": {HOSTS["client"]: NEAR}}
KEY = "0123456789abcdef0123456789abcdef"
# Where time is not the question, nothing is to move because this machine was busy.
BY_LOSS = "choose by loss"
BY_TIME = "choose by rtt margin 80%"


def overlay(
    box: Box,
    behind: Mapping[str, Mapping[str, str]] = BEHIND,
    *,
    every: float = 0.1,
    timeout: float = 0.0,
    more: str = BY_LOSS,
) -> str:
    """A box's overlay, and a policy that routes by it where there are destinations."""
    there = behind.get(box.name, {})
    egresses = set(there.values())
    lines = [f"self {box.address}", 'key from "mesh.key"', more]
    lines.append(
        f"probe every {lasting(every)} timeout {lasting(timeout or every)} lost after 3 of 4"
    )
    lines += [f"neighbor {name} {address}" for name, address in MANAGERS.items()
              if address not in (box.address, *egresses)]  # fmt: skip
    lines += [f"destination {network} at {egress}" for network, egress in there.items()]
    inside = "\n".join(f"    {line}" for line in lines if line)
    found = f"overlay mesh {{\n{inside}\n}}\n"
    if there:
        found += (
            "policy outward {\n    at prerouting, output\n    interest { daddr @mesh }\n"
            "    classify { all }\n    process { all { route by mesh } }\n}\n"
        )
    return found


def keyed(box: Box, key: str = KEY, mode: int = 0o600) -> None:
    file = box.folder / "mesh.key"
    file.write_text(key)
    file.chmod(mode)


class Diamond:
    """The mesh, with overlays in all its traffic managers."""

    def __init__(self, made: Mesh) -> None:
        self.mesh = made
        self.near, self.far = made["near"], made["far"]
        self.one, self.two = made["one"], made["two"]
        self.core, self.left, self.right = made["core"], made["left"], made["right"]
        self.client, self.server = made["client"], made["server"]

    def apply(self, **how: object) -> None:
        """Apply overlays everywhere, and wait until all paths are known."""

        def one(box: Box) -> None:
            keyed(box)
            box.apply(overlay(box, **how))  # type: ignore[arg-type]

        self.mesh.everywhere(one)
        try:
            until(lambda: self.known(self.near, FAR) and self.known(self.far, NEAR))
        except AssertionError as error:
            logs = [(box.asked()["log"], box.state()) for box in self.mesh.managers]
            raise AssertionError(f"not all paths work: {logs}") from error

    def known(self, box: Box, egress: str, *but: str) -> bool:
        """Do all paths work, but these?"""
        found = {name: one["state"] for name, one in box.paths(egress).items()}
        return bool(found) and all(
            (state == "working") == (name not in but) for name, state in found.items()
        )

    def ways(self) -> tuple[str, str]:
        """The choices at both ends."""
        return self.near.choice(FAR), self.far.choice(NEAR)

    def settled(self, *, direct: bool) -> None:
        """Wait until both ends go directly, or neither does, in the kernel, too."""

        def there() -> bool:
            ways = [way == "direct" for way in self.ways()]
            maps = [not box.elements() for box in (self.near, self.far)]
            return ways == maps == [direct, direct]

        until(there, 30)

    def stream(self, **how: object) -> Stream:
        return Stream(self.client, self.server, SERVER, **how)  # type: ignore[arg-type]

    def download(self) -> Download:
        return Download(self.client, self.server, SERVER)

    def moves(self) -> tuple[int, int]:
        return len(self.near.moves()), len(self.far.moves())

    def lead(self, box: Box, by: str) -> None:
        """Write a choice into the map by hand; nobody may be there to write it."""
        network = next(iter(BEHIND.get(box.name, {HOSTS["server"]: FAR})))
        box.nft(f"add element inet itm_outward route_mesh {{ {network} : goto via_{by} }}")
