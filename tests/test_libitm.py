"""What programs say to libitm, without a kernel: interests, functions in order, refusals."""

import threading
from ipaddress import IPv4Address, IPv6Network

import pytest
from scapy.layers.inet import IP, UDP

import libitm
from runtime.handlers import HandlerError
from runtime.program import in_order, request


def described(**fields: object) -> list[str]:
    return libitm.Interest(**fields).text.splitlines()  # type: ignore[arg-type]


def test_interest_in_the_language():
    assert described(
        family="ipv6",
        protocol=["tcp", 17],
        saddr=IPv6Network("2001:db8::/32"),
        daddr={IPv4Address("192.0.2.1"): "a dictionary's keys"},
        sport=range(1000, 2000),
        dport=[80, "8000-8080", range(443, 444)],
        indev="eth0",
        outdev=("eth1", "a b"),
        lines="not dport 22",
    ) == [
        "family ipv6",
        "protocol { tcp, 17 }",
        "saddr 2001:db8::/32",
        "daddr 192.0.2.1",
        "sport 1000-1999",
        "dport { 80, 8000-8080, 443-443 }",
        'in "eth0"',
        'out { "eth1", "a b" }',
        "not dport 22",
    ]
    assert described() == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dport": []}, "dport: no value, so no packet"),
        ({"dport": True}, "dport cannot be True"),
        ({"dport": 1.5}, "dport cannot be 1.5"),
        ({"dport": range(1, 10, 2)}, r"dport cannot be range\(1, 10, 2\)"),
        ({"dport": range(0)}, r"dport cannot be range\(0, 0\)"),
        ({"protocol": "tcp } at input {"}, "protocol cannot be"),
        ({"saddr": "192.0.2.1\nnot dport 1"}, "saddr cannot be"),
        ({"indev": 'eth0" not dport "'}, "indev cannot be"),
        ({"dport": 65_536}, "65536"),
        ({"saddr": "192.0.2.256"}, "192.0.2.256"),
        ({"protocol": "tpc"}, "tpc"),
        ({"protocol": "icmp", "dport": 80}, "no packet"),
        ({"indev": "eth0"}, "in"),  # at output
        ({"lines": "dport = 80"}, "="),
    ],
)
def test_what_is_no_interest(fields, message):
    with pytest.raises(libitm.UsageError, match=message) as refused:
        libitm.App("a").register("output", libitm.Info(interest=libitm.Interest(**fields)))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hook": "outputs"}, "outputs"),
        ({"hook": "output } {"}, "hook is a word"),
        ({"copy": 100}, "between 128 and 65535"),
        ({"copy": "all"}, "between 128 and 65535"),
        ({"fail": "shut"}, "shut"),
        ({"priority": "high"}, "priority is a number"),
        ({"info": libitm.Info(classify=7)}, "classify is a function or None, not 7"),
        ({"info": libitm.Info(label="two words")}, "'two words' is no name"),
    ],
)
def test_what_is_no_registration(arguments, message):
    given = {"hook": "output", "info": libitm.Info(), **arguments}
    app = libitm.App("a")
    with pytest.raises(libitm.UsageError, match=message):
        app.register(**given)
    assert app.registrations == ()


@pytest.mark.parametrize("name", ["", "a-b", "1a", "a b", 7, "ä", "a\n"])
def test_what_is_no_name(name):
    with pytest.raises(libitm.UsageError, match="is no name"):
        libitm.App(name)


def test_names_of_registrations():
    app = libitm.App("a")
    names = [app.register("output", libitm.Info()).name for _ in range(3)]
    assert names == ["a_output", "a_output_2", "a_output_3"]
    assert app.register("input", libitm.Info(label="mine")).name == "mine"
    with pytest.raises(libitm.UsageError, match="a registration mine already"):
        app.register("input", libitm.Info(label="mine"))
    app.unregister("output")
    assert [one.name for one in app.registrations] == ["mine"]
    with pytest.raises(libitm.UsageError, match="no registration output"):
        app.unregister("output")


@pytest.mark.parametrize("seconds", [0, -1, "1", None, True, float("nan")])
def test_what_is_no_timer(seconds):
    with pytest.raises(libitm.UsageError, match="above 0"):
        libitm.App("a").register_timer(print, seconds)


