"""The BPF programs of the kernel's tunnels, IPv4 in IPv4: two on a route, one on a link.

Strategy: each reads the headers that it judges onto its stack, and whatever is not
plainly its own it lets pass as it is. What they write is what `itmlang.tunnel` writes.
"""

from collections.abc import Sequence
from typing import Final

from itmlang.marks import ALL, TUNNEL_BITS
from itmlang.tunnel import DONT_FRAGMENT, FRAGMENT, HEADER, PROTOCOL, TTL
from runtime.bpf import Program, Register

R0, R1, R2, R3, R4, R5, R6, R7, R8, R9, STACK = Register

# Of `struct __sk_buff`, include/uapi/linux/bpf.h: where its fields lie.
_LENGTH, _PACKET_TYPE, _MARK, _PROTOCOL, _INGRESS, _GSO_SIZE = 0, 4, 8, 16, 36, 176
# Of `enum bpf_func_id`.
_STORE_BYTES, _REPLACE_CHECKSUM, _LOAD_BYTES, _CHECKSUM, _FORGET_HASH = 9, 10, 26, 28, 41
_PULL: Final = 39
_ADJUST_ROOM, _PUSH_HEADER = 50, 73
_ETH_P_IP, _PACKET_HOST = 0x0800, 0
_ENCAP_IP: Final = 2  # BPF_LWT_ENCAP_IP
_ROOM_BEHIND_LINK: Final = 1  # BPF_ADJ_ROOM_MAC
_FIXED_GSO: Final = 1  # BPF_F_ADJ_ROOM_FIXED_GSO
_OK, _DROP, _REROUTE = 0, 2, 128  # enum bpf_ret_code; TC_ACT_SHOT is 2 as well
_GO_ON: Final = -1  # TC_ACT_UNSPEC: to the filter behind, if there is one


def _raw(value: int, size: int = 4) -> int:
    """A number as the machine (little-endian) reads it where a packet holds it."""
    return int.from_bytes(value.to_bytes(size), "little")


def gathering() -> bytes:
    """A program of `bpf.BEFORE_ROUTE`: the packet in one piece of memory.

    A packet that was put together from fragments (connection tracking does) remembers how
    long they were, and the kernel keeps to that when it fragments it again. If the old
    pieces are still there it takes them as they are, and the first one goes on
    remembering: its outer packet, longer by a header, would be fragmented once more. Made
    anew, from one piece, fragments remember nothing. What is cut later has no such past.
    """
    program = Program()
    program.load(R2, R1, _GSO_SIZE, 4)
    program.jump_if(R2, "!=", 0, "done")
    program.load(R2, R1, _LENGTH, 4)
    program.call(_PULL)
    program.label("done")
    program.end(_OK)
    return program.assemble()


