"""The processor that kernels are generated for: what all blocking is derived from."""

from dataclasses import dataclass

import llvmlite.binding

from nbfftconv.numba_internals import config

_AVX512_CPUS = (
    "skylake-avx512",
    "cascadelake",
    "cooperlake",
    "cannonlake",
    "icelake",
    "tigerlake",
    "rocketlake",
    "sapphirerapids",
    "emeraldrapids",
    "graniterapids",
    "diamondrapids",
    "knl",
    "knm",
    "x86-64-v4",
    "znver4",
    "znver5",
)

#: Bytes of a cache line, on all targets.
LINE_BYTES = 64

#: Bytes of the widest vectors of any target, in which blocks are reckoned that shall fill a part of a cache: as the
#: sizes of caches are assumed ones, so are the blocks the same on all machines.
WIDEST_VECTOR_BYTES = 64


@dataclass(frozen=True)
class Target:
    """What kernels may use of a processor.

    Sizes of caches are assumed, and the same on all machines, so that neither plans nor results depend on what is
    measured or told: those of a core of a server of 2023, with its share of the last level.

    Attributes
    ----------
    vector_bytes : int
        Of a vector register.
    registers : int
        Vector registers.
    has_masked_loads : bool
        Whether a load or store of some lanes of a vector is one instruction; else it is a branch for every lane.
    has_matrix_unit : bool
        Whether there are instructions that multiply matrices of bfloat16 (AMX), beside vectors of 64 bytes.
    l1_bytes, l2_bytes : int
        Caches of a core, of data.
    last_level_bytes : int
        The cache that cores share.
    """

    vector_bytes: int
    registers: int
    has_masked_loads: bool
    has_matrix_unit: bool = False
    l1_bytes: int = 48 * 2**10
    l2_bytes: int = 2 * 2**20
    last_level_bytes: int = 32 * 2**20

    @classmethod
    def of_process(cls) -> "Target":
        """Return the target of this process: ``NUMBA_CPU_NAME`` may hold Numba to less than the host has."""
        features = llvmlite.binding.get_host_cpu_features()
        is_arm = llvmlite.binding.get_default_triple().startswith(("aarch64", "arm64"))
        name = config.CPU_NAME
        if name == "generic":
            vector_bytes = 16
        elif features.get("avx512f") and (name is None or name.startswith(_AVX512_CPUS)):
            vector_bytes = 64
        else:
            vector_bytes = 32 if features.get("avx2") else 16
        registers = 32 if vector_bytes == 64 or is_arm else 16
        # of what Numba is told of a processor nothing is known
        is_host = name is None and config.CPU_FEATURES is None
        has_matrix_unit = is_host and all(map(features.get, ("avx512bw", "amx-tile", "amx-bf16")))
        return cls(vector_bytes, registers, vector_bytes > 16, vector_bytes == 64 and has_matrix_unit)


TARGET = Target.of_process()


def power_of_two(most: int) -> int:
    """Return the largest power of two that is at most `most`, which is at least 1."""
    return 1 << (most.bit_length() - 1)
