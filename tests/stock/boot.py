"""Tests before Debian 12's own kernel, in an emulated machine: `make test-stock`.

The kernel is the newest of Debian's 6.1 packages, unpacked into `.stock/`. virtme-ng boots
it under qemu, without KVM, over this machine's own files, which it can only read; what the
tests write stays in the emulated memory. `inside.sh` runs pytest there and leaves its
output and its exit status in `.stock/exchange/`, where they are read from here.

Emulated code is about ten times as slow, so the tests wait ten times as long
(`ITM_PATIENCE`, tests/support/commands.py). Nothing may be skipped: this kernel has all
that itm uses. Arguments are pytest's, in place of `TESTS`. In the environment:
`STOCK_LIMIT` is the most seconds that the machine may run (3600).
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
STOCK = ROOT / ".stock"
EXCHANGE = STOCK / "exchange"
CONSOLE = STOCK / "console.log"
VIRTME = "virtme-ng==1.42"
# Those that load policies, change them, and give packets to Python.
TESTS = (
    "tests/kernel/test_keeping.py",
    "tests/kernel/test_apply.py",
    "tests/kernel/test_confirm.py",
    "tests/kernel/test_generations.py",
    "tests/kernel/test_switch.py",
    "tests/kernel/test_queues.py",
    "tests/kernel/test_serving.py",
    "tests/kernel/test_libitm.py",
    "tests/kernel/test_encapsulation.py",
    "tests/kernel/test_tunnels.py",
    "tests/test_cases.py::test_nft_check",
    "tests/test_cases.py::test_kernel",
)
CPUS = min(4, os.cpu_count() or 1)
PACKAGE = r"linux-image-(6\.1\.0-[0-9]+-amd64)"


class NotRunError(Exception):
    """No test was run, and why."""


def main(arguments: list[str]) -> int:
    try:
        kernel = unpacked_kernel()
        started = time.monotonic()
        status = boot(kernel, arguments or [test for test in TESTS if _there(test)])
    except (NotRunError, subprocess.CalledProcessError) as error:
        print(f"test-stock: {error}", file=sys.stderr)
        return 1
    print(f"Linux {kernel.name}, emulated, {time.monotonic() - started:.0f} s", flush=True)
    skipped = skips(EXCHANGE / "junit.xml")
    for test, reason in skipped:
        print(f"skipped, but this kernel must have it: {test}: {reason}", file=sys.stderr)
    return status or bool(skipped)


def _there(test: str) -> bool:
    return (ROOT / test.partition("::")[0]).exists()


def unpacked_kernel() -> Path:
    """The folder of the newest 6.1 kernel that apt knows, with `boot` and `lib/modules`."""
    STOCK.mkdir(exist_ok=True)
    name = _newest()
    if name is None:  # no package lists yet, as in a fresh container
        _call("apt-get", "update", "-qq")
        name = _newest()
    if name is None:
        raise NotRunError("apt knows no package linux-image-6.1.0-*-amd64: is this Debian 12?")
    folder = STOCK / name
    if not folder.exists():
        package = f"linux-image-{name}"
        print(f"getting {package}", flush=True)
        # apt's own user may not write into the checkout.
        download = ("apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", package)
        try:
            _call(*download)
        except subprocess.CalledProcessError:  # the lists are older than the archive
            _call("apt-get", "update", "-qq")
            _call(*download)
        (archive,) = STOCK.glob(f"{package}_*.deb")
        unfinished = STOCK / f"{name}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        _call("dpkg-deb", "-x", str(archive), str(unfinished))
        _call("depmod", "-b", str(unfinished), name)
        archive.unlink()
        unfinished.rename(folder)
    return folder


def _newest() -> str | None:
    listed = subprocess.run(
        ["apt-cache", "search", "--names-only", f"^{PACKAGE}$"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    names = re.findall(rf"^{PACKAGE} ", listed, re.MULTILINE)
    return max(names, key=lambda name: int(name.split("-")[1]), default=None)


def virtme() -> Path:
    """The folder of virtme-ng's programs, installed into a virtual environment of its own."""
    place = STOCK / VIRTME
    try:
        subprocess.run([place / "bin/vng", "--version"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # not yet, or the checkout has moved
        _call(sys.executable, "-m", "venv", "--clear", str(place))
        _call(str(place / "bin/pip"), "install", "--quiet", VIRTME)
    return place / "bin"


def _call(*words: str) -> None:
    subprocess.run(words, cwd=STOCK, check=True)


def boot(kernel: Path, arguments: list[str]) -> int:
    """Run pytest in the machine, print what it says; its exit status."""
    programs = virtme()
    shutil.rmtree(EXCHANGE, ignore_errors=True)
    EXCHANGE.mkdir()
    options = [
        "--quiet", "--color=no", "--numprocesses", str(CPUS), "--dist=worksteal",
        "--durations=10", "--junitxml=/run/exchange/junit.xml",
    ]  # fmt: skip
    (EXCHANGE / "arguments").write_text("\n".join([*options, *arguments]) + "\n")
    output, status = EXCHANGE / "output", EXCHANGE / "status"
    output.touch()
    # virtme-ng's own view of the files is uncached and has memory over some folders.
    inside = Path("/run/host", *Path(__file__).with_name("inside.sh").parts[1:])
    script = (
        "mkdir -p /run/host && mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=512000,"
        f"cache=loose host /run/host && bash {shlex.quote(str(inside))} "
        f"{shlex.quote(str(ROOT))} {shlex.quote(str(kernel / 'lib/modules'))}"
    )
    command = [
        "vng", "--disable-kvm", "--verbose", "--user", "root",
        "--cpus", str(CPUS), "--memory", "4G",
        f"--qemu-opts={_shared('/', 'host', ',readonly=on')}",
        f"--qemu-opts={_shared(str(EXCHANGE), 'exchange')}",
        "--run", str(kernel / f"boot/vmlinuz-{kernel.name}"), "--", script,
    ]  # fmt: skip
    limit = float(os.environ.get("STOCK_LIMIT", "3600"))
    with CONSOLE.open("wb") as console, output.open(errors="replace") as said:
        machine = subprocess.Popen(
            command, cwd="/", stdin=subprocess.DEVNULL, stdout=console, stderr=console,
            start_new_session=True, env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"},
        )  # fmt: skip
        deadline = time.monotonic() + limit
        try:
            while machine.poll() is None and time.monotonic() < deadline:
                time.sleep(0.5)
                print(said.read(), end="", flush=True)
        finally:
            overdue = machine.poll() is None
            if overdue:
                os.killpg(machine.pid, signal.SIGKILL)
                machine.wait()
        print(said.read(), end="", flush=True)
    if overdue:
        raise NotRunError(f"the machine was stopped after {limit:.0f} s, with the tests unfinished")
    if not status.exists() or not status.read_text().strip():
        last = "".join(CONSOLE.read_text(errors="replace").splitlines(keepends=True)[-20:])
        raise NotRunError(f"the machine ended before the tests did; it said last:\n{last}")
    return int(status.read_text())


def _shared(folder: str, name: str, how: str = "") -> str:
    """qemu's options for a folder that the machine may mount by this name."""
    path = shlex.quote(folder.replace(",", ",,"))
    return (
        f"-fsdev local,id={name},path={path},security_model=none,multidevs=remap{how} "
        f"-device virtio-9p-pci,fsdev={name},mount_tag={name}"
    )


def skips(report: Path) -> list[tuple[str, str]]:
    """The tests that were skipped, and why, from pytest's report; none if there is no report."""
    if not report.exists():  # wrong arguments
        return []
    return sorted(
        (f"{case.get('classname')}.{case.get('name')}", skipped.get("message", ""))
        for case in ElementTree.parse(report).iter("testcase")
        for skipped in case.iter("skipped")
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
