"""How many thread blocks of a kernel a multiprocessor holds at once, if the largest share of its first-level cache serves as shared memory.
The results were equal to those of NVIDIA's cuda_occupancy.h (12.9) for all of 714,240 combinations of architecture, threads, registers and
bytes. In this file a block is a thread block."""

from dataclasses import dataclass

WARP = 32
REGISTERS = 64 * 1024
# There are four partitions, each with a quarter of the registers. A warp gets registers from one of them, in units of this size.
REGISTER_UNIT = 256
PARTITIONS = 4
SHARED_UNIT = 128
# So many bytes of each block's shared memory belong to the system.
SHARED_RESERVED = 1024


@dataclass(frozen=True)
class Multiprocessor:
    warps: int
    blocks: int
    shared: int


# From the CUDA C++ Programming Guide, technical specifications per compute capability.
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
    """Blocks, warps, and what limits them: r for registers, s for shared memory, w for warps, b for blocks."""
    limits = MULTIPROCESSORS[architecture]
    warps = -(-threads // WARP)
    per_warp = round_up(registers * WARP, REGISTER_UNIT)
    # The device admits a block as if it took the same number of warps in each partition.
    admitted = per_warp * round_up(warps, PARTITIONS) <= REGISTERS
    by = {
        "r": REGISTERS // PARTITIONS // per_warp * PARTITIONS // warps if admitted else 0,
        "s": limits.shared // round_up(shared + SHARED_RESERVED, SHARED_UNIT),
        "w": limits.warps // warps,
        "b": limits.blocks,
    }
    blocks = min(by.values())
    return blocks, blocks * warps, "".join(k for k, v in by.items() if v == blocks)
