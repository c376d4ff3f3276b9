// memory.cpp: shared and global memory. Every access is checked: whether it is in bounds and aligned, whether anything was ever written
// there, and whether conflicting accesses are ordered.
#include "block.hpp"

namespace emulator {

void Memory::resize(u64 count) {
    constexpr unsigned char POISON = 0xff; // as f32, f16, bf16 or f64, every number made of these is a NaN
    bytes.assign(count, POISON);
    if (chunks.size() < count / CHUNK_BYTES + 1) chunks.resize(count / CHUNK_BYTES + 1);
}

namespace {
struct SiteTable {
    static constexpr u32 SIZE = 1 << 14;
    std::vector<Site> sites = std::vector<Site>(SIZE);
    std::vector<bool> used = std::vector<bool>(SIZE);
};
SiteTable table;

std::string accessed(const char* operation, u32 bytes, const char* what, Place at, Site site) {
    return std::string(operation) + " " + bytes_at(bytes, what, at) + " (" + place(site) + ")";
}

void check_range(const Thread& thread, Place at, u32 bytes, u32 alignment, const char* operation, const char* what, Site site) {
    if (at.offset % static_cast<i64>(alignment) != 0)
        fail(thread, accessed(operation, bytes, what, at, site) + ": not a multiple of " + std::to_string(alignment));
    if (at.offset < 0 || at.offset + static_cast<i64>(bytes) > static_cast<i64>(at.memory->bytes.size()))
        fail(thread, accessed(operation, bytes, what, at, site) + ": out of bounds, it has " + std::to_string(at.memory->bytes.size()));
}

bool is_thread(Party party) { return party < now.threads.size(); }
const Agent& agent_of(Party party) { return now.agents[party - now.threads.size()]; }

// Whether a history still matters. That of shared memory ends with its block, that of global memory with the launch.
bool matters(const Access& access, bool shared) { return shared ? access.serial == now.serial : access.serial >= now.first_serial; }

// Whether `earlier` is ordered before what the actor does now.
bool ordered(const Access& earlier, const Actor& me) {
    if (earlier.serial < now.first_serial) return true;
    if (earlier.serial != now.serial) return was_told(earlier, me.known);
    if (earlier.party == me.self) return true;
    if (clock_of(me.known, earlier.party) < earlier.clock) return false;
    if (is_thread(earlier.party) || agent_of(earlier.party).kind != Agent::wgmma) return true;
    for (u32 warp = 1; warp < WARPGROUP_THREADS / WARP; ++warp)
        if (clock_of(me.known, static_cast<Party>(earlier.party + warp)) < earlier.clock) return false;
    return true;
}

// Whether asynchronous reads of the actor see this store: its thread must have fenced since, and the actor must know of the fence.
bool fenced(const Access& store, const Actor& me) {
    const std::vector<u32>& fences = now.threads[store.party]->fences;
    auto fence = std::lower_bound(fences.begin(), fences.end(), store.clock);
    return fence != fences.end() && (store.party == me.self || clock_of(me.known, store.party) > *fence);
}

[[noreturn]] void race(const Actor& me, const std::string& mine, const Access& earlier, const char* what) {
    const std::string at = " (" + place(earlier.site) + ")";
    if (earlier.serial != now.serial)
        fail(me.thread, mine + ", which another block " + what + at + " with no barrier between them, nor a message");
    if (is_thread(earlier.party))
        fail(me.thread,
             mine + ", which " + name_of(*now.threads[earlier.party], me.thread) + " " + what + at + " with no barrier between them");
    const Agent& agent = agent_of(earlier.party);
    const std::string elsewhere = agent.block == me.thread.block ? "" : " of " + name_of(*agent.block);
    const std::string number = std::to_string(agent.number);
    switch (agent.kind) {
    case Agent::mbarrier:
        fail(me.thread, mine + ", where a bulk copy" + at + " has not been waited for at the mbarrier at offset " + number + elsewhere);
    case Agent::wgmma:
        fail(me.thread,
             mine + ", which wgmma of warpgroup " + number + elsewhere + " " + what + at + " with no wait and no barrier between them");
    default:
        fail(me.thread,
             mine + ", which a bulk copy of thread " + number + elsewhere + " " + what + at + " with no wait and no barrier between them");
    }
}

void check_special(const Actor& me, const Access& writer, const std::function<std::string()>& mine) {
    if (writer.clock == IS_MBARRIER) fail(me.thread, mine() + ", which is an mbarrier (" + place(writer.site) + ")");
    fail(me.thread, mine() + ", where an asynchronous copy of " + name_of(*now.threads[writer.party], me.thread) +
                        " has not been waited for (" + place(writer.site) + ")");
}

void read_by(const Actor& me, Cell& cell, bool shared) {
    // The reader before stays as the other one, unless whoever is ordered after this reader is ordered after that one too.
    const Access before = cell.reader;
    cell.reader = me.access;
    if (before.serial == me.access.serial && before.party == me.access.party) return;
    if (!matters(before, shared) || ordered(before, me)) return;
    const bool elsewhere = before.serial != now.serial || before.party / WARP != me.access.party / WARP;
    if (elsewhere || !matters(cell.other_reader, shared) || ordered(cell.other_reader, me)) cell.other_reader = before;
}
} // namespace

std::string bytes_at(u32 bytes, const char* what, Place at) {
    const std::string& name = at.memory->name;
    return std::string(what) + " " + std::to_string(bytes) + " bytes at offset " + std::to_string(at.offset) + " of " +
           (at.memory->block != nullptr ? name : "`" + name + "`");
}

Party add_agent(Agent::Kind kind, const Block& block, u32 number) {
    now.agents.push_back({kind, &block, number});
    return static_cast<Party>(now.threads.size() + now.agents.size() - 1);
}

Actor actor_of(const Thread& thread, Site site) {
    return {thread, *thread.known, thread.party, false, {now.serial, thread.clock, thread.party, number_of(site)}};
}

Place shared_place(const Thread& thread, Block& block, shared_address address, u32 bytes, u32 alignment, const char* operation,
                   const char* what, Site site) {
    Place at{&block.shared, static_cast<i64>(address) - static_cast<i64>(SHARED_BASE)};
    check_range(thread, at, bytes, alignment, operation, what, site);
    return at;
}

Place global_place(const Thread& thread, const void* address, u32 bytes, u32 alignment, const char* operation, const char* what,
                   Site site) {
    Place at = find(reinterpret_cast<u64>(address));
    if (at.memory == nullptr) fail(thread, std::string(operation) + " " + what + " an address of no buffer (" + place(site) + ")");
    if (now.launch.overlaps && !thread.waited)
        fail(thread, accessed(operation, bytes, what, at, site) + " before griddepcontrol.wait: earlier launches may not be complete");
    check_range(thread, at, bytes, alignment, operation, what, site);
    return at;
}

void note_read(const Actor& me, Place at, u32 bytes, Way way, const char* operation, Site site) {
    if (!now.launch.detect_races) return;
    const bool shared = at.memory->block != nullptr;
    auto mine = [&] { return accessed(operation, bytes, "reads", at, site); };
    each_cell(at, bytes, false, [&](Cell& cell) {
        const Access& writer = cell.writer;
        if (shared ? writer.serial != now.serial : writer.serial == 0) fail(me.thread, mine() + ", which nobody has written");
        if (shared && writer.clock >= IS_MBARRIER) check_special(me, writer, mine);
        if (way == Way::read_only && writer.serial >= now.first_serial)
            fail(me.thread, mine() + ", which this launch wrote (" + place(writer.site) + "): not read-only memory");
        if (way == Way::read_only && now.launch.overlaps && writer.serial > HOST)
            fail(me.thread, mine() + ", which an earlier launch wrote, and that launch may end within this one: not read-only memory");
        if (!ordered(writer, me)) race(me, mine(), writer, "wrote");
        if (me.async && is_thread(writer.party) && writer.serial >= now.first_serial) {
            auto who = [&] { return name_of(*now.threads[writer.party], me.thread) + " wrote (" + place(writer.site) + ")"; };
            if (!shared) fail(me.thread, mine() + ", which " + who() + ": fence.proxy.async.shared::cta does not make it a source");
            if (!fenced(writer, me))
                fail(me.thread, mine() + ", which " + who() + " with no fence.proxy.async of that thread and barrier between them");
        }
        read_by(me, cell, shared);
    });
}

void note_write(const Actor& me, Place at, u32 bytes, const char* operation, const char* what, Site site) {
    if (!now.launch.detect_races) return;
    const bool shared = at.memory->block != nullptr;
    auto mine = [&] { return accessed(operation, bytes, what, at, site); };
    each_cell(at, bytes, true, [&](Cell& cell) {
        const Access& writer = cell.writer;
        if (matters(writer, shared)) {
            if (shared && writer.clock >= IS_MBARRIER) check_special(me, writer, mine);
            if (!ordered(writer, me)) race(me, mine(), writer, "wrote");
        }
        for (const Access& reader : {cell.reader, cell.other_reader})
            if (matters(reader, shared) && !ordered(reader, me)) race(me, mine(), reader, "reads");
        // Whoever is ordered after this write is also ordered after everything that this write is ordered after.
        cell = {me.access, {}, {}};
    });
}

void griddepcontrol_wait(Site) {
    maybe_preempt();
    now.running->waited = true;
}

void overlap_exit(const Thread& thread) {
    if (now.launch.overlaps && !thread.waited)
        fail(thread, "ends without griddepcontrol.wait: the launch after would take those before for complete");
}

void set_writer(Place at, u32 bytes, const Access& access) {
    if (!now.launch.detect_races) return;
    each_cell(at, bytes, true, [&](Cell& cell) { cell = {access, {}, {}}; });
}

SiteNumber number_of(Site site) {
    u64 mixed = reinterpret_cast<u64>(site.file_name()) ^ static_cast<u64>(site.line()) * 0x9e3779b97f4a7c15ull;
    u64 hash = mixed * 0xbf58476d1ce4e5b9ull;
    for (u32 i = static_cast<u32>(hash >> 50);; i = (i + 1) % SiteTable::SIZE) {
        if (!table.used[i]) {
            table.used[i] = true;
            table.sites[i] = site;
        }
        if (table.sites[i].line() == site.line() && table.sites[i].file_name() == site.file_name()) return static_cast<SiteNumber>(i);
    }
}

std::string place(Site site) {
    std::string path = site.file_name();
    return path.substr(path.rfind('/') + 1) + ":" + std::to_string(site.line());
}

std::string place(SiteNumber number) { return place(table.sites[number]); }

void start_shared(Block& block, u32 bytes) {
    block.shared.name = now.blocks.size() == 1 ? "shared memory" : "shared memory of " + name_of(block);
    block.shared.block = &block;
    block.shared.resize(bytes);
}

void check_read_shared(const Thread& thread, shared_address address, void* to, u32 bytes, const char* operation, Site site) {
    Place at = shared_place(thread, *thread.block, address, bytes, bytes, operation, "reads", site);
    note_read(actor_of(thread, site), at, bytes, Way::plain, operation, site);
    std::memcpy(to, at.bytes(), bytes);
}

void check_write_shared(const Thread& thread, shared_address address, const void* from, u32 bytes, const char* operation, Site site) {
    Place at = shared_place(thread, *thread.block, address, bytes, bytes, operation, "writes", site);
    note_write(actor_of(thread, site), at, bytes, operation, "writes", site);
    std::memcpy(at.bytes(), from, bytes);
}

void read_shared(shared_address address, void* to, u32 bytes, const char* operation, Site site) {
    maybe_preempt();
    check_read_shared(*now.running, address, to, bytes, operation, site);
}

void write_shared(shared_address address, const void* from, u32 bytes, const char* operation, Site site) {
    maybe_preempt();
    check_write_shared(*now.running, address, from, bytes, operation, site);
}

void read_global(const void* address, void* to, u32 bytes, Way way, const char* operation, Site site) {
    maybe_preempt();
    Place at = global_place(*now.running, address, bytes, bytes, operation, "reads", site);
    note_read(actor_of(*now.running, site), at, bytes, way, operation, site);
    std::memcpy(to, at.bytes(), bytes);
}

void write_global(void* address, const void* from, u32 bytes, const char* operation, Site site) {
    maybe_preempt();
    Place at = global_place(*now.running, address, bytes, bytes, operation, "writes", site);
    note_write(actor_of(*now.running, site), at, bytes, operation, "writes", site);
    std::memcpy(at.bytes(), from, bytes);
}

u32 atomic(void* address, u32 value, Atomic what, Site site) {
    maybe_preempt();
    constexpr const char* NAMES[] = {"atom.global.add", "atom.global.min", "atom.global.or", "atom.global.inc"};
    const char* operation = NAMES[static_cast<u32>(what)];
    Place at = global_place(*now.running, address, sizeof value, sizeof value, operation, "changes", site);
    u32 before = 0;
    std::memcpy(&before, at.bytes(), sizeof before);
    if (now.launch.detect_races) {
        // Atomics do not conflict with each other, so they leave no trace that others could find.
        const Actor me = actor_of(*now.running, site);
        each_cell(at, sizeof value, false, [&](const Cell& cell) {
            auto mine = [&] { return accessed(operation, sizeof value, "changes", at, site); };
            if (cell.writer.serial == 0) fail(me.thread, mine() + ", which nobody has written");
            if (!ordered(cell.writer, me)) race(me, mine(), cell.writer, "wrote");
        });
        message(*now.running, at);
    }
    u32 after = before;
    switch (what) {
    case Atomic::add:
        after = before + value;
        break;
    case Atomic::min:
        after = std::min(before, value);
        break;
    case Atomic::bit_or:
        after = before | value;
        break;
    case Atomic::increment:
        after = before >= value ? 0 : before + 1;
        break;
    }
    std::memcpy(at.bytes(), &after, sizeof after);
    return before;
}

} // namespace emulator
