"""BPF programs, by the bpf system call: no compiler, no library."""

import ctypes
import os
import platform
from typing import Final

# include/uapi/linux/bpf.h
_PROG_LOAD: Final = 5
ON_LINK: Final = 3  # BPF_PROG_TYPE_SCHED_CLS
ON_ROUTE: Final = 12  # BPF_PROG_TYPE_LWT_XMIT
# Lets every packet pass: `r0 = 0; exit`.
PASS: Final = bytes.fromhex("b7000000000000009500000000000000")
# The number of the system call; asm/unistd.h.
_CALL: Final = {"x86_64": 321, "aarch64": 280, "riscv64": 280}


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
