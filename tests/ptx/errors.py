"""The errors of an execution."""

from __future__ import annotations


class PtxError(AssertionError):
    """The PTX does something that it must not do. The message names the kernel and instruction."""


class Unsupported(PtxError):
    """An opcode, a modifier or an operand that this package does not implement."""


class AccessError(PtxError):
    """An address outside of a tensor or of shared memory, or a misaligned one."""


class RaceError(PtxError):
    """A result that depends on the order of warps, programs, copies or products."""
