// mbarrier.cpp: mbarriers. Their state is kept here. A thread that touches their bytes by other instructions is caught.
#include "block.hpp"
#include <algorithm>

namespace emulator {

namespace {
constexpr i64 MOST = (1 << 20) - 1; // the most arrivals, and the most bytes
constexpr u32 MBARRIER_BYTES = 8;

std::string name_of(const Mbarrier& mbarrier, const Block& block, const Thread& to) {
    return "the mbarrier at offset " + std::to_string(mbarrier.offset) + (&block == to.block ? "" : " of " + emulator::name_of(block));
}

Mbarrier& find_mbarrier(const Thread& self, Block& block, shared_address address, const char* operation, Site site) {
    const Place at = shared_place(self, block, address, MBARRIER_BYTES, MBARRIER_BYTES, operation, "reaches", site);
    auto found = block.mbarriers.find(static_cast<u32>(at.offset));
    if (found == block.mbarriers.end())
        fail(self, std::string(operation) + " " + bytes_at(MBARRIER_BYTES, "reaches", at) + " (" + place(site) +
                       "), where no mbarrier has been made");
    Mbarrier& mbarrier = found->second;
    const bool knows = mbarrier.maker == self.party || clock_of(*self.known, mbarrier.maker) >= mbarrier.made_at;
    if (now.launch.detect_races && !knows)
        fail(self, std::string(operation) + " (" + place(site) + ") reaches " + name_of(mbarrier, block, self) + ", which " +
                       name_of(*now.threads[mbarrier.maker], self) + " made (" + place(mbarrier.site) + ") with no barrier between them");
    return mbarrier;
}

Block& block_of(const Thread& self, u32 rank, const char* operation, Site site) {
    if (rank >= now.blocks.size())
        fail(self, std::string(operation) + " (" + place(site) + ") is for block " + std::to_string(rank) + " of a cluster of " +
                       std::to_string(now.blocks.size()));
    Block& block = *now.blocks[rank];
    if (block.live == 0)
        fail(self, std::string(operation) + " (" + place(site) + ") is for " + emulator::name_of(block) + ", which has ended");
    return block;
}

void add_bytes(const Thread& thread, Block& block, Mbarrier& mbarrier, i64 bytes, const char* operation, Site site) {
    mbarrier.bytes += bytes;
    if (mbarrier.bytes > MOST || mbarrier.bytes < -MOST)
        fail(thread, std::string(operation) + " (" + place(site) + "): " + name_of(mbarrier, block, thread) +
                         " cannot count so many bytes: " + std::to_string(mbarrier.bytes));
}

void maybe_complete(const Thread& thread, Block& block, Mbarrier& mbarrier, const char* operation, Site site) {
    if (mbarrier.pending > 0) return;
    if (mbarrier.bytes < 0)
        fail(thread, std::string(operation) + " (" + place(site) + "): " + name_of(mbarrier, block, thread) + " got " +
                         std::to_string(-mbarrier.bytes) + " bytes more than were expected");
    if (mbarrier.bytes > 0) return;
    ++mbarrier.phase;
    mbarrier.pending = mbarrier.count;
    mbarrier.arrivals.add(mbarrier.done);
    mbarrier.arrivals.set(mbarrier.agent, mbarrier.phase);
    mbarrier.done = mbarrier.arrivals.take();
    mbarrier.waited.clear();
    for (Thread* waiter : mbarrier.waiters) make_ready(*waiter);
    mbarrier.waiters.clear();
}

// What a thread of another block learns from an arrival: that asynchronous reads and copies are done. The arrival is a release to its own
// block only: see mbarrier_arrive_cluster.
Known of_agents(const Known& known) {
    Clock at = *known;
    std::fill_n(at.begin(), std::min(at.size(), now.threads.size()), 0);
    return std::make_shared<const Clock>(std::move(at));
}

// Threads of other blocks, and copies, may use an mbarrier only after a fence.mbarrier_init.
void check_fenced(const Thread& self, const Block& block, const Mbarrier& mbarrier, const char* operation, Site site) {
    if (now.launch.detect_races && !mbarrier.fenced)
        fail(self, std::string(operation) + " (" + place(site) + ") uses " + name_of(mbarrier, block, self) +
                       ", after whose mbarrier.init (" + place(mbarrier.site) + ") there was no fence.mbarrier_init");
}

void arrive(Block& block, shared_address address, i64 bytes, const char* operation, Site site) {
    Thread& self = *now.running;
    Mbarrier& mbarrier = find_mbarrier(self, block, address, operation, site);
    if (mbarrier.pending == 0)
        fail(self, std::string(operation) + " (" + place(site) + ") is one more arrival at " + name_of(mbarrier, block, self) +
                       " than the " + std::to_string(mbarrier.count) + " of its phase");
    add_bytes(self, block, mbarrier, bytes, operation, site);
    if (&block == self.block) {
        mbarrier.arrivals.add(self.known);
        mbarrier.arrivals.set(self.party, self.clock);
        ++self.clock;
    } else {
        check_fenced(self, block, mbarrier, operation, site);
        mbarrier.arrivals.add(of_agents(self.known));
    }
    --mbarrier.pending;
    maybe_complete(self, block, mbarrier, operation, site);
}
} // namespace

void mbarrier_init(shared_address address, u32 count, Site site) {
    constexpr const char* OPERATION = "mbarrier.init";
    maybe_preempt();
    Thread& self = *now.running;
    const Place at = shared_place(self, *self.block, address, MBARRIER_BYTES, MBARRIER_BYTES, OPERATION, "writes", site);
    if (count == 0 || count > MOST)
        fail(self, std::string(OPERATION) + " (" + place(site) + ") for " + std::to_string(count) + " arrivals: it takes 1 to 1048575");
    const u32 offset = static_cast<u32>(at.offset);
    if (self.block->mbarriers.count(offset) != 0)
        fail(self, std::string(OPERATION) + " (" + place(site) + "): there is already an mbarrier at offset " + std::to_string(offset));
    Actor me = actor_of(self, site);
    me.access.clock = IS_MBARRIER;
    note_write(me, at, MBARRIER_BYTES, OPERATION, "writes", site);
    Mbarrier& mbarrier = self.block->mbarriers[offset];
    mbarrier.offset = offset;
    mbarrier.count = mbarrier.pending = count;
    mbarrier.agent = add_agent(Agent::mbarrier, *self.block, offset);
    mbarrier.maker = self.party;
    mbarrier.made_at = self.clock;
    mbarrier.site = site;
    mbarrier.done = nothing_known();
}

void fence_mbarrier_init(Site) {
    maybe_preempt();
    Thread& self = *now.running;
    for (auto& [offset, mbarrier] : self.block->mbarriers)
        if (mbarrier.maker == self.party && !mbarrier.fenced) mbarrier.fenced = true;
    ++self.clock;
}

void mbarrier_arrive(shared_address barrier, Site site) {
    maybe_preempt();
    arrive(*now.running->block, barrier, 0, "mbarrier.arrive", site);
}

void mbarrier_arrive_expect_tx(shared_address barrier, u32 bytes, Site site) {
    maybe_preempt();
    arrive(*now.running->block, barrier, bytes, "mbarrier.arrive.expect_tx", site);
}

void mbarrier_arrive_cluster(shared_address barrier, u32 rank, Site site) {
    maybe_preempt();
    constexpr const char* OPERATION = "mbarrier.arrive.shared::cluster";
    arrive(block_of(*now.running, rank, OPERATION, site), barrier, 0, OPERATION, site);
}

void mbarrier_wait(shared_address address, u32 parity, Site site) {
    constexpr const char* OPERATION = "mbarrier.try_wait.parity";
    maybe_preempt();
    Thread& self = *now.running;
    if (parity > 1) fail(self, std::string(OPERATION) + " (" + place(site) + ") for parity " + std::to_string(parity));
    Mbarrier& mbarrier = find_mbarrier(self, *self.block, address, OPERATION, site);
    // A thread that looks late may find that the next phase has ended as well. Then it waits on.
    while (mbarrier.phase % 2 == parity) {
        wait(self, State::mbarrier, OPERATION, 0, site, &mbarrier);
        self.waits_at = mbarrier.offset;
        self.waits_for = parity;
        mbarrier.waiters.push_back(&self);
        suspend();
    }
    for (const auto& [before, after] : mbarrier.waited) {
        if (before != self.known) continue;
        self.known = after;
        return;
    }
    Join join;
    join.add(self.known);
    join.add(mbarrier.done);
    mbarrier.waited.emplace_back(self.known, join.take());
    self.known = mbarrier.waited.back().second;
}

std::string waits_for_mbarrier(const Thread& thread) {
    const Mbarrier& mbarrier = *static_cast<const Mbarrier*>(thread.operand);
    return std::string(" ") + std::to_string(thread.waits_for) + " of " + name_of(mbarrier, *thread.block, thread) + ", whose phase " +
           std::to_string(mbarrier.phase) + " lacks " + std::to_string(mbarrier.pending) + " of " + std::to_string(mbarrier.count) +
           " arrivals and " + std::to_string(mbarrier.bytes) + " bytes";
}

Mbarrier& mbarrier_for_copy(const Thread& self, Block& block, shared_address address, const char* operation, Site site) {
    Mbarrier& mbarrier = find_mbarrier(self, block, address, operation, site);
    check_fenced(self, block, mbarrier, operation, site);
    return mbarrier;
}

void copied(const Thread& thread, Block& block, Mbarrier& mbarrier, u32 bytes, Site site) {
    constexpr const char* OPERATION = "cp.async.bulk";
    add_bytes(thread, block, mbarrier, -static_cast<i64>(bytes), OPERATION, site);
    maybe_complete(thread, block, mbarrier, OPERATION, site);
}

void mbarriers_exit(const Thread& last) {
    if (!now.launch.detect_races) return;
    for (const auto& [offset, mbarrier] : last.block->mbarriers)
        if (mbarrier.pending != mbarrier.count || mbarrier.bytes != 0)
            fail(last, "is the last of its block to end, within a phase of " + name_of(mbarrier, *last.block, last) + " (" +
                           place(mbarrier.site) + "): " + std::to_string(mbarrier.count - mbarrier.pending) + " of " +
                           std::to_string(mbarrier.count) + " have arrived, and " + std::to_string(mbarrier.bytes) + " bytes are missing");
}

} // namespace emulator
