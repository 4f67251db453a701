"""All that is measured of rulesets and of the compiler, one bench after the other.

    python -m bench [--quick] [--out FOLDER]

Every bench leaves NAME.json, NAME.md and mostly NAME.png in bench/results; performance.md there
is all their tables. Exits with the greatest of their codes: 1 if a bar is missed, 2 if
something was lost. `make bench` is this, with what it needs.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Final

from bench import compile, growth, overhead, state, wire

BENCHES: Final[dict[str, Callable[[Sequence[str]], int]]] = {
    "growth": growth.main,
    "overhead": overhead.main,
    "compile": compile.main,
    "state": state.main,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    wire.options(parser, "all of them, small")
    given = parser.parse_args()
    out = wire.folder(given)
    arguments = (["--quick"] if given.quick else []) + (["--out", str(out)] if out else [])
    codes = {}
    for name, bench in BENCHES.items():
        begin = time.monotonic()
        codes[name] = bench(arguments)
        print(f"({name}: {time.monotonic() - begin:.0f} s)\n", flush=True)
    if out:
        texts = [file.read_text() for name in BENCHES if (file := out / f"{name}.md").exists()]
        pictures = [
            f"![{name}]({name}.png)\n" for name in BENCHES if (out / f"{name}.png").exists()
        ]
        (out / "performance.md").write_text("\n".join([*texts, *pictures]))
    return max(codes.values())


if __name__ == "__main__":
    sys.exit(main())
