"""Whatever the text, there is a tree or there are diagnostics, soon.

ITM_FUZZ is how many inputs the seeded search makes; 200 000 is the nightly form, which
runs on all processors.
"""

import os
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from itmlang.diagnostics import MOST_ERRORS, CompileError, Diagnostic, Findings, render
from itmlang.packets import read_packet
from itmlang.pipeline import compile
from itmlang.source import Source
from tests.support.language import Chance, Wants

ROOT = Path(__file__).parents[1]
POLICIES = [path.read_text() for path in sorted(ROOT.glob("policies/*.itm"))]
TOKENS = (
    "policy", "p", "{", "}", "(", ")", "at", "forward", "postrouting", "priority", "-", "3",
    "interest", "not", "saddr", "10.0.0.1", "10.0.0.0/24", "fd00::1", "in", '"eth0"', "flow", "by",
    ",", "timeout", "5s", "max", "classify", "when", "dport", "==", "!=", "<=", "has", "and", "or",
    "tcp.flags", "fin", "f.packets", "packets", "KB", "log", "count", "process", "set", "tos",
    "minimize-delay", "unset", "drop", "run", "fail", ":", "=", "+", "#", "\n", '"', ";", "0x",
    "é", "\0", "99999999999999999999999", "::", "connection", "send", "expect",
    "use", "as", "include", "update", "add", "remove", "@s", "to", "from", "for", "limit", "burst",
    "else", "per", "sample", "1", "record", "most", "reject", "accept", "test", "20 mbit", "10/s",
    "1%", "random", "fragment", "ct.state", "new", "icmp.type", "f.age", "f.rate", "f.connections",
    "ingress", "egress", "within", "class", "untouched", "wait", "path", "mark", "sport", "daddr",
    "call", '"m:f"', "once", "encapsulate", "decapsulate", "queues", "length", "copy", "python",
    "tcp.mss", "1-", "2h", "ttl", "address", "port", "interface", "10.0.0.1:80", "->", "udp", "@",
)  # fmt: skip
OTHERS = (
    'include "other.itm"\nuse size_aware(threshold = 3) as long_ones { priority -3 at forward }',
    'set a: address = { 10.0.0.1, fd00::/64 }\nset b: port from "ports"\n'
    'set c: address timeout 5m max 10\nset d: interface = { "eth*", "lo" }',
    "policy p(rate: rate = 2 mbit, hosts: address = @a within 10.0.0.0/8) { at forward "
    "classify { c when saddr in hosts } process { c { limit rate burst 20 KB else "
    "{ set dscp le limit 5 packets/s } } } update { remove saddr from @c when random < 1% } }",
    "policy s(n: number = 3) { at prerouting classify { a when ttl == 1 b } process { a { set dscp ef "
    'call "m:f" once per connection drop } b { limit 5/s else { call "m.n:f" } encapsulate to '
    "192.0.2.1 from 192.0.2.2 } } queues n length 10 copy 200 bytes from 7 fail closed }",
    'policy q { at ingress "eth0" log { sample 1 in 100 group 3 record "x" at most 3/m } '
    "classify { c when ct.state != { new } or not icmpv6.type in 128-129 } fail closed run kernel }",
    'test "a" { policy p(threshold = 2) send 3 tcp 10.0.0.1:1000 -> 10.0.0.2:80 flags syn,ack '
    "expect class p.c tos 0x10 wait 3s path out send udp [fd00::1]:1 -> [fd00::2]:53 expect drop }",
)
FUZZ = int(os.environ.get("ITM_FUZZ", "400"))


def diagnostics(text: str) -> tuple[Diagnostic, ...]:
    """What the compiler says; anything but diagnostics is a test's failure."""
    try:
        found = compile(Source("text.itm", text)).warnings
    except CompileError as error:
        found = error.diagnostics
        assert any(d.is_error for d in found)
    assert len([d for d in found if d.is_error]) <= MOST_ERRORS + 1
    for one in found:
        assert render(one).isprintable() or "\n" in render(one)
    return found


def errors(text: str) -> list[tuple[int, str]]:
    return [(d.span.line if d.span else 0, d.code) for d in diagnostics(text) if d.is_error]


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(TOKENS), max_size=40))
def test_token_soup(tokens: list[str]) -> None:
    diagnostics(" ".join(tokens))


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80))
def test_any_text(text: str) -> None:
    diagnostics(text)
    diagnostics("policy p { at forward classify { c when " + text)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(POLICIES), st.data())
def test_mutated_policies(policy: str, draw: st.DataObject) -> None:
    for _ in range(draw.draw(st.integers(1, 4))):
        at = draw.draw(st.integers(0, len(policy)))
        end = min(len(policy), at + draw.draw(st.integers(0, 12)))
        policy = policy[:at] + draw.draw(st.sampled_from((*TOKENS, ""))) + policy[end:]
    diagnostics(policy)


