// memory.hpp: bytes, and the history of each.
#pragma once
#include "clocks.hpp"
#include <algorithm>
#include <string>

namespace emulator {

// The place of an access in the kernel, as a small number.
using SiteNumber = u16;

constexpr u32 HOST = 1;

// One access to a cell of memory. It tells enough to ask whether it is ordered before another.
struct Access {
    u32 serial = 0; // of the cluster; 0: no access; HOST: by the host
    u32 clock = 0;  // of the party
    Party party = 0;
    SiteNumber site = 0;
};
// What a writer has in place of a clock if the bytes are the target of a copy under way, and if they are an mbarrier.
constexpr u32 UNDER_WAY = 0xffffffff, IS_MBARRIER = 0xfffffffe;

// Two readers are remembered, of different warps if there are any. So if the next writer conflicts with a reader of another warp, it
// conflicts with at least one of the two.
struct Cell {
    Access writer, reader, other_reader;
};

// 16 bytes have one history together, until an access to fewer of them gives every two bytes their own.
constexpr u32 CHUNK_BYTES = 16, CELL_BYTES = 2;
struct Chunk {
    Cell cell;
    bool split = false;
    std::unique_ptr<Cell[]> cells;
};

struct Block;

struct Memory {
    std::string name;
    std::vector<unsigned char> bytes;
    std::vector<Chunk> chunks;
    const Block* block = nullptr; // whose shared memory this is

    void resize(u64 count);
};

struct Place {
    Memory* memory = nullptr;
    i64 offset = 0;
    unsigned char* bytes() const { return &memory->bytes[static_cast<std::size_t>(offset)]; }
};

// Calls f for every cell of these bytes. `alike` says that f leaves the same in each.
template <class F> void each_cell(Place place, u64 bytes, bool alike, F&& f) {
    u64 at = static_cast<u64>(place.offset);
    for (const u64 end = at + bytes; at < end;) {
        Chunk& chunk = place.memory->chunks[at / CHUNK_BYTES];
        const u64 start = at / CHUNK_BYTES * CHUNK_BYTES, stop = std::min(end, start + CHUNK_BYTES);
        const bool whole = stop - at == CHUNK_BYTES;
        if (whole && !chunk.split) {
            f(chunk.cell);
        } else {
            constexpr u32 CELLS = CHUNK_BYTES / CELL_BYTES;
            if (!chunk.split) {
                if (chunk.cells == nullptr) chunk.cells = std::make_unique<Cell[]>(CELLS);
                std::fill_n(chunk.cells.get(), CELLS, chunk.cell);
                chunk.split = true;
            }
            for (u64 i = (at - start) / CELL_BYTES; i * CELL_BYTES < stop - start; ++i) f(chunk.cells[i]);
            if (whole && alike) {
                chunk.cell = chunk.cells[0];
                chunk.split = false;
            }
        }
        at = stop;
    }
}

} // namespace emulator