def encapsulation(source: int, destination: int) -> bytes:
    """A program of `bpf.ON_ROUTE`: each packet into one to `destination`, then routed anew.

    As `itmlang.tunnel.Tunnel.encapsulate`, for what the route lets through. The tunnel
    bits of the mark go, or the outer packet would come back here. What the kernel cannot
    put in is dropped: of what a network card would cut, all but TCP.
    """
    program = Program()
    inner, outer, spare = -24, -48, -56
    program.move(R6, R1)
    program.move(R2, 0)
    program.point(R3, inner)
    program.move(R4, HEADER)
    program.call(_LOAD_BYTES)
    program.jump_if(R0, "!=", 0, "drop")

    # RFC 2003 section 3.2: from the far end; from here, but not made here; in here before.
    program.load(R7, STACK, inner + 12, 4)
    program.jump_if(R7, "==", _raw(destination), "drop")
    program.jump_if(R7, "!=", _raw(source), "foreign")
    program.load(R1, R6, _INGRESS, 4)
    program.jump_if(R1, "!=", 0, "drop")
    program.load(R1, STACK, inner + 9, 1)
    program.jump_if(R1, "!=", PROTOCOL, "foreign")
    program.load(R1, STACK, inner + 16, 4)
    program.jump_if(R1, "==", _raw(destination), "drop")
    program.label("foreign")
    program.load(R1, STACK, inner + 8, 1)
    program.jump_if(R1, "==", 0, "drop")

    # The outer header. A length that does not fit (of what is cut later) is left open.
    program.store(STACK, outer, 0x45, 1)
    program.load(R1, STACK, inner + 1, 1)
    program.store(STACK, outer + 1, R1, 1)
    program.load(R1, STACK, inner + 2, 2)
    program.swap(R1)
    program.compute("add", R1, HEADER)
    program.jump_if(R1, "<", 0x10000, "length")
    program.move(R1, 0)
    program.label("length")
    program.swap(R1)
    program.store(STACK, outer + 2, R1, 2)
    program.load(R1, STACK, inner + 6, 2)
    program.move(R2, R1)
    program.swap(R2)
    program.compute("shift left", R2, 3)
    program.load(R3, STACK, inner + 4, 2)
    program.swap(R3)
    program.compute("add", R2, R3)
    program.swap(R2)
    program.store(STACK, outer + 4, R2, 2)
    program.move(R2, R1)
    program.compute("and", R2, _raw(FRAGMENT, 2))
    program.jump_if(R2, "==", 0, "whole")
    program.move(R1, _raw(DONT_FRAGMENT, 2))
    program.label("whole")
    program.compute("and", R1, _raw(DONT_FRAGMENT, 2))
    program.store(STACK, outer + 6, R1, 2)
    program.store(STACK, outer + 8, TTL, 2)
    program.store(STACK, outer + 10, 0, 2)
    program.store(STACK, outer + 12, _raw(source), 4)
    program.store(STACK, outer + 16, _raw(destination), 4)

    # The kernel pushes only protocols that it knows how to cut packets of, and 0, which it
    # takes for IP in IP: so the protocol is written once the header is in place.
    program.move(R1, R6)
    program.move(R2, _ENCAP_IP)
    program.point(R3, outer)
    program.move(R4, HEADER)
    program.call(_PUSH_HEADER)
    program.jump_if(R0, "!=", 0, "drop")
    program.store(STACK, spare, PROTOCOL, 1)
    program.move(R1, R6)
    program.move(R2, 9)
    program.point(R3, spare)
    program.move(R4, 1)
    program.move(R5, 0)
    program.call(_STORE_BYTES)
    program.jump_if(R0, "!=", 0, "drop")
    program.move(R1, R6)
    program.move(R2, 10)
    program.move(R3, _raw(TTL << 8, 2))
    program.move(R4, _raw(TTL << 8 | PROTOCOL, 2))
    program.move(R5, 2)
    program.call(_REPLACE_CHECKSUM)
    program.jump_if(R0, "!=", 0, "drop")

    program.load(R1, R6, _MARK, 4)
    program.compute("and", R1, ALL ^ TUNNEL_BITS)
    program.store(R6, _MARK, R1, 4)
    program.end(_REROUTE)
    program.label("drop")
    program.end(_DROP)
    return program.assemble()