def fuzzed(random: Chance) -> str:
    """Token soup, a policy with wounds, or random bytes."""
    kind = random.randrange(10)
    if kind == 0:
        return random.randbytes(random.randrange(200)).decode("utf-8", "replace")
    if kind <= 3:
        return " ".join(random.choices(TOKENS, k=random.randrange(60)))
    if kind <= 5:
        wants = Wants(*(random.some(0.5) for _ in range(4)))
        text = random.file(wants, random.choice((("forward", "postrouting"), ("output",))))
    else:
        text = "\n".join(random.sample(POLICIES + list(OTHERS), random.randint(1, 2)))
    for _ in range(random.randint(1, 5)):
        at = random.randint(0, len(text))
        end = min(len(text), at + random.choice((0, 0, 1, 3, 12, 60)))
        new = random.choice(
            (*TOKENS, "", text[at : at + 40], random.randbytes(3).decode("latin-1"))
        )
        text = text[:at] + new + text[end:]
    return text


def fuzz(seed: int, number: int) -> tuple[int, str]:
    """How many of the inputs compile, and of the first that fails otherwise than it should, why."""
    random = Chance(seed)
    sound = 0
    for _ in range(number):
        text = fuzzed(random)
        start = time.monotonic()
        try:
            sound += not any(d.is_error for d in diagnostics(text))
        except BaseException:
            return sound, f"{text}\n{traceback.format_exc()}"
        if time.monotonic() - start > 20:
            return sound, f"{text}\ntook too long"
    return sound, ""


