"""Files that belong together: a policy file and what it includes.

Reading is passed in (`source.Reader`), so that the compiler needs no disk. An
included file comes once, before what follows its first `include`; a cycle is an
error at the `include` that closes it.
"""

from dataclasses import dataclass
from typing import Final

from itmlang import syntax
from itmlang.diagnostics import Findings
from itmlang.parser import parse
from itmlang.source import Reader, Source, Span, UnreadableError

DEEPEST_INCLUDE: Final = 32


@dataclass(frozen=True)
class Module:
    """A file's items; `included` tells that its policies are templates."""

    file: syntax.File
    included: bool


def load(source: Source, read: Reader, findings: Findings) -> tuple[Module, ...]:
    """The file and what it includes, the included ones first. Errors go to `findings`."""
    found: dict[int, Module] = {}
    _load(source, None, [], read, found, findings)
    return tuple(found.values())


def _load(
    source: Source,
    by: Span | None,
    open_files: list[Source],
    read: Reader,
    found: dict[int, Module],
    findings: Findings,
) -> None:
    file = parse(source, findings)
    for item in file.items:
        if not isinstance(item, syntax.Include):
            continue
        try:
            other = read(item.path.text, source, True)
        except UnreadableError as error:
            findings.error(
                "E017", f"`{item.path.text}` cannot be included: {error}", item.path.span,
                help="it is looked for beside this file, then in the policy library",
            )  # fmt: skip
            continue
        if other is source or any(other is one for one in open_files):
            findings.error(
                "E017", f"`{item.path.text}` includes itself, by way of this line", item.path.span
            )
        elif len(open_files) >= DEEPEST_INCLUDE:
            findings.error(
                "E017", f"files include files more than {DEEPEST_INCLUDE} deep", item.path.span
            )
        elif id(other) not in found:
            _load(other, item.span, [*open_files, source], read, found, findings)
    found[id(source)] = Module(file, by is not None)
