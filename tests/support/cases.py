"""Case files: one claim each, as sections of plain text.

    # the claim
    --- policy
    policy … { … }
    --- nftables [NAME …]       the golden text of these chains and sets
    --- linear [NAME …]         the same without optimisations, where they make a difference
    --- file NAME               a file that the policy includes or reads; before `nftables`
    --- python NAME             a module with handlers; before `nftables`
    --- packets [PATH]          forward if not given
    send 3 tcp 10.0.1.1:1000 -> 10.0.2.1:80 expect class short tos 0x10
    wait 1200ms
    as fragment send 1 udp … expect untouched

`as SHAPE` makes of the packet what its text cannot say (see `frames`).
"""

import builtins
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FunctionType

from itmlang import syntax, values
from itmlang.actions import Action
from itmlang.diagnostics import CompileError, Findings, render
from itmlang.dispatch import OPTIMISATIONS
from itmlang.evaluate import Scope, single, value_set
from itmlang.headers import Packet as Headers
from itmlang.marks import KEPT
from itmlang.packet import Packet
from itmlang.packets import header
from itmlang.parser import parse_send
from itmlang.pipeline import Compiled, compile
from itmlang.semantics import PATHS, Did, Host, Visit
from itmlang.source import Source, UnreadableError
from runtime.handlers import Class, Handler, Verdict
from tests.support.frames import shaped

CASES = Path(__file__).parents[1] / "cases"
_SECTION = re.compile(r"^--- (\w+)(.*)$", re.MULTILINE)
_COMMENT = re.compile(r' comment "[^"]*"$')
_FIELDS = {
    "tos": values.TOS, "dscp": values.DSCP, "ecn": values.ECN, "ttl": values.OCTET,
    "mark": values.NUMBER, "sport": values.PORT, "dport": values.PORT, "mss": values.MSS,
}  # fmt: skip
_GETTERS = {"sport": "source_port", "dport": "destination_port", "mss": "tcp_mss"}


@dataclass(frozen=True)
class Send:
    """`count` equal packets on a path, or a pause of `wait` seconds; `place` is for messages."""

    place: str
    path: str
    wait: float
    count: int
    data: bytes
    mark: int
    expectations: tuple[syntax.Expectation, ...]

    def packet(self) -> Packet:
        return Packet(bytearray(self.data), mark=self.mark)


@dataclass(frozen=True, eq=False)
class Case:
    path: Path
    claim: str
    policy: str
    blocks: tuple[str, ...]  # the chains and sets of the golden text
    golden: str
    linear: tuple[tuple[str, ...], str] | None  # as blocks and golden text, not optimised
    sends: tuple[Send, ...]
    files: Mapping[str, Source]
    modules: Mapping[str, str]

    def handlers(self) -> Mapping[str, Handler]:
        """The functions of the case's modules, by their names in the policy; loaded anew."""
        found = {}
        for module, text in self.modules.items():
            names: dict[str, object] = {}
            exec(builtins.compile(text, f"{self.name}:{module}", "exec"), names)
            found |= {
                f"{module}:{name}": Handler(f"{module}:{name}", one)
                for name, one in names.items()
                if isinstance(one, FunctionType)
            }
        return found

    def host(self) -> Host:
        """The policies by the semantics."""
        handlers = self.handlers()

        def do(action: Action, packet: Packet, now: float) -> Did:
            kept = packet.mark & KEPT
            shown = Headers(bytes(packet.data), mark=packet.mark ^ kept, input=packet.input,
                            output=packet.output)  # fmt: skip
            said = handlers[action.handler].function(shown)
            packet.mark = kept | shown.mark
            if shown.altered and not action.once:
                packet.replace(shown.data)
            if isinstance(said, Class):
                return Did("", said.name)
            return Did("drop") if said is Verdict.DROP else Did()

        return Host(self.compiled().policies, do=do)

    @property
    def queued(self) -> bool:
        """Does a part of the policies run in Python?"""
        return any(table.queues for table in self.compiled().ruleset.tables)

    @property
    def name(self) -> str:
        return str(self.path.relative_to(CASES).with_suffix(""))

    def compiled(self) -> Compiled:
        return self._compiled(True)

    @property
    def forms(self) -> list[Compiled]:
        """The policies as they are compiled, and without optimisations where that differs."""
        best, plain = self._compiled(True), self._compiled(False)
        return [best] if best.text.text == plain.text.text else [best, plain]

    @cache  # noqa: B019  a case lives as long as the run
    def _compiled(self, optimise: bool) -> Compiled:
        passes = OPTIMISATIONS if optimise else ()
        try:
            return compile(Source(self.path.name, self.policy), self._read, optimisations=passes)
        except CompileError as error:
            raise AssertionError("\n".join(map(render, error.diagnostics))) from None

    def _read(self, path: str, by: Source, library: bool) -> Source:
        """The files that a policy names are further sections: `--- file NAME`."""
        if path not in self.files:
            raise UnreadableError("there is no such section")
        return self.files[path]

    def bless(self) -> None:
        """Put the nftables that come out today into the file."""
        text = self.path.read_text()
        head, _, rest = text.partition("--- nftables")
        names = rest.partition("\n")[0]
        packets = rest[rest.index("--- packets") :]
        shown = f"--- nftables{names}\n{printed(self.compiled(), self.blocks)}\n"
        if self.linear is not None:
            blocks, _ = self.linear
            plain = printed(self._compiled(False), blocks)
            shown += f"--- linear {' '.join(blocks)}\n{plain}\n"
        self.path.write_text(f"{head}{shown}{packets}")