def decapsulation(
    sources: Sequence[tuple[int, int]], destinations: Sequence[int], mark: int, link_header: int
) -> bytes:
    """A program of `bpf.ON_LINK`: takes the outer header off what comes to one of `destinations`.

    As `itmlang.tunnel.decapsulate`. `sources` are prefixes (address, length) that the
    outer packet may come from; none means any. The inner packet goes on as if it had
    come in at the link, with `mark` added to its mark. `link_header` is the length of the
    link's own header. Outer packets with options, fragments, and what is broken or no
    tunnel's pass as they are.
    """
    program = Program()
    outer, inner = -48, -28
    program.move(R6, R1)
    program.load(R1, R6, _PACKET_TYPE, 4)
    program.jump_if(R1, "!=", _PACKET_HOST, "other")
    program.load(R1, R6, _PROTOCOL, 4)
    program.jump_if(R1, "!=", _raw(_ETH_P_IP, 2), "other")
    program.move(R1, R6)
    program.move(R2, link_header)
    program.point(R3, outer)
    program.move(R4, 2 * HEADER)
    program.call(_LOAD_BYTES)
    program.jump_if(R0, "!=", 0, "other")

    # Whose packet is it?
    program.load(R1, STACK, outer, 1)
    program.jump_if(R1, "!=", 0x45, "other")
    program.load(R1, STACK, outer + 9, 1)
    program.jump_if(R1, "!=", PROTOCOL, "other")
    program.load(R1, STACK, outer + 6, 2)
    program.compute("and", R1, _raw(FRAGMENT, 2))
    program.jump_if(R1, "!=", 0, "other")
    program.load(R1, STACK, outer + 16, 4)
    for destination in destinations:
        program.jump_if(R1, "==", _raw(destination), "ours")
    program.jump("other")
    program.label("ours")
    program.load(R1, STACK, outer + 12, 4)
    for address, length in sources:
        program.move(R2, R1)
        program.compute("and", R2, _raw(ALL << 32 - length & ALL))
        program.jump_if(R2, "==", _raw(address), "known")
    if sources:
        program.jump("other")
    program.label("known")

    # Nobody has looked at the outer header's checksum yet.
    program.move(R1, 0)
    program.move(R2, 0)
    program.point(R3, outer)
    program.move(R4, HEADER)
    program.move(R5, 0)
    program.call(_CHECKSUM)
    for _ in range(2):
        program.move(R1, R0)
        program.compute("shift right", R1, 16)
        program.compute("and", R0, 0xFFFF)
        program.compute("add", R0, R1)
    program.jump_if(R0, "!=", 0xFFFF, "other")

    # Do the lengths fit? R7 is what is there, R1 what there should be, R8 the inner packet.
    program.load(R7, R6, _LENGTH, 4)
    program.compute("add", R7, -link_header)
    program.load(R1, STACK, outer + 2, 2)
    program.swap(R1)
    program.jump_if(R1, ">", R7, "other")
    program.jump_if(R1, "!=", 0, "said")
    program.load(R2, R6, _GSO_SIZE, 4)
    program.jump_if(R2, "==", 0, "other")
    program.move(R1, R7)
    program.label("said")
    program.jump_if(R1, "<", 2 * HEADER, "other")
    program.compute("add", R1, -HEADER)
    program.load(R8, STACK, inner + 2, 2)
    program.swap(R8)
    program.jump_if(R8, ">", R1, "other")
    program.load(R2, STACK, inner, 1)
    program.jump_if(R2, "<", 0x45, "other")
    program.jump_if(R2, ">", 0x4F, "other")
    program.compute("and", R2, 15)
    program.compute("shift left", R2, 2)
    program.jump_if(R8, "<", R2, "other")
    program.load(R2, STACK, inner + 8, 1)
    program.jump_if(R2, "==", 0, "drop")

    # ECN: R7 the outer packet's, R9 the inner one's, R8 the TOS that comes of them.
    program.load(R7, STACK, outer + 1, 1)
    program.compute("and", R7, 3)
    program.load(R8, STACK, inner + 1, 1)
    program.move(R9, R8)
    program.compute("and", R9, 3)
    program.jump_if(R9, "!=", 0, "capable")
    program.jump_if(R7, "==", 3, "drop")
    program.jump("same")
    program.label("capable")
    program.jump_if(R7, "==", 3, "told")
    program.jump_if(R7, "!=", 1, "same")
    program.jump_if(R9, "!=", 2, "same")
    program.label("told")
    program.compute("and", R8, 0xFC)
    program.compute("or", R8, R7)
    program.label("same")

    # The length of the pieces in which TCP goes on is the inner packets', so it stays.
    program.move(R1, R6)
    program.move(R2, -HEADER)
    program.move(R3, _ROOM_BEHIND_LINK)
    program.move(R4, _FIXED_GSO)
    program.call(_ADJUST_ROOM)
    program.jump_if(R0, "!=", 0, "other")

    # The first word of the inner header, before and after.
    program.load(R7, STACK, inner, 2)
    program.store(STACK, inner + 1, R8, 1)
    program.load(R9, STACK, inner, 2)
    program.jump_if(R7, "==", R9, "done")
    program.move(R1, R6)
    program.move(R2, link_header + 1)
    program.point(R3, inner + 1)
    program.move(R4, 1)
    program.move(R5, 0)
    program.call(_STORE_BYTES)
    program.jump_if(R0, "!=", 0, "drop")
    program.move(R1, R6)
    program.move(R2, link_header + 10)
    program.move(R3, R7)
    program.move(R4, R9)
    program.move(R5, 2)
    program.call(_REPLACE_CHECKSUM)
    program.jump_if(R0, "!=", 0, "drop")
    program.label("done")

    program.move(R1, R6)
    program.call(_FORGET_HASH)
    program.load(R1, R6, _MARK, 4)
    program.compute("or", R1, mark)
    program.store(R6, _MARK, R1, 4)
    program.label("other")
    program.end(_GO_ON)
    program.label("drop")
    program.end(_DROP)
    return program.assemble()
