"""The systemd units that bring policies back at boot, and serve them: their text, their files.

A unit is an entry in `UNITS`: a name, the target that wants it, and a text that needs
nothing but the path of `itmc`. To install is to make paths hold what they should: each
is changed by one rename, and if one cannot be, those before it are put back. To enable
a unit is a link, as `systemctl enable` makes it; so images and machines that run no
systemd are no special case, and a running systemd is only told to look again.

The first line of a file has the digest of the rest. What lacks it, or was edited since,
belongs to somebody else and stays, unless forced.
"""

import hashlib
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from runtime.errors import MachineError, UsageError

FOLDER: Final = Path("/etc/systemd/system")
_RUNNING: Final = Path("/run/systemd/system")  # sd_booted(3)
_NOT_LOADED: Final = 5  # systemctl(1), Exit status
_HEAD: Final = re.compile(r"# Written by `itmc install-service`, sha256 ([0-9a-f]{64})")
_HOMES: Final = (Path("/home"), Path("/root"))
_EMPTIED_AT_BOOT: Final = (Path("/tmp"), Path("/var/tmp"), Path("/run"), Path("/dev"))

# What a path holds: a file's text, a link's target, or nothing.
Content = str | Path | None


@dataclass(frozen=True)
class Program:
    """An itmc for units to start.

    All paths are absolute, as the booted machine sees them. `places` is what starting it
    needs, as far as that is known: of an itmc that does not run now, no Python packages.
    """

    path: Path
    places: tuple[Path, ...]


@dataclass(frozen=True)
class Unit:
    """A unit of ours: its file's name, the target that wants it, and the text it has."""

    name: str
    wanted_by: str
    text: Callable[[Program], str]


@dataclass(frozen=True)
class Done:
    """What was changed: the paths, and whether a running systemd knows of it."""

    changed: tuple[Path, ...]
    told: bool


def _boot(program: Program) -> str:
    itmc = _quoted(program.path)
    return f"""\
[Unit]
Description=Traffic policies of itm, as last confirmed
DefaultDependencies=no
Wants=network-pre.target
Before=network-pre.target shutdown.target
Conflicts=shutdown.target
# Without it there is nothing to load: no failure then.
ConditionPathExists=/var/lib/itm/host.json.gz
After=local-fs.target systemd-modules-load.service systemd-sysctl.service
# Debian's nftables.service flushes the whole ruleset when it starts and when it reloads.
After=nftables.service
PartOf=nftables.service
ReloadPropagatedFrom=nftables.service
# A device that a policy names may come late. The network does not wait for later attempts.
StartLimitIntervalSec=120
StartLimitBurst=8

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart={itmc} boot
ExecReload={itmc} boot
# There is no ExecStop: policies stay until `itmc remove`.
TimeoutStartSec=90
Restart=on-failure
RestartSec=5
{_hardened(program)}
[Install]
WantedBy=sysinit.target
"""


def _runtime(program: Program) -> str:
    return f"""\
[Unit]
Description=Packets in Python, for the traffic policies of itm
DefaultDependencies=no
Wants=network-pre.target
Before=network-pre.target shutdown.target
Conflicts=shutdown.target
# Without it there is nothing to serve; `itmc apply` starts what it needs by itself.
ConditionPathExists=/var/lib/itm/host.json.gz
# Policies stay when itm.service stops, so this one goes on, too.
After=local-fs.target itm.service
StartLimitIntervalSec=0

[Service]
# Ready when all handlers are loaded, or cannot be.
Type=notify
ExecStart={_quoted(program.path)} serve
TimeoutStartSec=90
TimeoutStopSec=10
KillMode=mixed
Restart=always
RestartSec=1
{_confined_runtime()}
[Install]
WantedBy=sysinit.target
"""


