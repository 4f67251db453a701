"""Tests before Debian 12's own kernel, in emulated machines: `make test-stock`.

The kernel is the newest of Debian's 6.1 packages, unpacked into `.stock/`. virtme-ng boots
it under qemu, without KVM, over this machine's own files, which it can only read; what the
tests write stays in the emulated memory. `inside.sh` runs pytest there and leaves its
output and its exit status in a folder that is shared, where they are read from here.

There is a machine for each CPU, with one CPU and its share of the tests (`share.py`). A
machine with several hangs: the kernel patches its own code (static keys) while another CPU
runs it, and that one goes on for ever with the breakpoint that qemu 7.2 had translated.

Emulated code is about ten times as slow, so the tests wait ten times as long
(`ITM_PATIENCE`, tests/support/commands.py). A machine's clock counts instructions, one a
nanosecond (qemu's `-icount`), and real time only while it idles: so what else runs here
does not make anything in there late. Nothing may be skipped: this kernel has all
that itm uses. Arguments are pytest's, in place of `TESTS`. In the environment:
`STOCK_LIMIT` is the most seconds that the machines may run (7200).
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
STOCK = ROOT / ".stock"
VIRTME = "virtme-ng==1.42"
# Those that load policies and change them (the life cycle), give packets to Python, encapsulate. The
# cases, and what is learned (`test_keeping`), take half an hour more: `TESTS="…"` runs them.
TESTS = (
    "tests/kernel/test_apply.py",
    "tests/kernel/test_confirm.py",
    "tests/kernel/test_generations.py",
    "tests/kernel/test_switch.py",
    "tests/kernel/test_queues.py",
    "tests/kernel/test_serving.py",
    "tests/kernel/test_libitm.py",
    "tests/kernel/test_encapsulation.py",
    "tests/kernel/test_tunnels.py",
)
CPUS = min(os.cpu_count() or 1, 8)  # 2 GB of memory each, at most
OPTIONS = (
    "--verbose", "--color=no", "--tb=short", "--durations=5", "--junitxml=/run/exchange/junit.xml",
    "-p", "no:xdist", "-p", "tests.stock.share",
    # A test that hangs is told by where it does.
    "-o", "faulthandler_timeout=900",
)  # fmt: skip
# What may come of a test, and how pytest's report has it; nothing there is a success.
OUTCOMES = {"failed": "failure", "in error": "error", "skipped": "skipped", "passed": ""}
NOTHING_TO_DO = 5  # pytest's exit status for no tests
PACKAGE = r"linux-image-(6\.1\.0-[0-9]+-amd64)"


class NotRunError(Exception):
    """No test was run, and why."""


def main(arguments: list[str]) -> int:
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # ends machines
    try:
        kernel = unpacked_kernel()
        virtme()
        started = time.monotonic()
        machines = run(kernel, arguments or [test for test in TESTS if _there(test)])
        codes = {one.status() for one in machines} - {NOTHING_TO_DO}
    except (NotRunError, subprocess.CalledProcessError) as error:
        print(f"test-stock: {error}", file=sys.stderr)
        return 1
    counts = Counter[str]()
    skipped = []
    for one in machines:
        for test, outcome, reason in outcomes(one.report):
            counts[outcome] += 1
            skipped += [f"{test}: {reason}"] if outcome == "skipped" else []
    told = ", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES if counts[outcome])
    print(f"Linux {kernel.name}, emulated: {told or 'no test'}, "
          f"in {time.monotonic() - started:.0f} s", flush=True)  # fmt: skip
    for test in skipped:
        print(f"skipped, but this kernel has all that is needed: {test}", file=sys.stderr)
    return max(codes, default=NOTHING_TO_DO) or int(bool(skipped))


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


class Machine:
    """An emulated machine that runs its share of the tests; `with` ends it in any case."""

    def __init__(self, kernel: Path, number: int, machines: int, arguments: list[str]) -> None:
        self.name = str(number + 1)
        folder = STOCK / "machines" / self.name
        folder.mkdir(parents=True)
        self._console = folder / "console.log"
        self._exchange = folder / "exchange"
        self._exchange.mkdir()
        self.report = self._exchange / "junit.xml"
        (self._exchange / "share").write_text(f"{number}/{machines}\n")
        (self._exchange / "arguments").write_text("\n".join([*OPTIONS, *arguments]) + "\n")
        (self._exchange / "output").touch()
        self._output = (self._exchange / "output").open(errors="replace")
        self._line = ""
        programs = virtme()
        with self._console.open("wb") as console:
            self._process = subprocess.Popen(
                self._command(kernel), cwd="/", start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=console, stderr=console,
                env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"},
            )  # fmt: skip

    def _command(self, kernel: Path) -> list[str]:
        # virtme-ng's own view of the files is uncached and has memory over some folders.
        inside = Path("/run/host", *Path(__file__).with_name("inside.sh").parts[1:])
        script = (
            "mkdir -p /run/host && mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=512000,"
            f"cache=loose host /run/host && bash {shlex.quote(str(inside))} "
            f"{shlex.quote(str(ROOT))} {shlex.quote(str(kernel / 'lib/modules'))}"
        )
        return [
            "vng", "--disable-kvm", "--verbose", "--user", "root", "--cpus", "1",
            "--memory", "2G",
            "--qemu-opts=-icount shift=0,sleep=on",
            f"--qemu-opts={_shared('/', 'host', ',readonly=on')}",
            f"--qemu-opts={_shared(str(self._exchange), 'exchange')}",
            "--run", str(kernel / f"boot/vmlinuz-{kernel.name}"), "--", script,
        ]  # fmt: skip

    def __enter__(self) -> "Machine":
        return self

    def __exit__(self, *_: object) -> None:
        if self.running:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._output.close()

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def tell(self, all_of_it: bool = False) -> None:
        """Print the lines that pytest has written since."""
        *lines, self._line = (self._line + self._output.read()).split("\n")
        if all_of_it and self._line:
            lines.append(self._line)
        for line in lines:
            print(f"{self.name}| {line}", flush=True)

    def status(self) -> int:
        """pytest's exit status, once it is not `running`."""
        path = self._exchange / "status"
        if not path.exists() or not path.read_text().strip():
            last = "".join(self._console.read_text(errors="replace").splitlines(True)[-20:])
            raise NotRunError(f"machine {self.name} ended before its tests did; it said:\n{last}")
        return int(path.read_text())


