"""What a compiled ruleset needs of the machine, and an error for each thing that it lacks.

Read off the very text that is loaded, whose lines know the policy's lines behind them.
"""

import re
from collections.abc import Iterable
from typing import Final

from itmlang.capabilities import Capabilities, Feature
from itmlang.diagnostics import Findings
from itmlang.nft.text import Text
from itmlang.source import Span

_QUOTED: Final = re.compile(r'"[^"]*"')
_FURTHER: Final = 3  # places that are named beside the first


def refuse_lacking(text: Text, machine: Capabilities, findings: Findings) -> None:
    """An error (E061) for each feature that the ruleset uses and the machine lacks."""
    lacking = (*machine.lacking("policies"), *machine.lacking("queues"))
    for feature, (first, *further) in uses(text, lacking).items():
        unasked = feature.name in machine.unasked
        notes: list[tuple[str, Span | None]] = [(f"what it costs: {feature.cost}", None)]
        notes += [("needed here, too", span) for span in further[:_FURTHER]]
        if len(further) > _FURTHER:
            notes.append((f"and in {len(further) - _FURTHER} more lines", None))
        findings.error(
            "E061",
            f"the machine was never asked for `{feature.name}` ({feature.purpose})" if unasked
            else f"the machine lacks `{feature.name}` ({feature.purpose})",
            first,
            notes=tuple(notes),
            help="ask it anew, with this itm: `itmc doctor --json`" if unasked else feature.mend,
        )  # fmt: skip


def uses(text: Text, features: Iterable[Feature]) -> dict[Feature, list[Span]]:
    """Those of the features that the ruleset uses, each with the policy's lines, in order."""
    asked = tuple(features)
    found: dict[Feature, dict[tuple[str, int], Span]] = {}
    if not asked:
        return {}
    for line, span in zip(text.text[:-1].split("\n"), text.lines, strict=True):
        if span is None:
            continue
        bare = _QUOTED.sub('""', line)
        for feature in asked:
            if feature.used_in(bare):
                found.setdefault(feature, {}).setdefault((span.source.name, span.line), span)
    return {f: [found[f][place] for place in sorted(found[f])] for f in asked if f in found}
