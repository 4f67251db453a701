"""The canonical form: a second run changes nothing, and the first one changes only the layout."""

import dataclasses
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from itmlang.diagnostics import CompileError, Findings
from itmlang.layout import WIDTH, layout
from itmlang.parser import parse, pieces
from itmlang.source import Source, Span

ROOT = Path(__file__).parents[1]
ITMC = [sys.executable, "-c", "from runtime.cli.main import main; main()"]
LIBRARY = sorted(ROOT.glob("policies/*.itm"))

# Every construct of the language, written carelessly; what comes out is below.
CARELESS = """

# head

include "lib.itm" include   "b;{.itm"   # two
set bad:address={10.0.0.1,   # one
  10.0.0.0/8,fd00::1,


  # others
    192.0.2.0 - 192.0.2.9 , };
set names : interface from "x"
set seen: address timeout 1h max 10
use p(a=5,b={1,2}) as q { at forward;priority - 5 }
use p( a=5,
 b={1,2} )


policy\tx ( a : port=80-90 within 1 - 100,b:packets = a + 1 - 5 KB){ at ingress "eth0",
  forward; priority 3\t
  # own\t


  ;
  interest{not sport{1-1023};saddr @bad}

  flow f by saddr,sport
     timeout 2m max 65536
  classify { # eol
     short when tcp . flags has fin and (
         dport==80 or
         not(ttl<3
           and random in 1 %))
         or f.packets in a - b
     longer
     when ttl==1 and # why
       ttl == 2
     c when saddr in {
        10.0.0.1, 10.0.0.2 } and
        dport == 3
     # last

  }
  log{sample 1 in 1000 group 3; record "a # b" at most 10 /s}
  process {
     short { limit 20mbit burst 64KB per f else { drop }; set dscp ef } # c
     longer { accept }  # d

     c {
       drop }
     other { }
     o {   # nothing
     }
     limited { limit 500packets/s else { set mark 1 set tos minimize-delay set dscp ef accept drop drop } }
     handled { set dscp ef call"site:seen"  call
       "site:first" once per
       connection }
     inside { encapsulate to 192.0.2.1 from
       192.0.2.2 }  outside { decapsulate }
  }
  update{add saddr to @seen for 1h when dport==22; remove saddr from @seen
    when ttl == 3 }
  run kernel fail open queues 4 length 100
     buffer 1MB copy 200 bytes from 7 }
test "x" { policy x(threshold=2); path in
 wait 5s
 send 3 tcp 10.0.0.1:1000->10.0.0.2:80 expect class short tos 0x10
 send 1 tcp [fd00::1]:1000 -> fd00::2 :80 flags syn,ack expect class x . long
 send udp 10.0.0.1 : 5 -> 10.0.0.2:53 expect untouched }
# end"""
CANONICAL = """\
# head

include "lib.itm"
include "b;{.itm"  # two
set bad: address = {
    10.0.0.1,  # one
    10.0.0.0/8, fd00::1,

    # others
    192.0.2.0-192.0.2.9,
}
set names: interface from "x"
set seen: address timeout 1h max 10
use p(a = 5, b = { 1, 2 }) as q { at forward  priority -5 }
use p(
    a = 5,
    b = { 1, 2 }
)

policy x(a: port = 80-90 within 1-100, b: packets = a + 1 - 5 KB) {
    at ingress "eth0",
        forward
    priority 3
    # own

    interest { not sport { 1-1023 }  saddr @bad }

    flow f by saddr, sport
        timeout 2m max 65536
    classify {  # eol
        short when tcp.flags has fin and (dport == 80
                                       or not (ttl < 3
                                           and random in 1%))
                or f.packets in a - b
        longer
            when ttl == 1
             and  # why
            ttl == 2
        c when saddr in {
            10.0.0.1, 10.0.0.2
        }
           and dport == 3
        # last
    }
    log { sample 1 in 1000 group 3  record "a # b" at most 10/s }
    process {
        short  { limit 20 mbit burst 64 KB per f else { drop }  set dscp ef }  # c
        longer { accept }                                                      # d

        c {
            drop
        }
        other { }
        o {  # nothing
        }
        limited {
            limit 500 packets/s else {
                set mark 1
                set tos minimize-delay
                set dscp ef
                accept
                drop
                drop
            }
        }
        handled {
            set dscp ef
            call "site:seen"
            call "site:first" once per connection
        }
        inside {
            encapsulate to 192.0.2.1 from 192.0.2.2
        }
        outside { decapsulate }
    }
    update {
        add saddr to @seen for 1h when dport == 22
        remove saddr from @seen
            when ttl == 3
    }
    run kernel
    fail open
    queues 4 length 100 buffer 1 MB copy 200 bytes from 7
}
test "x" {
    policy x(threshold = 2)
    path in
    wait 5s
    send 3 tcp 10.0.0.1:1000 -> 10.0.0.2:80                 expect class short tos 0x10
    send 1 tcp [fd00::1]:1000 -> fd00::2 :80 flags syn, ack expect class x.long
    send udp 10.0.0.1:5 -> 10.0.0.2:53                      expect untouched
}
# end
"""


