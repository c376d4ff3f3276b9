// memory.cpp: shared and global memory in which every access is checked: bounds, alignment, whether anything was ever
// written there, and whether a barrier lies between conflicting accesses. Asynchronous copies.
#include "block.hpp"
#include <algorithm>
#include <map>

namespace emulator {

namespace {
// History of two bytes, the smallest access. Two readers are remembered, of different warps if there are: whoever writes
// next conflicts with at least one of them if it conflicts with a reader of another warp at all.
struct Cell {
    Access writer, reader, other_reader;
    Access copy; // an asynchronous copy that nobody has waited for
};
constexpr u32 CELL_BYTES = 2;
constexpr unsigned char POISON = 0xff; // every pattern of these is a NaN: f32, f16, bf16, f64

struct Memory {
    std::string name;
    std::vector<unsigned char> bytes;
    std::vector<Cell> cells;
    bool shared = false;
};

Memory shared_memory{"shared memory", {}, {}, true};
std::vector<std::unique_ptr<Memory>> buffers;

// An address in global memory is TAG, the number of the buffer, and the offset from the middle of a range, so that it is no
// valid pointer of this process, and an index somewhat too small or too large still belongs to its buffer.
constexpr u64 TAG = 0x5a5aull << 48;
constexpr u64 TAG_MASK = 0xffffull << 48;
constexpr u32 OFFSET_BITS = 34;
constexpr u64 MIDDLE = 1ull << (OFFSET_BITS - 1);

struct Place {
    Memory* memory = nullptr;
    i64 offset = 0;
};

Place find(u64 address) {
    if ((address & TAG_MASK) != TAG) return {};
    u64 number = (address & ~TAG_MASK) >> OFFSET_BITS;
    if (number >= buffers.size() || buffers[number] == nullptr) return {};
    return {buffers[number].get(), static_cast<i64>(address & ((1ull << OFFSET_BITS) - 1)) - static_cast<i64>(MIDDLE)};
}

struct SiteTable {
    static constexpr u32 SIZE = 1 << 14;
    std::vector<Site> sites = std::vector<Site>(SIZE);
    std::vector<bool> used = std::vector<bool>(SIZE);
};
SiteTable table;

std::string bytes_at(u32 bytes, const char* what, const Memory& memory, i64 offset) {
    return std::string(what) + " " + std::to_string(bytes) + " bytes at offset " + std::to_string(offset) + " of " +
           (memory.shared ? memory.name : "`" + memory.name + "`");
}

std::string accessed(const char* operation, u32 bytes, const char* what, const Memory& memory, i64 offset, Site site) {
    return std::string(operation) + " " + bytes_at(bytes, what, memory, offset) + " (" + place(site) + ")";
}

void check_range(const Thread& thread, Place at, u32 bytes, u32 alignment, const char* operation, const char* what,
                 Site site) {
    if (at.offset % static_cast<i64>(alignment) != 0)
        fail(thread, accessed(operation, bytes, what, *at.memory, at.offset, site) + ": not a multiple of " +
                         std::to_string(alignment));
    if (at.offset < 0 || at.offset + static_cast<i64>(bytes) > static_cast<i64>(at.memory->bytes.size()))
        fail(thread, accessed(operation, bytes, what, *at.memory, at.offset, site) + ": out of bounds, it has " +
                         std::to_string(at.memory->bytes.size()));
}

Place shared_place(const Thread& thread, shared_address address, u32 bytes, const char* operation, const char* what,
                   Site site) {
    Place at{&shared_memory, static_cast<i64>(address) - static_cast<i64>(SHARED_BASE)};
    check_range(thread, at, bytes, bytes, operation, what, site);
    return at;
}

Place global_place(const Thread& thread, const void* address, u32 bytes, u32 alignment, const char* operation,
                   const char* what, Site site) {
    Place at = find(reinterpret_cast<u64>(address));
    if (at.memory == nullptr)
        fail(thread, std::string(operation) + " " + what + " an address of no buffer (" + place(site) + ")");
    check_range(thread, at, bytes, alignment, operation, what, site);
    return at;
}

Access access_of(const Thread& thread, Site site) {
    return {now.serial, thread.epoch, thread.clock, static_cast<u16>(thread.index), number_of(site)};
}

bool same_block(const Access& access) { return access.serial == now.serial; }

// Does a barrier, or the end of a launch, order `earlier` before what `thread` does now?
bool ordered(const Access& earlier, const Thread& thread) {
    if (earlier.serial < now.first_serial) return true;
    if (!same_block(earlier)) return false;
    if (earlier.thread == thread.index || earlier.epoch < thread.epoch) return true;
    return earlier.thread / WARP == thread.warp() && thread.seen[earlier.thread % WARP] >= earlier.clock;
}

[[noreturn]] void race(const Thread& thread, const std::string& mine, const Access& earlier, const char* what) {
    std::string who = same_block(earlier) ? "thread " + std::to_string(earlier.thread) : "another block";
    fail(thread, mine + ", which " + who + " " + what + " (" + place(earlier.site) + ") with no barrier between them");
}

void check_copy(const Thread& thread, const Cell& cell, const std::function<std::string()>& mine) {
    if (cell.copy.serial != now.serial) return;
    fail(thread, mine() + ", where an asynchronous copy of thread " + std::to_string(cell.copy.thread) +
                     " has not been waited for (" + place(cell.copy.site) + ")");
}

void note_read(const Thread& thread, Place at, u32 bytes, Way way, const char* operation, Site site) {
    if (!now.launch.detect_races) return;
    auto mine = [&] { return accessed(operation, bytes, "reads", *at.memory, at.offset, site); };
    const Access access = access_of(thread, site);
    const auto first = static_cast<std::size_t>(at.offset) / CELL_BYTES;
    for (std::size_t i = first; i < first + bytes / CELL_BYTES; ++i) {
        Cell& cell = at.memory->cells[i];
        if (at.memory->shared) {
            check_copy(thread, cell, mine);
            if (!same_block(cell.writer)) fail(thread, mine() + ", which nobody has written");
        } else {
            if (cell.writer.serial == 0) fail(thread, mine() + ", which nobody has written");
            if (way == Way::read_only && cell.writer.serial >= now.first_serial)
                fail(thread, mine() + ", which this launch wrote (" + place(cell.writer.site) +
                                 "): not read-only memory");
        }
        if (!ordered(cell.writer, thread)) race(thread, mine(), cell.writer, "wrote");
        // The reader before is kept as the other one if it is of another warp, or as long as there is none.
        bool previous_is_current = same_block(cell.reader) && cell.reader.epoch == access.epoch;
        if (previous_is_current && cell.reader.thread / WARP != thread.warp()) cell.other_reader = cell.reader;
        else if (previous_is_current && cell.reader.thread != thread.index && !same_block(cell.other_reader))
            cell.other_reader = cell.reader;
        else if (cell.reader.serial >= now.first_serial && !same_block(cell.reader)) cell.other_reader = cell.reader;
        cell.reader = access;
    }
}

// `what` says how: writes, or will write.
void note_write(const Thread& thread, Place at, u32 bytes, const char* operation, const char* what, bool copy, Site site) {
    if (!now.launch.detect_races) return;
    auto mine = [&] { return accessed(operation, bytes, what, *at.memory, at.offset, site); };
    const Access access = access_of(thread, site);
    const auto first = static_cast<std::size_t>(at.offset) / CELL_BYTES;
    for (std::size_t i = first; i < first + bytes / CELL_BYTES; ++i) {
        Cell& cell = at.memory->cells[i];
        if (at.memory->shared) check_copy(thread, cell, mine);
        const bool fresh = at.memory->shared; // what other blocks did to their shared memory is no concern of this block
        if ((!fresh || same_block(cell.writer)) && !ordered(cell.writer, thread)) race(thread, mine(), cell.writer, "wrote");
        for (const Access& reader : {cell.reader, cell.other_reader})
            if ((!fresh || same_block(reader)) && !ordered(reader, thread)) race(thread, mine(), reader, "reads");
        if (copy) cell.copy = access;
        else cell.writer = access;
    }
}

void land(Copy& copy) {
    if (copy.landed) return;
    copy.landed = true;
    unsigned char* to = &shared_memory.bytes[copy.to - SHARED_BASE];
    std::memset(to, 0, copy.bytes);
    if (copy.source_bytes == 0) return;
    Place from = find(reinterpret_cast<u64>(copy.from));
    std::memcpy(to, &from.memory->bytes[static_cast<std::size_t>(from.offset)], copy.source_bytes);
}

// From here on the copied bytes are as if `thread` had just stored them.
void complete(const Thread& thread, Copy& copy) {
    land(copy);
    if (!now.launch.detect_races) return;
    const Access access = access_of(thread, copy.site);
    for (u32 i = 0; i < copy.bytes / CELL_BYTES; ++i) {
        Cell& cell = shared_memory.cells[(copy.to - SHARED_BASE) / CELL_BYTES + i];
        cell.copy = {};
        cell.writer = access;
    }
}
} // namespace

SiteNumber number_of(Site site) {
    u64 mixed = reinterpret_cast<u64>(site.file_name()) ^ static_cast<u64>(site.line()) * 0x9e3779b97f4a7c15ull;
    u64 hash = mixed * 0xbf58476d1ce4e5b9ull;
    for (u32 i = static_cast<u32>(hash >> 50);; i = (i + 1) % SiteTable::SIZE) {
        if (!table.used[i]) {
            table.used[i] = true;
            table.sites[i] = site;
        }
        if (table.sites[i].line() == site.line() && table.sites[i].file_name() == site.file_name())
            return static_cast<SiteNumber>(i);
    }
}

std::string place(Site site) {
    std::string path = site.file_name();
    return path.substr(path.rfind('/') + 1) + ":" + std::to_string(site.line());
}

std::string place(SiteNumber number) { return place(table.sites[number]); }

void start_shared(u32 bytes) {
    shared_memory.bytes.assign(bytes, POISON);
    if (shared_memory.cells.size() < bytes / CELL_BYTES + 1) shared_memory.cells.resize(bytes / CELL_BYTES + 1);
}

void check_read_shared(const Thread& thread, shared_address address, void* to, u32 bytes, const char* operation, Site site) {
    Place at = shared_place(thread, address, bytes, operation, "reads", site);
    note_read(thread, at, bytes, Way::plain, operation, site);
    std::memcpy(to, &shared_memory.bytes[static_cast<std::size_t>(at.offset)], bytes);
}

void read_shared(shared_address address, void* to, u32 bytes, const char* operation, Site site) {
    maybe_preempt();
    check_read_shared(*now.running, address, to, bytes, operation, site);
}

void write_shared(shared_address address, const void* from, u32 bytes, const char* operation, Site site) {
    maybe_preempt();
    Place at = shared_place(*now.running, address, bytes, operation, "writes", site);
    note_write(*now.running, at, bytes, operation, "writes", false, site);
    std::memcpy(&shared_memory.bytes[static_cast<std::size_t>(at.offset)], from, bytes);
}

void read_global(const void* address, void* to, u32 bytes, Way way, const char* operation, Site site) {
    maybe_preempt();
    Place at = global_place(*now.running, address, bytes, bytes, operation, "reads", site);
    note_read(*now.running, at, bytes, way, operation, site);
    std::memcpy(to, &at.memory->bytes[static_cast<std::size_t>(at.offset)], bytes);
}

void write_global(void* address, const void* from, u32 bytes, const char* operation, Site site) {
    maybe_preempt();
    Place at = global_place(*now.running, address, bytes, bytes, operation, "writes", site);
    note_write(*now.running, at, bytes, operation, "writes", false, site);
    std::memcpy(&at.memory->bytes[static_cast<std::size_t>(at.offset)], from, bytes);
}

u32 atomic(void* address, u32 value, Atomic what, Site site) {
    maybe_preempt();
    constexpr const char* NAMES[] = {"atom.global.add", "atom.global.min", "atom.global.or"};
    const char* operation = NAMES[static_cast<u32>(what)];
    Place at = global_place(*now.running, address, sizeof value, sizeof value, operation, "changes", site);
    u32 before = 0;
    unsigned char* bytes = &at.memory->bytes[static_cast<std::size_t>(at.offset)];
    std::memcpy(&before, bytes, sizeof before);
    if (now.launch.detect_races) {
        // Atomics do not conflict with each other, so they leave no trace for others to find.
        const auto first = static_cast<std::size_t>(at.offset) / CELL_BYTES;
        for (std::size_t i = first; i < first + sizeof value / CELL_BYTES; ++i) {
            const Cell& cell = at.memory->cells[i];
            auto mine = [&] { return accessed(operation, sizeof value, "changes", *at.memory, at.offset, site); };
            if (cell.writer.serial == 0) fail(*now.running, mine() + ", which nobody has written");
            if (!ordered(cell.writer, *now.running)) race(*now.running, mine(), cell.writer, "wrote");
        }
    }
    u32 after = before;
    switch (what) {
    case Atomic::add: after = before + value; break;
    case Atomic::min: after = std::min(before, value); break;
    case Atomic::bit_or: after = before | value; break;
    }
    std::memcpy(bytes, &after, sizeof after);
    return before;
}

void cp_async(shared_address to, const void* from, u32 bytes, u32 source_bytes, const char* operation, Site site) {
    maybe_preempt();
    Thread& self = *now.running;
    if (source_bytes > bytes)
        fail(self, std::string(operation) + " copies " + std::to_string(source_bytes) + " bytes into " +
                       std::to_string(bytes) + " (" + place(site) + ")");
    Place target = shared_place(self, to, bytes, operation, "writes", site);
    if (source_bytes > 0) {
        Place source = global_place(self, from, source_bytes, bytes, operation, "reads", site);
        if (source_bytes % CELL_BYTES != 0)
            fail(self, accessed(operation, source_bytes, "reads", *source.memory, source.offset, site) + ": an odd number");
        note_read(self, source, source_bytes, Way::plain, operation, site);
    } else if (reinterpret_cast<u64>(from) % bytes != 0) {
        fail(self, std::string(operation) + " is given a source that is not a multiple of " + std::to_string(bytes) + " (" +
                       place(site) + ")");
    }
    note_write(self, target, bytes, operation, "copies", true, site);
    self.uncommitted.push_back({to, from, bytes, source_bytes, false, operation, site});
    if (!now.lazy_copies && now.random.below(2) == 0) land(self.uncommitted.back());
}

void cp_async_commit_group() {
    Thread& self = *now.running;
    self.groups.push_back(std::move(self.uncommitted));
    self.uncommitted.clear();
}

void cp_async_wait_group(u32 pending) {
    Thread& self = *now.running;
    std::vector<Copy> due;
    while (self.groups.size() > pending) {
        due.insert(due.end(), self.groups.front().begin(), self.groups.front().end());
        self.groups.pop_front();
    }
    for (std::size_t left = due.size(); left > 0; --left) {
        std::swap(due[left - 1], due[now.random.below(static_cast<u32>(left))]);
        complete(self, due[left - 1]);
    }
}

void thread_exits(const Thread& thread) {
    if (!now.launch.detect_races) return;
    auto forgotten = [&](const Copy& copy) {
        fail(thread, "ends without having waited for its " + std::string(copy.operation) + " (" + place(copy.site) + ")");
    };
    if (!thread.uncommitted.empty()) forgotten(thread.uncommitted.front());
    for (const auto& group : thread.groups)
        if (!group.empty()) forgotten(group.front());
}

// ---- what the host does

u64 allocate(const std::string& name, u64 bytes) {
    auto memory = std::make_unique<Memory>();
    memory->name = name;
    memory->bytes.assign(bytes, POISON);
    memory->cells.resize(bytes / CELL_BYTES + 1);
    buffers.push_back(std::move(memory));
    return TAG | (buffers.size() - 1) << OFFSET_BITS | MIDDLE;
}

std::string release(u64 address) {
    Place at = find(address);
    if (at.memory == nullptr || at.offset != 0) return "not the address of a buffer";
    buffers[(address & ~TAG_MASK) >> OFFSET_BITS].reset();
    return {};
}

namespace {
std::string host_range(Place at, u64 count) {
    if (at.memory == nullptr) return "not an address of a buffer";
    if (at.offset < 0 || static_cast<u64>(at.offset) + count > at.memory->bytes.size())
        return std::to_string(count) + " bytes at offset " + std::to_string(at.offset) + " of `" + at.memory->name +
               "` are out of bounds, it has " + std::to_string(at.memory->bytes.size());
    return {};
}
} // namespace

std::string upload(u64 address, const unsigned char* bytes, u64 count) {
    Place at = find(address);
    if (std::string error = host_range(at, count); !error.empty()) return error;
    const auto offset = static_cast<std::size_t>(at.offset);
    std::copy(bytes, bytes + count, at.memory->bytes.begin() + at.offset);
    for (std::size_t i = offset / CELL_BYTES; i * CELL_BYTES < offset + count; ++i) {
        at.memory->cells[i] = {};
        at.memory->cells[i].writer.serial = 1;
    }
    return {};
}

std::string download(u64 address, u64 count, std::vector<unsigned char>& bytes) {
    Place at = find(address);
    if (std::string error = host_range(at, count); !error.empty()) return error;
    bytes.assign(at.memory->bytes.begin() + at.offset, at.memory->bytes.begin() + at.offset + static_cast<i64>(count));
    return {};
}

} // namespace emulator
