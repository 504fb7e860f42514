"""How the CPU kernels run: on how many threads, with which instruction set."""

from __future__ import annotations

from tgi_kernels._library import ops

ISAS = ("baseline", "avx2", "avx512")


def set_num_threads(threads: int) -> None:
    """How many threads every CPU op uses from now on, the calling one included. Changes no result."""
    if threads < 1:
        raise ValueError(f"the number of threads is {threads}; give at least 1")
    ops.set_num_threads(threads)


def num_threads() -> int:
    """How many threads CPU ops use; at first the cores this process may run on."""
    return int(ops.num_threads())


def available_isas() -> tuple[str, ...]:
    """The instruction sets this CPU has kernels for, plainest first."""
    return ISAS[: int(ops.cpu_isa_best()) + 1]


def isa() -> str:
    """The instruction set in use; the best available unless `set_isa` chose another."""
    return ISAS[int(ops.cpu_isa())]


def set_isa(name: str) -> None:
    """Uses the kernels of this instruction set from now on.

    Results of different sets differ in the last bits.
    """
    if name not in available_isas():
        raise ValueError(f"instruction set {name!r} is not on this CPU; it has: {' '.join(available_isas())}")
    ops.set_cpu_isa(ISAS.index(name))


def has_vnni() -> bool:
    """Whether this CPU multiplies int8 by AVX512-VNNI's instruction."""
    return bool(ops.cpu_has_vnni())


def vnni() -> bool:
    """Whether the set avx512 uses it; it does where it can, unless `set_vnni` chose otherwise."""
    return bool(ops.cpu_vnni())


def set_vnni(on: bool) -> None:
    """Lets the set avx512 use it, or not. Changes no result."""
    if on and not has_vnni():
        raise ValueError("AVX512-VNNI is not on this CPU")
    ops.set_cpu_vnni(on)