def _hardened(program: Program) -> str:
    """The sandbox: it changes this network's nftables and its own two folders, nothing else.

    PrivateNetwork and PrivateUsers would take away what it is for. Without
    CAP_DAC_OVERRIDE, root reads what root may read by the files' modes.
    """
    homes = "read-only" if any(map(_at_home, program.places)) else "yes"
    return f"""\
StateDirectory=itm
CapabilityBoundingSet=CAP_NET_ADMIN
RestrictAddressFamilies=AF_NETLINK AF_INET AF_UNIX
IPAddressDeny=any
ProtectHome={homes}
ProtectKernelTunables=yes
MemoryDenyWriteExecute=yes
{_HARDENED}"""


def _confined_runtime() -> str:
    """The sandbox of handlers: they are the user's programs, so it leaves them more.

    They may lie in a home, talk to the network, and have compilers of their own (numba).
    CAP_NET_RAW sends the ICMP errors of tunnels; those of the kernel take BPF and sysctls.
    """
    return f"""\
CapabilityBoundingSet=CAP_NET_ADMIN CAP_NET_RAW CAP_BPF
RestrictAddressFamilies=AF_NETLINK AF_INET AF_INET6 AF_UNIX
ProtectHome=read-only
{_HARDENED}SystemCallFilter=bpf
"""


_HARDENED: Final = """\
RuntimeDirectory=itm
RuntimeDirectoryPreserve=yes
NoNewPrivileges=yes
ProtectSystem=strict
PrivateDevices=yes
PrivateMounts=yes
PrivateTmp=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectProc=invisible
LockPersonality=yes
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
SystemCallErrorNumber=EPERM
"""


UNITS: Final = (
    Unit("itm.service", "sysinit.target", _boot),
    Unit("itm-runtime.service", "sysinit.target", _runtime),
)


def find(given: str | None, root: Path) -> Program:
    """The itmc that units start: the one `given`, or the one that runs.

    Below another `root` it is looked for there. Raises `UsageError` if it is not there
    or no program, or if it is gone at the next boot.
    """
    found = Path(given) if given else _own()
    if not found.is_absolute():
        raise UsageError(f"{found} is no absolute path", "units need one")
    if given is None and root != Path("/") and found.is_relative_to(root):
        found = Path("/") / found.relative_to(root)
    path = Path(os.path.normpath(found))
    # systemd takes no quotes and backslashes in a program's name, however they are written.
    if not str(path).isprintable() or set(str(path)) & set("\"'\\"):
        raise UsageError(f"a unit cannot name the path {str(path)!r}", "install itmc elsewhere")
    there = _below(root, path)
    if not (there.is_file() and there.stat().st_mode & 0o111):
        where = "" if root == Path("/") else f" below {root}"
        raise UsageError(
            f"{path} is no program{where}", "--itmc PATH names the itmc that the units start"
        )
    places = [path, Path("/") / there.relative_to(root)]
    interpreter = _interpreter(there)
    if interpreter is not None:
        places += [interpreter, Path("/") / _below(root, interpreter).relative_to(root)]
    if given is None and root == Path("/"):
        places += [Path(sys.prefix), Path(sys.base_prefix), Path(__file__).parent]
    for place in places:
        if any(place.is_relative_to(folder) for folder in _EMPTIED_AT_BOOT):
            raise UsageError(
                f"itmc needs {place}, which is gone at the next boot",
                "install itmc to stay (pipx install --global, or a virtual environment in /opt)",
            )
    return Program(path, tuple(dict.fromkeys(places)))