def test_nothing_but_diagnostics() -> None:
    each = 1000
    if each >= FUZZ:
        results = [fuzz(2003, FUZZ)]
    else:
        with ProcessPoolExecutor() as pool:
            results = list(pool.map(fuzz, range(FUZZ // each), [each] * (FUZZ // each)))
    failed = [problem for _, problem in results if problem]
    assert not failed, f"{len(failed)} searches failed, the first one with\n{failed[0]}"
    print(f"{FUZZ} inputs, {sum(sound for sound, _ in results)} of them compile")


def condition(text: str) -> str:
    return f"policy p {{ at forward classify {{ c when {text} }} }}"


@pytest.mark.parametrize(
    "text",
    [
        "(" * 100_000,
        condition("(" * 100_000 + "dport == 1" + ")" * 100_000),
        condition("not " * 100_000 + "dport == 1"),
        condition("not(" * 1000 + "dport == 1" + ")" * 1000),
        condition("not (dport == 1 and " * 60 + "ttl == 3" + ")" * 60),
        condition(" or ".join(f"dport == {n}" for n in range(20_000))),
        condition(" and ".join(["dport == 1"] * 20_000)),
        condition("dport in { " + ", ".join(str(n) for n in range(0, 65536, 2)) + " }"),
        condition("dport == " + " + ".join(["1"] * 20_000)),
        condition("dport == " + "9" * 100_000),
        condition("dport == 0x" + "f" * 100_000),
        "{" * 100_000,
        "}" * 100_000,
        '"' * 10_001,
        "#" * 100_000,
        "policy " * 10_000,
        "policy p { at forward }\n" * 2_000,
        "policy p { at forward flow f by saddr timeout " + "9" * 5000 + "d log { count f } }",
        f"policy {'p' * 100_000} {{ at forward }}",
    ],
    ids=lambda text: text[:12] + text[-8:] + str(len(text)),
)
def test_what_is_large_or_deep_is_answered_soon(text: str) -> None:
    start = time.monotonic()
    diagnostics(text)
    assert time.monotonic() - start < 20


def test_sixty_levels_are_not_too_deep() -> None:
    assert errors(condition("(" * 60 + "dport == 1" + ")" * 60)) == []
    assert [c for _, c in errors(condition("(" * 70 + "dport == 1" + ")" * 70))] == ["E003"]


# What the words around Python may be called, too.
_WORDS = (
    "call", "once", "connection", "encapsulate", "decapsulate", "queues", "length", "buffer", "copy",
    "python", "kernel", "open", "closed",
)  # fmt: skip
_NAMED = {
    "class": "policy p { at forward classify { a when ttl == 1 WORD when ttl == 2 b when ttl == 3 } "
    'process { a { drop } WORD { accept } b { call "m:f" } } }',
    "class that calls": "policy p { at forward classify { a when ttl == 1 WORD } process { a { "
    'call "m:f" once per connection } WORD { call "m:f" once per connection } } queues 2 }',
    "class in a tunnel": "policy p { at prerouting classify { WORD } process { WORD { encapsulate to "
    "192.0.2.1 from 192.0.2.2 } } queues 2 length 3 buffer 1 MB copy 1 KB from 8 fail closed }",
    "flow": "policy p { at forward flow WORD by saddr classify { c when WORD.packets > 3 } log { "
    'count WORD } process { c { limit 10/s per WORD else { call "m:f" } call "m:g" } } queues 1 }',
    "flow of a limit": "policy p { at forward flow WORD by saddr classify { c } process { c { "
    'limit 10/s per WORD call "m:f" limit 10/s per WORD } } }',
    "number": 'policy p(WORD: number = 3) { at forward classify { c } process { c { call "m:f" } } '
    "priority WORD queues WORD from WORD }",
    "length": 'policy p(WORD: packets = 3) { at forward classify { c } process { c { call "m:f" } } '
    "queues 2 length WORD from 7 }",
    "size": 'policy p(WORD: bytes = 1 MB) { at forward classify { c } process { c { call "m:f" } } '
    "queues 2 buffer WORD length 3 }",
    "address": "policy p(WORD: address = 192.0.2.1) { at prerouting classify { c } process { c { "
    "encapsulate to WORD from 192.0.2.2 } } }",
    "rate": "policy p(WORD: packet_rate = 10/s) { at forward classify { c } process { c { limit WORD "
    'else { call "m:f" } call "m:f" } } }',
    "policy": "policy WORD { at forward classify { c } } use WORD as b",
    "set": "set WORD: address timeout 1m policy x { at forward classify { c when saddr in @WORD } "
    'process { c { call "m:f" } } update { add saddr to @WORD } }',
    "test": 'policy WORD { at forward classify { WORD } } test "x" { policy WORD '
    "send 1 udp 192.0.2.1:1 -> 192.0.2.2:2 expect class WORD.WORD }",
}  # fmt: skip


@pytest.mark.parametrize("place", _NAMED)
@pytest.mark.parametrize("gap", [" ", "\n", " # x\n"])
def test_words_around_python_are_names_like_others(place: str, gap: str) -> None:
    for word in _WORDS:
        text = _NAMED[place].replace("WORD", word).replace(" ", gap)
        assert errors(text) == [], word


def test_all_errors_come_in_one_run() -> None:
    text = """policy p {
    at forwards
    classify { c when colour == 3  d when dport == 70000 }
    process { e { drop } }
}
policy q {
    at forward
    classify { c when == }
}
policy r {
    at forward
    interest { saddr 10.0.0.1/8 }
}
"""
    found = errors(text)
    assert set(found) == {
        (2, "E010"), (3, "E010"), (3, "E023"), (4, "E010"), (8, "E001"), (12, "E024"),
    }  # fmt: skip


def test_a_brace_in_a_comment_or_string_closes_nothing() -> None:
    assert errors('policy p { # }\n at forward interest { in "eth}" } }') == []
    assert errors("# policy x {\npolicy p { at forward }") == []


def test_a_list_may_be_a_parameter() -> None:
    assert errors(
        "policy p(ports: port = { 80, 443 }, n: number = 2) {\n"
        " at forward classify { c when dport in ports and ttl == n } }"
    ) == []  # fmt: skip


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("tcp 10.0.0.1:1 -> 10.0.0.2:2 flags syn,ack tos 0x10 length 100 ttl 3", None),
        ("udp [fd00::1]:1 -> [fd00::2]:53 dscp ef ecn ce", None),
        ("icmp 10.0.0.1 -> 10.0.0.2", None),
        ("tcp 10.0.0.1 -> 10.0.0.2:2", "E028"),
        ("icmp 10.0.0.1:1 -> 10.0.0.2", "E028"),
        ("udp 10.0.0.1:1 -> 10.0.0.2:2 flags syn", "E028"),
        ("tcp 10.0.0.1:1 -> [fd00::2]:2", "E027"),
        ("tpc 10.0.0.1:1 -> 10.0.0.2:2", "E010"),
        ("tcp 10.0.0.0/24:1 -> 10.0.0.2:2", "E022"),
        ("tcp 10.0.0.1:1 -> 10.0.0.2:70000", "E023"),
        ("tcp 10.0.0.1:1 -> 10.0.0.2:2 length 10", "E023"),
        ("tcp 10.0.0.1:1 -> 10.0.0.2:2 length 70000", "E023"),
        ("tcp 10.0.0.1:1 -> 10.0.0.2:2 colour 3", "E010"),
        ("tcp 10.0.0.1:1 -> 10.0.0.2:2 ttl 3 ttl 4", "E012"),
        ("tcp 10.0.0.1:1", "E001"),
        ("", "E001"),
    ],
)
def test_packets_as_text(text: str, code: str | None) -> None:
    findings = Findings()
    header = read_packet(text, findings)
    assert [d.code for d in findings.diagnostics] == ([] if code is None else [code])
    assert (header is None) == (code is not None)
    if header is not None:
        header.build()


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from((
    "tcp", "udp", "icmp", "10.0.0.1:1", "[fd00::1]:2", "fd00::1", "->", "flags", "syn", "length",
    "tos", "3", "-1", "in", '"eth0"', "70000", "{", "}", ",", "mark", "ttl",
)), max_size=12))  # fmt: skip
def test_packet_soup(tokens: list[str]) -> None:
    findings = Findings()
    header = read_packet(" ".join(tokens), findings)
    assert (header is None) == findings.failed
    if header is not None:
        header.build()
