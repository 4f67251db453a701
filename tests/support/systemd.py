"""A real systemd, to see units at work: PID 1 of namespaces that end with it.

It has this machine's files read-only, its own /dev, /proc, /run, /tmp and /var/lib, an
empty network, and a branch of the cgroups. Capabilities that reach the machine itself
(modules, clock, reboot) are gone. It starts one unit, a shell script that may call
`systemctl`, and is killed when that has ended; the kernel then ends all the rest.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_SYSTEMD: Final = Path("/lib/systemd/systemd")
_LIMIT: Final = 60.0  # seconds
_CHECKOUT: Final = Path(__file__).parents[2]
# Python and an itmc, as the story's units see them.
PYTHON: Final = f"/media/bin/{Path(sys.executable).name}"
ITMC: Final = f"""\
#!{PYTHON}
import sys
sys.path.insert(0, "/srv")
from runtime.cli.main import main
main()
"""
_STORY: Final = """\
[Unit]
DefaultDependencies=no
[Service]
Type=oneshot
ExecStart=/bin/sh -c '/bin/sh -eu /mnt/story; echo $? >/mnt/ending; mv /mnt/ending /mnt/ended'
StandardOutput=append:/mnt/output
StandardError=append:/mnt/output
"""
# $1 is bound to /etc/systemd/system, $2 to /mnt, our checkout to /srv and Python to /media:
# wherever they are, units may hide that place.
_SETUP: Final = """\
mount --bind "$1" /etc/systemd/system
mount --bind "$2" /mnt
mount --bind "$3" /srv
mount --bind "$4" /media
for folder in /tmp /var/tmp /var/lib /run; do mount -t tmpfs -o mode=755 tmpfs $folder; done
chmod 1777 /tmp /var/tmp
mkdir /run/dev
mount -t tmpfs -o mode=755 tmpfs /run/dev
for device in null zero full random urandom tty; do
  touch /run/dev/$device
  mount --bind /dev/$device /run/dev/$device
done
mkdir /run/dev/pts /run/dev/shm
mount -t devpts -o newinstance,ptmxmode=0666 devpts /run/dev/pts
ln -s pts/ptmx /run/dev/ptmx
ln -s /proc/self/fd /run/dev/fd
touch /run/dev/console /mnt/console
mount --bind /mnt/console /run/dev/console
mount --move /run/dev /dev
mount -t proc proc /proc
mount --bind /proc/sys /proc/sys
mount -o remount,bind,ro /proc/sys
mount -t sysfs -o ro sysfs /sys
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -o remount,bind,ro /
exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin container=itm-tests \\
  SYSTEMD_GENERATOR_PATH=/dev/shm SYSTEMD_ENVIRONMENT_GENERATOR_PATH=/dev/shm \\
  setpriv --bounding-set \\
  -sys_module,-sys_time,-sys_boot,-sys_rawio,-syslog,-wake_alarm,-bpf,-perfmon,-mac_admin \\
  /lib/systemd/systemd --unit=story.service --log-target=console
"""


class NoSystemdError(Exception):
    """This machine cannot start one; the message says what is missing."""


def run(units: Path, shared: Path, story: str) -> str:
    """Start a systemd whose /etc/systemd/system is `units`; what the story printed.

    The story is a shell script that ends at the first error; `shared` is its /mnt.
    Raises `NoSystemdError`, and `AssertionError` if the story fails.
    """
    if not _SYSTEMD.exists() or shutil.which("systemctl") is None:
        raise NoSystemdError("systemd is not installed")
    (units / "story.service").write_text(_STORY)
    (shared / "story").write_text(story)
    output, ended = shared / "output", shared / "ended"
    with _cgroup() as cgroup:
        unshare = "unshare --mount --pid --cgroup --uts --ipc --net --fork --kill-child"
        enter = f'echo $$ >{cgroup}/cgroup.procs; exec {unshare} sh -euc "$0" setup "$@"'
        with open(shared / "setup", "w") as messages:
            process = subprocess.Popen(
                ["sh", "-euc", enter, _SETUP, str(units), str(shared),
                 str(_CHECKOUT), sys.prefix],
                stdin=subprocess.DEVNULL, stdout=messages, stderr=messages,
            )  # fmt: skip
            deadline = time.monotonic() + _LIMIT
            while not ended.exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            process.kill()
            process.wait()
    said = output.read_text() if output.exists() else ""
    if not (shared / "console").exists():
        raise NoSystemdError((shared / "setup").read_text())
    console = (shared / "console").read_text()
    assert ended.exists(), f"not ended: {said}\n{console}\n{(shared / 'setup').read_text()}"
    assert ended.read_text() == "0\n", f"{said}\n{console}"
    return said


@contextmanager
def _cgroup() -> Iterator[Path]:
    """A branch of the cgroups for one process and what it starts."""
    mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    tops = [Path(words[4]) for words in mounts if words[words.index("-") + 1] == "cgroup2"]
    if not tops:
        raise NoSystemdError("no cgroup2 is mounted")
    made = tops[0] / f"itm-tests-{os.getpid()}"
    try:
        made.mkdir()
    except OSError as error:
        raise NoSystemdError(str(error)) from error
    try:
        yield made
    finally:
        deadline = time.monotonic() + _LIMIT
        for folder, _, _ in os.walk(made, topdown=False):
            while True:
                try:
                    os.rmdir(folder)
                    break
                except OSError:  # until the kernel has ended the last process in it
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.02)