def seeds() -> dict[str, str]:
    """All the policies we have that can be parsed."""
    found = {path.stem: path.read_text() for path in LIBRARY}
    for path in sorted(ROOT.glob("tests/errors/*.itm")):
        found[f"errors/{path.stem}"] = path.read_text()
    for path in sorted(ROOT.glob("tests/cases/**/*.case")):
        sections = re.split(r"^--- .*\n", path.read_text(), flags=re.MULTILINE)
        found[str(path.relative_to(ROOT / "tests"))] = sections[1]
    found["careless"] = CARELESS
    return {name: text for name, text in found.items() if tree(text) is not None}


def bare(node: Any) -> Any:
    """A syntax tree without its places."""
    if isinstance(node, tuple):
        return tuple(map(bare, node))
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        values = [getattr(node, field.name) for field in dataclasses.fields(node)]
        return (type(node), *(bare(v) for v in values if not isinstance(v, Span | Source)))
    return node


def tree(text: str) -> Any:
    findings = Findings()
    try:
        file = parse(Source("text.itm", text), findings)
    except CompileError:
        return None
    return None if findings.failed else bare(file.items)


def words(text: str) -> list[str]:
    """What is written, comments included, in order."""
    position, found = 0, []
    for piece in pieces(Source("text.itm", text), Findings()):
        found += re.findall(r"#[^\n]*", text[position : piece.start])
        found.append(piece.text)
        position = piece.end
    found += re.findall(r"#[^\n]*", text[position:])
    return [word.rstrip() if word.startswith("#") else word for word in found]


def formatted(text: str) -> str:
    """The canonical form, after all that must hold of it has been checked."""
    result = layout(Source("text.itm", text))
    assert words(result) == words(text)
    assert tree(result) == tree(text)
    assert layout(Source("text.itm", result)) == result
    assert result == "" or (result.endswith("\n") and not result.endswith("\n\n"))
    assert "\n\n\n" not in result
    for line in result.split("\n"):
        code = line.partition("#")[0]
        assert line == line.rstrip()
        assert "\t" not in code and "\r" not in code
    return result


SEEDS = seeds()


@pytest.mark.parametrize("name", SEEDS)
def test_what_must_hold_of_every_policy(name: str) -> None:
    formatted(SEEDS[name])


def test_most_policies_are_among_them() -> None:
    assert len(SEEDS) > 150


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.stem)
def test_the_library_is_canonical(path: Path) -> None:
    assert formatted(path.read_text()) == path.read_text()


def test_every_construct() -> None:
    assert formatted(CARELESS) == CANONICAL


BLANKS = (" ", "  ", "\t", "\n", "\n\n", "\n\n\n", "\r\n", ";", " ; ", "\n;\n", "\f")
NOTES = ("# note\n", "  # note \n", "\n# note\n", "\n\n# a\n\n\n# b }\n\n", "#\n")


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(SEEDS)), st.data())
def test_however_it_was_written(name: str, draw: st.DataObject) -> None:
    """The words of a policy with any blanks, line breaks and comments between them."""
    text = SEEDS[name]
    found = list(pieces(Source("text.itm", text), Findings()))
    assume(found)
    ends = [0, *(piece.end for piece in found)]
    gaps = [text[end : piece.start] for end, piece in zip(ends, found, strict=False)]
    first = draw.draw(st.integers(0, len(found) - 1))
    new = draw.draw(st.lists(st.sampled_from((*BLANKS, *BLANKS, *NOTES)), max_size=60))
    gaps[first : first + len(new)] = new[: len(gaps) - first]
    changed = "".join(gap + piece.text for gap, piece in zip(gaps, found, strict=True))
    changed += text[ends[-1] :]
    # A word in the first column may begin an item (`set`, `test`), or no longer.
    assume(tree(changed) is not None)
    formatted(changed)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(SEEDS)), st.data())
