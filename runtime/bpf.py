"""BPF programs, by the bpf system call: no compiler, no library.

Strategy: a `Program` puts instructions down one after the other and finds its labels
when it ends; `load` gives them to the kernel, whose verifier is the judge. What a
packet's headers are read into and built in is the program's own stack, so no program
depends on how the kernel lays out a packet. Numbers are 32 bits wide; addresses, which
`move` copies and `point` makes, are 64.

The bits are those of include/uapi/linux/bpf.h and RFC 9669.
"""

import ctypes
import os
import platform
import struct
from enum import IntEnum
from typing import Final

_PROG_LOAD: Final = 5
ON_LINK: Final = 3  # BPF_PROG_TYPE_SCHED_CLS
BEFORE_ROUTE: Final = 11  # BPF_PROG_TYPE_LWT_OUT: before the packet is fragmented
ON_ROUTE: Final = 12  # BPF_PROG_TYPE_LWT_XMIT: each packet that leaves
# Lets every packet pass: `r0 = 0; exit`.
PASS: Final = bytes.fromhex("b7000000000000009500000000000000")
# The number of the system call; asm/unistd.h. All of them are little-endian.
_CALL: Final = {"x86_64": 321, "aarch64": 280, "riscv64": 280}

_SIZES: Final = {1: 0x10, 2: 0x08, 4: 0x00}
_OPERATIONS: Final = {
    "add": 0x00, "or": 0x40, "and": 0x50, "shift left": 0x60, "shift right": 0x70
}  # fmt: skip
_CONDITIONS: Final = {"==": 0x10, ">": 0x20, ">=": 0x30, "!=": 0x50, "<": 0xA0}
_BY_REGISTER: Final = 0x08


class Register(IntEnum):
    """R0 is what a function returns, R1 to R5 what it takes (and spoils), R6 to R9 are kept."""

    R0 = 0
    R1 = 1
    R2 = 2
    R3 = 3
    R4 = 4
    R5 = 5
    R6 = 6
    R7 = 7
    R8 = 8
    R9 = 9
    STACK = 10  # the end of 512 bytes; offsets into them are negative


class Program:
    """Instructions, in the order in which they are given; `assemble` gives their bytes.

    What is an `int` and no `Register` stands for itself.
    """

    def __init__(self) -> None:
        self._code: list[tuple[int, int, int, int | str, int]] = []
        self._labels: dict[str, int] = {}

    def move(self, to: Register, value: int) -> None:
        """A number, or what a register holds, whole."""
        self._either(0xB7 if isinstance(value, Register) else 0xB4, to, value)

    def point(self, to: Register, offset: int) -> None:
        """The address of a place on the stack."""
        self.move(to, Register.STACK)
        self._put(0x07, to, 0, 0, offset)

    def load(self, to: Register, base: Register, offset: int, size: int) -> None:
        """Read 1, 2 or 4 bytes, as the machine orders them."""
        self._put(0x61 | _SIZES[size], to, base, offset, 0)

    def store(self, base: Register, offset: int, value: int, size: int) -> None:
        """Write 1, 2 or 4 bytes, as the machine orders them."""
        if isinstance(value, Register):
            self._put(0x63 | _SIZES[size], base, value, offset, 0)
        else:
            self._put(0x62 | _SIZES[size], base, 0, offset, value)

    def compute(self, operation: str, to: Register, value: int) -> None:
        """Of `_OPERATIONS`: 32 bits, and the rest zero."""
        self._either(0x04 | _OPERATIONS[operation], to, value)

    def swap(self, to: Register) -> None:
        """Between the machine's and the network's order of 16 bits; the rest is zero then."""
        self._put(0xDC, to, 0, 0, 16)

    def jump(self, label: str) -> None:
        self._put(0x05, 0, 0, label, 0)

    def jump_if(self, left: Register, condition: str, right: int, label: str) -> None:
        """Compare 32 bits without sign, by one of `_CONDITIONS`."""
        self._either(0x06 | _CONDITIONS[condition], left, right, label)

    def call(self, function: int) -> None:
        """By the function's number in `enum bpf_func_id`."""
        self._put(0x85, 0, 0, 0, function)

    def label(self, name: str) -> None:
        """Name the place of the next instruction."""
        self._labels[name] = len(self._code)

    def end(self, value: int) -> None:
        """Leave with a number."""
        self._put(0xB4, Register.R0, 0, 0, value)
        self._put(0x95, 0, 0, 0, 0)

    def assemble(self) -> bytes:
        """What `load` takes. Raises KeyError on a label that is nowhere."""
        code = bytearray()
        for place, (opcode, to, source, offset, value) in enumerate(self._code):
            if isinstance(offset, str):
                offset = self._labels[offset] - place - 1
            code += struct.pack("<BBhI", opcode, to | source << 4, offset, value & 0xFFFF_FFFF)
        return bytes(code)

    def _either(self, opcode: int, to: int, value: int, offset: int | str = 0) -> None:
        if isinstance(value, Register):
            self._put(opcode | _BY_REGISTER, to, value, offset, 0)
        else:
            self._put(opcode, to, 0, offset, value)

    def _put(self, opcode: int, to: int, source: int, offset: int | str, value: int) -> None:
        self._code.append((opcode, to, source, offset, value))


class _Load(ctypes.Structure):
    """`union bpf_attr` as BPF_PROG_LOAD has it, to its first 48 bytes."""

    _fields_ = (
        ("kind", ctypes.c_uint32),
        ("count", ctypes.c_uint32),
        ("instructions", ctypes.c_uint64),
        ("license", ctypes.c_uint64),
        ("no_log", ctypes.c_uint64 * 2),
        ("no_flags", ctypes.c_uint64),
    )


def load(kind: int, instructions: bytes) -> int:
    """A file descriptor on a program; the kernel frees it when nothing refers to it.

    Raises OSError, also on a machine whose number of the system call we do not know.
    """
    number = _CALL.get(platform.machine())
    if number is None:
        raise OSError(f"no bpf system call is known for {platform.machine()}")
    code = ctypes.create_string_buffer(instructions, len(instructions))
    terms = ctypes.create_string_buffer(b"GPL")
    attributes = _Load(
        kind, len(instructions) // 8, ctypes.addressof(code), ctypes.addressof(terms)
    )
    libc = ctypes.CDLL(None, use_errno=True)
    size = ctypes.sizeof(attributes)
    descriptor = libc.syscall(number, _PROG_LOAD, ctypes.byref(attributes), size)
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(descriptor)