def cases() -> list[Case]:
    return [read(path) for path in sorted(CASES.rglob("*.case"))]


def read(path: Path) -> Case:
    text = path.read_text()
    marks = list(_SECTION.finditer(text))
    claim = text[: marks[0].start()].strip()
    assert claim.startswith("# ") and "\n" not in claim, f"{path}: begin with one line, the claim"
    policy = golden = ""
    linear = None
    blocks: tuple[str, ...] = ()
    sends: list[Send] = []
    files: dict[str, Source] = {}
    modules: dict[str, str] = {}
    for index, mark in enumerate(marks):
        end = marks[index + 1].start() if index + 1 < len(marks) else len(text)
        content, argument = text[mark.end() + 1 : end], mark.group(2).strip()
        match mark.group(1):
            case "policy":
                policy = content
            case "nftables":
                golden, blocks = content.strip("\n"), tuple(argument.split())
            case "linear":
                linear = tuple(argument.split()), content.strip("\n")
            case "packets":
                line = text.count("\n", 0, mark.end()) + 2
                sends += _sends(path, line, argument or "forward", content)
            case "file":
                files[argument] = Source(argument, content)
            case "python":
                modules[argument] = content
            case other:
                raise ValueError(f"{path}: no section is called {other}")
    return Case(path, claim[2:], policy, blocks, golden, linear, tuple(sends), files, modules)


def _sends(path: Path, first: int, route: str, content: str) -> list[Send]:
    assert route in PATHS, f"{path}: no path is called {route}"
    found = []
    for number, line in enumerate(content.splitlines(), first):
        place, line = f"{path.name}:{number}", line.split(" #")[0].strip()
        if not line or line.startswith("#"):
            continue
        if line.startswith("wait "):
            seconds = int(line.removeprefix("wait ").removesuffix("ms")) / 1000
            found.append(Send(place, route, seconds, 0, b"", 0, ()))
            continue
        shape = ""
        if line.startswith("as "):
            _, shape, line = line.split(" ", 2)
        findings = Findings()
        node = parse_send(Source(place, line), findings)
        built = None if node is None else header(node.packet, findings)
        if node is None or built is None:
            raise ValueError("\n".join(map(render, findings.diagnostics)))
        assert route == "out" or not built.mark, f"{place}: a mark does not cross a wire"
        data = shaped(bytes(built.build().data), shape)
        found.append(Send(place, route, 0, node.count.value, data, built.mark, node.expectations))
    return found


def printed(compiled: Compiled, blocks: tuple[str, ...]) -> str:
    """The named chains, sets and maps of the ruleset, without comments."""
    shown, inside, table = [], False, ""
    several = len(compiled.policies) > 1
    for line in compiled.text.text.splitlines():
        if line.startswith("table ") and line.endswith("{"):
            table = line.split()[2]
        word = line.split()
        if (
            line[:1] == "\t"
            and line[1:2] not in ("\t", "}")
            and word[:1] in (["chain"], ["set"], ["map"])
        ):
            inside = word[1] in blocks
            if inside and several:
                shown.append(f"# {table}")
        if line.startswith("add element "):
            inside = word[4] in blocks
        if inside and not line.strip().startswith("#"):
            shown.append(_COMMENT.sub("", line.removeprefix("\t")))
        inside = inside and line not in ("\t}", "}") and not line.endswith("; }")
    return "\n".join(shown)


def unmet(
    expectations: tuple[syntax.Expectation, ...], visits: list[Visit], before: Packet, after: Packet
) -> list[str]:
    """What was expected by hand and did not happen; `before` has crossed the hooks unchanged."""
    said = {(visit.policy.name, visit.outcome.name) for visit in visits}
    verdict = visits[-1].outcome.verdict if visits else "accept"
    problems = []
    for expected in expectations:
        text = expected.span.text
        match expected.kind:
            case "class":
                assert expected.name is not None
                of = expected.policy and expected.policy.text
                if not any(c == expected.name.text and of in (None, p) for p, c in said):
                    problems.append(f"{text}: it was {sorted(map(str, said))}")
            case "untouched":
                if any(name for _, name in said) or before.data != after.data:
                    problems.append(f"{text}: it was {sorted(map(str, said))}")
            case "accept" | "drop" | "reject" as wanted:
                if verdict != wanted:
                    problems.append(f"{wanted}: the verdict was {verdict}")
            case "saddr" | "daddr" as kind:
                assert expected.value is not None
                address = value_set(expected.value, values.ADDRESS, Scope(), Findings())
                got = after.source if kind == "saddr" else after.destination
                if got not in address:
                    problems.append(f"{text}: it is {values.address_text(*got)}")
            case kind:
                assert expected.value is not None
                wanted = single(expected.value, _FIELDS[kind], Scope(), Findings())
                got = getattr(after, _GETTERS.get(kind, kind))
                if got != wanted:
                    problems.append(f"{text}: it is {got}")
    if verdict != "accept" and not any(e.kind in ("drop", "reject") for e in expectations):
        problems.append(f"the verdict was {verdict}")
    return problems