def doubts(program: Program, root: Path) -> tuple[str, ...]:
    """Reasons why a program should not be started by root at boot, or cannot be; sorted."""
    found = set()
    at_home = [place for place in program.places if _at_home(place)]
    if at_home:
        found.add(f"itmc needs {at_home[0]}, in a home folder; so the unit may read homes")
    for place in program.places:
        for part in (place, *place.parents):
            with suppress(OSError):
                about = _below(root, part).stat()
                # In a sticky folder (/tmp) nobody renames what belongs to others.
                loose = about.st_mode & 0o022 and not about.st_mode & stat.S_ISVTX
                if about.st_uid != 0 or loose:
                    found.add(f"itmc needs {part}, which others than root can change; "
                              "whoever does so acts as root at the next boot")  # fmt: skip
                if not _open_to_root(about):
                    found.add(f"itmc needs {part}, which is closed to root without "
                              "CAP_DAC_OVERRIDE; the unit has only CAP_NET_ADMIN")  # fmt: skip
    return tuple(sorted(found))


def texts(program: Program) -> dict[str, str]:
    """The units' files: name and text."""
    return {unit.name: _signed(unit.text(program)) for unit in UNITS}


def install(program: Program, root: Path, *, force: bool = False) -> Done:
    """Write and enable the units, all of them or none; doing it again changes nothing.

    Raises `MachineError` if a unit's file is not ours (unless `force`), or cannot be
    written, or systemd does not take it.
    """
    wanted: dict[Path, Content] = {}
    for unit in UNITS:
        wanted[FOLDER / unit.name] = _signed(unit.text(program))
        wanted[_link(unit)] = FOLDER / unit.name
    return _change(wanted, root, force, [("daemon-reload",)])


def remove(root: Path, *, force: bool = False) -> Done:
    """Disable the units and take their files away; policies that are loaded stay.

    Raises `MachineError` as `install` does.
    """
    wanted: dict[Path, Content] = {}
    for unit in UNITS:
        wanted |= {_link(unit): None, FOLDER / unit.name: None}
    # Else a unit without a file would be shown as active until the next boot.
    stop = ("stop", *(unit.name for unit in UNITS))
    return _change(wanted, root, force, [("daemon-reload",), stop])


def running(root: Path) -> bool:
    """Whether a systemd runs that these units concern."""
    return root == Path("/") and _RUNNING.is_dir()


def _link(unit: Unit) -> Path:
    return FOLDER / f"{unit.wanted_by}.wants" / unit.name


def _change(
    wanted: Mapping[Path, Content], root: Path, force: bool, calls: list[tuple[str, ...]]
) -> Done:
    """Make the paths hold what is wanted, and tell systemd; all or nothing."""
    try:
        before = {path: _held(_inside(root, path)) for path in wanted}
    except OSError as error:
        raise _refused(error) from error
    changed = tuple(path for path in wanted if before[path] != wanted[path])
    if not force:
        for path in changed:
            _refuse_foreign(_inside(root, path), before[path])
    done: list[Path] = []
    try:
        for path in changed:
            _put(_inside(root, path), wanted[path])
            done.append(path)
        told = bool(changed) and running(root)
        if told:
            for call in calls:
                _systemctl(*call)
    except BaseException as error:
        for path in reversed(done):
            with suppress(OSError):
                _put(_inside(root, path), before[path])
        if isinstance(error, OSError):
            raise _refused(error) from error
        raise
    return Done(tuple(_inside(root, path) for path in changed), told)


def _held(path: Path) -> Content:
    if path.is_symlink():
        return path.readlink()
    # What is no text must come back as it was, too.
    with suppress(FileNotFoundError):
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    return None


def _put(path: Path, content: Content) -> None:
    """Make a path hold something, by one rename: a reader never sees half of it."""
    if content is None:
        path.unlink(missing_ok=True)
        if path.parent.suffix == ".wants":
            with suppress(OSError):
                path.parent.rmdir()  # if it is empty
        return
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    # systemd reads nothing that ends like this.
    beside = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        if isinstance(content, Path):
            beside.symlink_to(content)
        else:
            with open(beside, "x", encoding="utf-8", errors="surrogateescape") as file:
                file.write(content)
                file.flush()
                os.fchmod(file.fileno(), 0o644)
                os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException as error:
        with suppress(OSError):
            beside.unlink()
        if isinstance(error, OSError):
            error.filename = path  # what the user knows of
        raise