def run(kernel: Path, arguments: list[str]) -> list[Machine]:
    """The machines, when all have ended."""
    shutil.rmtree(STOCK / "machines", ignore_errors=True)
    limit = float(os.environ.get("STOCK_LIMIT", "7200"))
    deadline = time.monotonic() + limit
    with ExitStack() as stack:
        machines = [
            stack.enter_context(Machine(kernel, number, CPUS, arguments)) for number in range(CPUS)
        ]
        while time.monotonic() < deadline and any(one.running for one in machines):
            time.sleep(0.5)
            for one in machines:
                one.tell()
        late = [one.name for one in machines if one.running]
        for one in machines:
            one.tell(all_of_it=True)
    if late:
        raise NotRunError(f"stopped after {limit:.0f} s, with tests unfinished: {', '.join(late)}")
    return machines


def _shared(folder: str, name: str, how: str = "") -> str:
    """qemu's options for a folder that the machine may mount by this name."""
    path = shlex.quote(folder.replace(",", ",,"))
    return (
        f"-fsdev local,id={name},path={path},security_model=none,multidevs=remap{how} "
        f"-device virtio-9p-pci,fsdev={name},mount_tag={name}"
    )


def outcomes(report: Path) -> Iterator[tuple[str, str, str]]:
    """Each test, what came of it, and why; none if there is no report, as of wrong arguments."""
    if report.exists():
        for case in ElementTree.parse(report).iter("testcase"):
            name = f"{case.get('classname')}.{case.get('name')}"
            for outcome, tag in OUTCOMES.items():
                found = case.find(tag) if tag else None
                if found is not None or not tag:
                    yield name, outcome, "" if found is None else found.get("message", "")
                    break


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