def test_pieces_that_need_no_blank(name: str, draw: st.DataObject) -> None:
    """Blanks taken away at random, where that leaves the policy as it is."""
    text = SEEDS[name]
    places = [match.span() for match in re.finditer(r"(?<!\n)[ \n]+", text)]
    chosen = draw.draw(st.lists(st.sampled_from(places), min_size=1, max_size=20, unique=True))
    changed = text
    for start, end in sorted(chosen, reverse=True):
        changed = changed[:start] + draw.draw(st.sampled_from(("", "", " ", "\n"))) + changed[end:]
    assume(tree(changed) is not None)
    formatted(changed)


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("", ""),
        (" \n\t\n;;\n", ""),
        ("\n\n# only\n\n\n\n  # comments\t", "# only\n\n# comments\n"),
        ("policy p { }", "policy p { }\n"),
        ("policy p { at forward }", "policy p {\n    at forward\n}\n"),
        ("policy p {\r\n\tat forward # x\r\n}\r\n", "policy p {\n    at forward  # x\n}\n"),
        ('include "a"include"b"', 'include "a"\ninclude "b"\n'),
        ("policy p { log\n# why\n{ } }", "policy p {\n    log\n        # why\n        { }\n}\n"),
        ("use p ( ) as q {\n}", "use p() as q { }\n"),
        ('set s: address = 10.0.0.1 # é "', 'set s: address = 10.0.0.1  # é "\n'),
        ("set s: port = { a - b, 1 - 2, 1 - a, 1 KB - 2 KB, 1+1-3 }",
         "set s: port = { a - b, 1-2, 1 - a, 1 KB - 2 KB, 1 + 1 - 3 }\n"),
        ("policy p { interest { a in- 3 } }", "policy p {\n    interest { a in- 3 }\n}\n"),
    ],
)  # fmt: skip
def test_forms(text: str, result: str) -> None:
    assert formatted(text) == result


def policy(lines: str) -> str:
    return f"policy p {{\n{lines}}}\n"


def test_a_block_on_one_line_stays_there_if_it_fits() -> None:
    head = "    process { c { limit 10/s else { "
    room = WIDTH - len(head) - len(" } } }")
    fits = policy(head + "x" * room + " } } }\n")
    assert formatted(fits) == fits
    wide = formatted(policy(head + "x" * (room + 1) + " } } }\n"))
    assert wide.split("\n")[1:3] == [
        "    process {",
        "        c { limit 10/s else { " + "x" * (room + 1) + " } }",
    ]


def test_what_does_not_fit_is_not_aligned() -> None:
    text = policy("    process {\n        " + "x" * 85 + " { }\n        y { set dscp ef }\n    }\n")
    assert formatted(text) == text


def test_a_name_of_any_length_costs_little() -> None:
    name = "c" * 1_000_000
    text = policy(f"classify {{ {name} when ttl == 1\n" + "or ttl == 1\n" * 1000 + "}\n"
                  f"process {{ {name} {{ }} # x\n" + "a { } # x\n" * 1000 + "}\n")  # fmt: skip
    assert len(layout(Source("text.itm", text))) < 4_000_000


@pytest.mark.parametrize("text", ["policy p {", "policy p { at }", "}", "policy p { # }", '"'])
def test_what_cannot_be_parsed_is_refused(text: str) -> None:
    with pytest.raises(CompileError):
        layout(Source("text.itm", text))


# The command.

UGLY = "policy p { at forward;classify{a}}\n"
PRETTY = "policy p {\n    at forward\n    classify { a }\n}\n"