def _refuse_foreign(path: Path, held: Content) -> None:
    is_link = path.parent.suffix == ".wants"
    if held is None or (is_link and isinstance(held, Path)):
        return
    if held == Path("/dev/null"):
        raise MachineError(f"{path} is masked", f"`systemctl unmask {path.name}` first")
    if not isinstance(held, Path) and not is_link:
        head, _, rest = held.partition("\n")
        signed = _HEAD.match(head)
        if signed and signed[1] == _digest(rest):
            return
        if signed:
            raise MachineError(
                f"{path} was edited since itmc wrote it",
                f"move the changes into a drop-in (`systemctl edit {path.name}`) and say --force",
            )
    raise MachineError(f"{path} was not written by itmc", "with --force it goes all the same")


def _signed(text: str) -> str:
    head = f"# Written by `itmc install-service`, sha256 {_digest(text)}"
    return f"{head}\n{text}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _quoted(path: Path) -> str:
    """A path as the first word of systemd's command lines; there `$` stands for itself."""
    text = str(path).replace("%", "%%")
    return f'"{text}"' if " " in text else text


def _own() -> Path:
    """The itmc that runs: as it was called, else the one beside its Python, else of the PATH."""
    called = shutil.which(sys.argv[0])
    beside = Path(sys.executable).with_name("itmc")
    if called and Path(called).name == "itmc":
        return Path(called).absolute()
    if beside.is_file():
        return beside
    on_path = shutil.which("itmc")
    if on_path is None:
        raise UsageError("there is no itmc here to start", "--itmc PATH names one")
    return Path(on_path).absolute()


def _interpreter(script: Path) -> Path | None:
    """What runs a script, by its first line."""
    with open(script, "rb") as file:
        first = file.readline(4096)
    words = first[2:].decode("utf-8", "surrogateescape").split() if first[:2] == b"#!" else []
    return Path(words[0]) if words and words[0].startswith("/") else None


def _at_home(place: Path) -> bool:
    return any(place.is_relative_to(home) for home in _HOMES)


def _below(root: Path, path: Path) -> Path:
    """Where a path of a machine lies whose root is here `root`; links are followed."""
    if root == Path("/"):
        return Path(os.path.realpath(path))
    found = root / path.relative_to("/")
    for _ in range(40):  # as the kernel does
        if not found.is_symlink():
            break
        target = found.readlink()
        found = root / target.relative_to("/") if target.is_absolute() else found.parent / target
    return found


def _inside(root: Path, path: Path) -> Path:
    """A path below a root, to be written. Raises `MachineError` if a link leads out of there."""
    place = root / path.relative_to("/")
    if not place.parent.resolve().is_relative_to(root.resolve()):
        raise MachineError(f"{place.parent} leads out of {root}", "a link there is absolute")
    return place


def _open_to_root(about: os.stat_result) -> bool:
    """Whether root may use a file or enter a folder by its mode alone."""
    shift = 6 if about.st_uid == 0 else 3 if about.st_gid == 0 else 0
    return bool(about.st_mode >> shift & (0o1 if stat.S_ISDIR(about.st_mode) else 0o4))


def _systemctl(*arguments: str) -> None:
    """Raises `MachineError` if systemd cannot be asked or refuses, not for units that it lacks."""
    command = " ".join(("systemctl", *arguments))
    try:
        done = subprocess.run(
            ["systemctl", *arguments], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MachineError(f"`{command}` failed: {error}", "nothing was changed") from error
    if done.returncode not in (0, _NOT_LOADED):
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[0]
        raise MachineError(f"`{command}` failed: {reason}", "nothing was changed")


def _refused(error: OSError) -> MachineError:
    place = error.filename or FOLDER
    return MachineError(
        f"{place}: {error.strerror}",
        "run it as root on a writable /etc; --root DIR writes elsewhere, --print only shows",
    )
