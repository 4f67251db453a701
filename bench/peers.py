"""What aerleon and foomuuri make of the same terms; they are installed to be run, beside itm.

Both go into a folder of this one, `bench/.cache`, that nothing else uses: aerleon from PyPI
into an environment of its own; foomuuri, which PyPI does not have, as Debian's package,
unpacked and never installed (it would become this machine's firewall).

    python -m bench.peers      # only install them
"""

import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.shapes import Term
from bench.wire import HERE

CACHE: Final = HERE / ".cache"
AERLEON: Final = "aerleon==1.18.0"
# The first Debian whose foomuuri starts without D-Bus.
SOURCES: Final = (
    "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] "
    "http://deb.debian.org/debian forky main\n"
)


class PeerError(Exception):
    """It cannot be had here, or cannot say this; the message says which and why."""


@dataclass(frozen=True)
class Ruleset:
    """What a peer made: the text for nft, and in how many seconds."""

    text: str
    seconds: float


def _run(command: Sequence[str | Path], what: str) -> float:
    """Seconds of a process that has to succeed."""
    begin = time.perf_counter()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False
        )
    except OSError as error:
        raise PeerError(f"{what}: {error}") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise PeerError(f"{what}: {said[-1] if said else 'it failed'}")
    return time.perf_counter() - begin


# aerleon.


def _aerleon() -> Path:
    """Its generator, installed if it is not there."""
    place = CACHE / "aerleon"
    program = place / "bin" / "aclgen"
    if not program.exists():
        shutil.rmtree(place, ignore_errors=True)
        venv.create(place, with_pip=True)
        _run([place / "bin" / "pip", "install", "--quiet", AERLEON], "install aerleon")
    return program


def aerleon(terms: Sequence[Term], folder: Path) -> Ruleset:
    """Raises PeerError."""
    program = _aerleon()
    networks, services, rules = ["networks:"], ["services:"], []
    for n, term in enumerate(terms):
        rules.append(f"      - name: c{n}")
        if term.to:
            networks += [f"  TO_{n}:", "    values:"]
            networks += [f"      - address: {one}" for one in term.to]
            rules.append(f"        destination-address: TO_{n}")
        if term.protocol:
            rules.append(f"        protocol: {term.protocol}")
        if term.dport:
            first, last = term.dport
            ports = str(first) if first == last else f"{first}-{last}"
            services += [
                f"  PORTS_{n}:",
                f"    - protocol: {term.protocol}",
                f"      port: {ports}",
            ]
            rules.append(f"        destination-port: PORTS_{n}")
        rules += ["        counter: yes-please", "        action: accept"]
    rules += ["      - name: rest", "        counter: yes-please", "        action: accept"]
    header = ["filters:", "  - header:", "      targets:"]
    header += ["        nftables: mixed forward ACCEPT noverbose", "    terms:"]
    made = folder / "aerleon"
    for name, lines in (
        ("definitions/networks.yaml", networks if len(networks) > 1 else []),
        ("definitions/services.yaml", services if len(services) > 1 else []),
        ("policies/pol/growth.yaml", header + rules),
    ):
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_text("\n".join([*lines, ""]) if lines else "{}\n")
    command: list[str | Path] = [
        program, "--base_directory", made / "policies", "--definitions_directory",
        made / "definitions", "--output_directory", made / "out",
    ]  # fmt: skip
    seconds = _run(command, "aerleon")
    try:
        return Ruleset((made / "out" / "growth.nft").read_text(), seconds)
    except FileNotFoundError as error:
        raise PeerError("aerleon: it wrote nothing") from error


# foomuuri.


def _foomuuri() -> Path:
    """Its folder, filled if it is not there."""
    place = CACHE / "foomuuri"
    if not (place / "root").exists():
        shutil.rmtree(place, ignore_errors=True)
        (place / "lists" / "partial").mkdir(parents=True)
        (place / "packages" / "archives" / "partial").mkdir(parents=True)
        (place / "sources.list").write_text(SOURCES)
        options = {  # apt's own state stays as it is
            "Dir::Etc::sourcelist": place / "sources.list",
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::State::lists": place / "lists",
            "Dir::Cache": place / "packages",
            "APT::Sandbox::User": "root",
        }
        apt = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in options.items())]
        _run([*apt, "update"], "fetch Debian's list of packages")
        _run(["sh", "-c", f'cd "{place}" && "$@"', "sh", *apt, "download", "foomuuri"], "fetch foomuuri")  # fmt: skip
        (package,) = place.glob("foomuuri_*.deb")
        _run(["dpkg", "-x", package, place / "root"], "unpack foomuuri")
        shutil.rmtree(place / "lists")
    return place


def foomuuri(terms: Sequence[Term], folder: Path) -> Ruleset:
    """From zone `in` to zone `out`. Raises PeerError."""
    place = _foomuuri()
    rules = []
    for term in terms:
        words = ["daddr", *term.to] if term.to else []
        words += [term.protocol] if term.protocol else []
        words += ["-".join(map(str, dict.fromkeys(term.dport)))] if term.dport else []
        rules.append("  " + " ".join(words))
    made = folder / "foomuuri"
    for name in ("etc", "state", "run"):
        (made / name).mkdir(parents=True, exist_ok=True)
    config = ["foomuuri {", "  rpfilter no", "  counter in-out", "  dbus_zone out", "}"]
    config += ["zone {", "  localhost", "  in eth0", "  out eth1", "}"]
    config += ["in-out {", *rules, "  accept", "}", ""]
    (made / "etc" / "foomuuri.conf").write_text("\n".join(config))
    share = place / "root" / "usr" / "share" / "foomuuri"
    folders = [f"--set={name}_dir={made / name}" for name in ("etc", "state", "run")]
    command: list[str | Path] = [
        "/usr/bin/env", "python3", place / "root" / "usr" / "sbin" / "foomuuri", *folders,
        f"--set=share_dir={share}", "--set=nft_bin=true", "check",
    ]  # fmt: skip
    seconds = _run(command, "foomuuri")
    return Ruleset((made / "state" / "next.fw").read_text(), seconds)


PEERS: Final = {"aerleon": aerleon, "foomuuri": foomuuri}


def versions() -> dict[str, str]:
    """Of those that are installed."""
    found = {"aerleon": AERLEON.partition("==")[2]} if (CACHE / "aerleon").exists() else {}
    for package in (CACHE / "foomuuri").glob("foomuuri_*.deb"):
        found["foomuuri"] = package.name.split("_")[1]
    return found


if __name__ == "__main__":
    try:
        _aerleon()
        _foomuuri()
    except PeerError as error:
        sys.exit(str(error))
    print(versions())
