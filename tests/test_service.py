"""`itmc install-service`: the units' text before systemd's own tools, and the files it writes."""

import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from runtime import service
from runtime.errors import MachineError, UsageError
from runtime.service import FOLDER, Program
from tests.support.needs import unavailable
from tests.test_cli import itmc

UNIT, RUNTIME = FOLDER / "itm.service", FOLDER / "itm-runtime.service"
LINK = FOLDER / "sysinit.target.wants" / "itm.service"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """The root of another machine, with an itmc."""
    program(tmp_path / "image" / "usr/bin/itmc")
    return tmp_path / "image"


def program(path: Path, text: str = "#!/usr/bin/python3\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def below(root: Path, path: Path) -> Path:
    return root / path.relative_to("/")


def install(root: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return itmc("install-service", "--root", str(root), *options)


def files(root: Path) -> dict[str, str]:
    """All files and links below a root, with what they hold."""
    return {
        str(path.relative_to(root)): os.readlink(path) if path.is_symlink() else path.read_text()
        for path in sorted(root.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def analyzed(*arguments: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("systemd-analyze") is None:
        unavailable(OSError("not installed"), needs="systemd-analyze")
    return subprocess.run(
        ["systemd-analyze", *arguments], capture_output=True, text=True, check=False
    )


# The last ones have in them what systemd gives a meaning to.
PATHS = ("/usr/bin/true", "it mc", "100%n", "$HOME x", "-a;b {}")


@pytest.mark.parametrize("path", PATHS)
def test_systemd_takes_the_units(tmp_path, path):
    there = program(tmp_path / path / "itmc") if path[0] != "/" else Path(path)
    for name, text in service.texts(Program(there, (there,))).items():
        (tmp_path / name).write_text(text)
        done = analyzed("verify", "--man=no", "--recursive-errors=no", str(tmp_path / name))
        assert (done.returncode, done.stdout + done.stderr) == (0, "")
        # It does look: another path is no program.
        (tmp_path / name).write_text(
            text.replace("[Service]\n", "[Service]\nExecStartPre=/no/itmc\n")
        )
        assert "/no/itmc is not executable" in analyzed("verify", str(tmp_path / name)).stderr


@pytest.mark.parametrize("home", ["/usr/bin/itmc", "/root/.local/bin/itmc"])
def test_the_units_are_exposed_below_3(tmp_path, home):
    for name, text in service.texts(Program(Path(home), (Path(home),))).items():
        (tmp_path / name).write_text(text)
        done = analyzed(
            "security", "--offline=true", "--threshold=30", "--no-pager", str(tmp_path / name)
        )
        measured = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
        assert measured is not None, done.stderr
        print(f"{name} of {home}: exposure {measured[1]}")
        assert done.returncode == 0
        assert float(measured[1]) < 3.0


def test_what_is_installed_is_what_is_shown(image):
    shown = install(image, "--itmc", "/usr/bin/itmc", "--print")
    assert (shown.returncode, files(image)) == (0, {"usr/bin/itmc": "#!/usr/bin/python3\n"})
    done = install(image, "--itmc", "/usr/bin/itmc")
    assert done.returncode == 0
    assert f"wrote {below(image, UNIT)}\nwrote {below(image, LINK)}\n" in done.stdout
    assert "systemctl start" not in done.stdout
    texts = [f"# {path}\n{below(image, path).read_text()}" for path in (UNIT, RUNTIME)]
    assert "\n".join(texts) == shown.stdout
    assert "\nExecStart=/usr/bin/itmc boot\n" in texts[0]
    assert "\nExecStart=/usr/bin/itmc serve\n" in texts[1]
    # As `systemctl enable` makes it: seen from the booted machine.
    assert os.readlink(below(image, LINK)) == "/etc/systemd/system/itm.service"
    assert stat.S_IMODE(below(image, UNIT).stat().st_mode) == 0o644


def test_once_more_changes_nothing_and_removing_leaves_nothing(image):
    before = files(image)
    install(image, "--itmc", "/usr/bin/itmc")
    installed, written = files(image), below(image, UNIT).stat().st_mtime_ns
    assert len(installed) == 5
    again = install(image, "--itmc", "/usr/bin/itmc")
    assert again.stdout == "itm.service itm-runtime.service: installed and enabled already\n"
    assert (files(image), below(image, UNIT).stat().st_mtime_ns) == (installed, written)
    # Removed half by hand: installing mends it.
    below(image, LINK).unlink()
    install(image, "--itmc", "/usr/bin/itmc")
    assert files(image) == installed
    gone = install(image, "--remove")
    assert gone.returncode == 0
    assert gone.stdout.endswith("policies that are loaded stay\n")
    assert files(image) == before
    assert not below(image, LINK).parent.exists()
    again = install(image, "--remove")
    assert (again.returncode, again.stdout) == (0, "nothing is installed\n")


def test_another_itmc_replaces_what_is_ours(image):
    program(image / "opt/itmc")
    install(image, "--itmc", "/usr/bin/itmc")
    assert install(image, "--itmc", "/opt/itmc").returncode == 0
    assert "\nExecStart=/opt/itmc boot\n" in below(image, UNIT).read_text()


@pytest.mark.parametrize("held", ["foreign", "edited", "masked"])
@pytest.mark.parametrize("option", ["--itmc=/usr/bin/itmc", "--remove"])
def test_what_is_not_ours_stays_unless_forced(image, held, option):
    unit = below(image, UNIT)
    install(image, "--itmc", "/usr/bin/itmc")
    if held == "foreign":
        unit.write_bytes(b"[Service]\nExecStart=/bin/\xff\n")
    elif held == "edited":
        unit.write_text(unit.read_text().replace("RestartSec=5", "RestartSec=6"))
    else:
        unit.unlink()
        unit.symlink_to("/dev/null")
    before = os.readlink(unit) if held == "masked" else unit.read_bytes()
    done = install(image, option)
    assert (done.returncode, done.stdout) == (3, "")
    message = {"foreign": "was not written by itmc", "edited": "was edited since itmc wrote it",
               "masked": "is masked"}[held]  # fmt: skip
    assert f"itmc: {unit} {message}\n" in done.stderr
    assert (os.readlink(unit) if held == "masked" else unit.read_bytes()) == before
    assert below(image, LINK).is_symlink()
    assert install(image, option, "--force").returncode == 0
    if option == "--remove":
        assert list(files(image)) == ["usr/bin/itmc"]
    else:
        assert not unit.is_symlink()
        assert "\nExecStart=/usr/bin/itmc boot\n" in unit.read_text()


def test_what_cannot_be_written_leaves_all_as_it_was(image):
    below(image, FOLDER).mkdir(parents=True)
    below(image, LINK).parent.write_text("in the way")
    before = files(image)
    done = install(image, "--itmc", "/usr/bin/itmc")
    assert done.returncode == 3
    assert f"itmc: {below(image, LINK).parent}" in done.stderr or str(LINK) in done.stderr
    assert "--print only shows" in done.stderr
    assert files(image) == before


def test_a_refused_change_puts_back_what_was_there(image, monkeypatch):
    program(image / "opt/itmc")
    install(image, "--itmc", "/usr/bin/itmc")
    below(image, LINK).unlink()
    before, put = files(image), service._put

    def full(path: Path, content: service.Content) -> None:
        if path.name == "itm.service" and path.parent.suffix == ".wants" and content is not None:
            raise OSError(28, "No space left on device", str(path))
        put(path, content)

    monkeypatch.setattr(service, "_put", full)
    with pytest.raises(MachineError, match="No space left on device"):
        service.install(service.find("/opt/itmc", image), image)
    assert files(image) == before


def test_systemd_is_told_and_its_refusal_undoes_all(tmp_path, monkeypatch):
    """A stand-in for /etc/systemd/system and for systemctl, as on a machine that runs systemd."""
    folder, log = tmp_path / "system", tmp_path / "log"
    monkeypatch.setattr(service, "FOLDER", folder)
    monkeypatch.setattr(service, "_RUNNING", tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    systemctl = program(tmp_path / "bin/systemctl", f'#!/bin/sh\necho "$@" >>{log}\n')
    mine = Program(Path("/usr/bin/itmc"), (Path("/usr/bin/itmc"),))
    done = service.install(mine, Path("/"))
    assert done.told
    assert done.changed == tuple(
        folder / place / name
        for name in ("itm.service", "itm-runtime.service")
        for place in ("", "sysinit.target.wants")
    )
    assert not service.install(mine, Path("/")).told
    assert log.read_text() == "daemon-reload\n"
    installed = files(folder)
    systemctl.write_text("#!/bin/sh\necho Failed to connect to bus >&2\nexit 1\n")
    with pytest.raises(MachineError, match="`systemctl daemon-reload` failed: Failed to connect"):
        service.remove(Path("/"))
    assert files(folder) == installed
    systemctl.write_text(f'#!/bin/sh\necho "$@" >>{log}\n')
    service.remove(Path("/"))
    assert log.read_text() == "daemon-reload\ndaemon-reload\nstop itm.service itm-runtime.service\n"
    assert files(folder) == {}


def test_a_link_out_of_the_image_is_not_followed(image, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (image / "etc").symlink_to(outside)
    done = install(image, "--itmc", "/usr/bin/itmc")
    assert done.returncode == 3
    assert f"leads out of {image}" in done.stderr
    assert list(outside.iterdir()) == []


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/usr/bin/none", "/usr/bin/none is no program below"),
        ("/etc/text", "/etc/text is no program below"),
        ("/usr/bin", "/usr/bin is no program below"),
        ("bin/itmc", "bin/itmc is no absolute path"),
        ("/tmp/itmc", "itmc needs /tmp/itmc, which is gone at the next boot"),
        ("/opt/of_tmp", "itmc needs /var/tmp/venv/bin/python, which is gone at the next boot"),
        ("/opt/a'b", "a unit cannot name the path"),
        ("/opt/a\nb", "a unit cannot name the path"),
    ],
)
def test_units_start_only_what_is_there_at_boot(image, path, message):
    (image / "etc").mkdir()
    (image / "etc/text").write_text("no program")
    program(image / "tmp/itmc")
    program(image / "opt/of_tmp", "#!/var/tmp/venv/bin/python -I\n")
    done = install(image, "--itmc", path)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"itmc: {message}" in done.stderr
    assert not below(image, UNIT).exists()


def test_links_inside_of_an_image_are_followed_there(image):
    (image / "usr/local/bin").mkdir(parents=True)
    (image / "usr/local/bin/itmc").symlink_to("/usr/bin/itmc")
    assert install(image, "--itmc", "/usr/local/bin/itmc").returncode == 0
    assert "\nExecStart=/usr/local/bin/itmc boot\n" in below(image, UNIT).read_text()


def test_the_images_own_itmc_is_named_as_the_image_sees_it(image, monkeypatch):
    monkeypatch.setattr("sys.argv", [str(image / "usr/bin/itmc"), "install-service"])
    assert service.find(None, image).path == Path("/usr/bin/itmc")


def test_a_home_is_opened_for_reading_and_said(image):
    program(image / "home/ada/bin/itmc")
    done = install(image, "--itmc", "/home/ada/bin/itmc")
    assert done.returncode == 0
    assert "itmc needs /home/ada/bin/itmc, in a home folder" in done.stderr
    assert "\nProtectHome=read-only\n" in below(image, UNIT).read_text()
    assert "home" not in install(image, "--itmc", "/usr/bin/itmc").stderr
    assert "\nProtectHome=yes\n" in below(image, UNIT).read_text()


def test_what_others_can_change_is_warned_of(image):
    if os.geteuid() != 0:
        unavailable(PermissionError("chown"), needs="root")
    for folder in (image, image / "usr", image / "usr/bin"):
        folder.chmod(0o755)
    assert install(image, "--itmc", "/usr/bin/itmc").stderr == ""
    (image / "usr/bin").chmod(0o777)
    assert "itmc needs /usr/bin, which others than root can change" in install(
        image, "--itmc", "/usr/bin/itmc").stderr  # fmt: skip
    (image / "usr/bin").chmod(0o755)
    os.chown(image / "usr", 1000, 1000)
    (image / "usr").chmod(0o700)
    said = install(image, "--itmc", "/usr/bin/itmc").stderr
    assert "itmc needs /usr, which others than root can change" in said
    assert "itmc needs /usr, which is closed to root without CAP_DAC_OVERRIDE" in said


def test_options_that_do_not_go_together(image):
    for options in (["--remove", "--print"], ["--remove", "--itmc", "/usr/bin/itmc"]):
        assert install(image, *options).returncode == 2
    assert itmc("install-service", "--root", str(image / "none"), "--print").returncode == 2


def test_no_itmc_anywhere(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["-c"])
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="there is no itmc here to start"):
        service.find(None, Path("/"))