def test_timers_are_the_programs_own():
    app = libitm.App("a")
    timer = app.register_timer(print, seconds=1)
    app.unregister_timer(timer)
    assert app.timers == ()
    with pytest.raises(libitm.UsageError, match="no such timer"):
        app.unregister_timer(timer)
    with pytest.raises(libitm.UsageError, match="calls a function"):
        app.register_timer("tick", seconds=1)


def test_run_belongs_into_the_main_thread():
    refused: list[Exception] = []

    def run() -> None:
        try:
            libitm.App("a").run()
        except libitm.UsageError as error:
            refused.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert "main thread" in str(refused[0])


# The five functions.


@pytest.mark.parametrize("kind", [1, 2, "short", True, (1,), -1])
def test_the_five_functions_in_their_order(kind):
    called = []

    def note(name, answer=None):
        return lambda *rest: called.append((name, *rest)) or answer

    info = libitm.Info(
        classify=note("classify", kind),
        log=note("log"),
        process=note("process", libitm.DROP),
        update=note("update"),
        control=note("control"),
    )
    packet = libitm.Packet(bytes(IP() / UDP()))
    assert in_order(info, reads=False)(packet) is libitm.DROP
    assert called == [
        ("classify", packet), ("log", packet), ("process", packet, kind),
        ("update", packet), ("control", packet),
    ]  # fmt: skip


@pytest.mark.parametrize("kind", [0, None, False])
def test_class_zero_is_not_processed(kind):
    info = libitm.Info(classify=lambda _: kind, process=lambda *_: libitm.DROP)
    assert in_order(info, reads=False)(libitm.Packet(bytes(IP()))) is None


def test_without_classify_all_is_of_class_one():
    info = libitm.Info(process=lambda _, kind: kind)
    assert in_order(info, reads=False)(libitm.Packet(bytes(IP()))) == 1


def test_headers_are_not_to_be_written():
    def process(packet, _):
        packet.ip.tos = 1
        packet.mark = 1

    packet = libitm.Packet(bytes(IP()))
    with pytest.raises(HandlerError, match="ask for whole packets"):
        in_order(libitm.Info(process=process), reads=True)(packet)


def test_another_number_is_another_queue():
    made = request("a", "a_output", "output", libitm.Info())
    queues = {made.compile(n).ruleset.tables[0].queues[0].first for n in range(4)}
    assert len(queues) == 4


# A packet in another one.


def test_into_a_tunnel_and_out_again():
    inner = bytes(IP(src="10.0.0.1", dst="10.0.0.2", tos=0x55, ttl=9) / UDP() / b"hello")
    packet = libitm.Packet(inner, hook="output")
    libitm.encapsulate(packet, "192.0.2.1", "192.0.2.2")
    outer = IP(packet.data)
    assert (outer.src, outer.dst, outer.proto, outer.tos) == ("192.0.2.1", "192.0.2.2", 4, 0x55)
    assert packet.altered and packet.length == len(inner) + 20
    libitm.decapsulate(packet)
    assert packet.data == inner


@pytest.mark.parametrize(
    ("inner", "hook", "message"),
    [
        (IP(src="10.0.0.1", flags="DF") / UDP() / bytes(80), "output", "longer than the 80 bytes"),
        (IP(src="10.0.0.1", ttl=1), "prerouting", "time to live"),
        (IP(src="192.0.2.2"), "output", "other end"),
    ],
)
def test_what_goes_into_no_tunnel(inner, hook, message):
    packet = libitm.Packet(bytes(inner), hook=hook)
    with pytest.raises(ValueError, match=message):
        libitm.encapsulate(packet, "192.0.2.1", "192.0.2.2", mtu=100)
    assert not packet.altered


@pytest.mark.parametrize("packet", [IP() / UDP(), IP(proto=4) / b"no packet"])
def test_what_comes_out_of_no_tunnel(packet):
    with pytest.raises(ValueError):
        libitm.decapsulate(libitm.Packet(bytes(packet)))


def test_all_that_it_promises_is_there():
    assert libitm.__all__ == sorted(
        libitm.__all__, key=lambda n: (n.upper() != n, n[0].islower(), n)
    )
    assert [name for name in libitm.__all__ if not hasattr(libitm, name)] == []
    assert tuple(libitm.Verdict) == (libitm.ACCEPT, libitm.DROP, libitm.MODIFIED)