def fmt(
    *arguments: str, text: bytes = b"", folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*ITMC, "fmt", *arguments], input=text, capture_output=True, cwd=folder,
        timeout=120, check=False,
    )  # fmt: skip
    assert b"Traceback" not in done.stderr
    assert b"internal error" not in done.stderr
    return subprocess.CompletedProcess(
        done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
    )


def test_files_are_rewritten_and_named(tmp_path: Path) -> None:
    ugly, pretty = tmp_path / "ugly.itm", tmp_path / "pretty.itm"
    ugly.write_text(UGLY)
    pretty.write_text(PRETTY)
    ugly.chmod(0o640)
    before = pretty.stat()
    done = fmt("ugly.itm", "pretty.itm", folder=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ugly.itm: changed\n", "")
    assert ugly.read_text() == PRETTY
    assert stat.S_IMODE(ugly.stat().st_mode) == 0o640
    assert (pretty.stat().st_ino, pretty.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pretty.itm", "ugly.itm"]
    again = fmt("ugly.itm", "pretty.itm", folder=tmp_path)
    assert (again.returncode, again.stdout) == (0, "")


def test_check_only_names_them(tmp_path: Path) -> None:
    (tmp_path / "ugly.itm").write_text(UGLY)
    (tmp_path / "pretty.itm").write_text(PRETTY)
    done = fmt("--check", "ugly.itm", "pretty.itm", folder=tmp_path)
    assert (done.returncode, done.stdout) == (1, "ugly.itm: would change\n")
    assert (tmp_path / "ugly.itm").read_text() == UGLY
    assert fmt("--check", "pretty.itm", folder=tmp_path).returncode == 0


@pytest.mark.parametrize("raw", [PRETTY.replace("\n", "\r\n"), "\ufeff" + PRETTY, PRETTY[:-1]])
def test_line_ends_and_marks_count_as_form(tmp_path: Path, raw: str) -> None:
    file = tmp_path / "a.itm"
    file.write_bytes(raw.encode())
    assert fmt("--check", str(file)).returncode == 1
    assert fmt(str(file)).returncode == 0
    assert file.read_bytes() == PRETTY.encode()


def test_standard_input_goes_to_standard_output() -> None:
    done = fmt("-", text=UGLY.encode())
    assert (done.returncode, done.stdout) == (0, PRETTY)
    assert fmt("-", text=b"").stdout == ""
    done = fmt("--check", "-", text=UGLY.encode())
    assert (done.returncode, done.stdout) == (1, "-: would change\n")
    done = fmt("-", text=b"policy p {")
    assert (done.returncode, done.stdout) == (1, "")


def test_the_file_may_be_left_out(tmp_path: Path) -> None:
    assert fmt(folder=tmp_path).returncode == 2
    (tmp_path / "only.itm").write_text(UGLY)
    assert fmt(folder=tmp_path).stdout == "only.itm: changed\n"


def test_a_bad_file_is_left_alone_and_stops_no_other(tmp_path: Path) -> None:
    bad = {"wrong.itm": b"policy p { at }\n", "latin.itm": b"# \xfc\n", "zero.itm": b"\0"}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "ugly.itm").write_text(UGLY)
    done = fmt(*bad, "ugly.itm", folder=tmp_path)
    assert (done.returncode, done.stdout) == (1, "ugly.itm: changed\n")
    assert "wrong.itm:1:15: error[E001]" in done.stderr
    assert "latin.itm:1:3: error[E005]" in done.stderr
    assert {name: (tmp_path / name).read_bytes() for name in bad} == bad
    (tmp_path / "ugly.itm").write_text(UGLY)
    done = fmt("missing.itm", ".", "wrong.itm", "ugly.itm", folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "ugly.itm: changed\n")


def test_a_link_is_followed_and_a_pipe_refused(tmp_path: Path) -> None:
    real, link, pipe = tmp_path / "real.itm", tmp_path / "link.itm", tmp_path / "pipe"
    real.write_text(UGLY)
    link.symlink_to(real)
    assert fmt(str(link)).returncode == 0
    assert link.is_symlink() and real.read_text() == PRETTY
    os.mkfifo(pipe)
    assert fmt(str(pipe)).returncode == 2


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff.itm")
    (tmp_path / name).write_text(UGLY)
    assert fmt(name, folder=tmp_path).stdout == "?.itm: changed\n"
