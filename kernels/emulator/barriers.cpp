// barriers.cpp: where threads meet: lanes of a warp, named barriers, blocks, clusters.
#include "block.hpp"

namespace emulator {

void meet(Thread* const* threads, std::size_t count) {
    Join join;
    for (std::size_t i = 0; i < count; ++i) {
        join.add(threads[i]->known);
        join.set(threads[i]->party, threads[i]->clock);
    }
    const Known known = join.take();
    for (std::size_t i = 0; i < count; ++i) {
        threads[i]->known = known;
        ++threads[i]->clock;
    }
}

namespace {
bool is_whole(State state) { return state == State::barrier || state == State::cluster_barrier; }

Thread* const* warp_of(const Thread& thread) { return &thread.block->threads[thread.warp() * WARP]; }

// Whether a thread may make the meeting of all impossible. It may say so of one that does not.
bool may_diverge(const Thread& self, State state, Site site, const std::vector<Thread*>& threads, const Gathering& arrived) {
    u32 live = 0;
    for (const Block* block : now.blocks)
        if (state == State::cluster_barrier || block == self.block) live += block->live;
    const u32 elsewhere = state == State::cluster_barrier ? self.block->arrived.count : now.cluster_arrived.count;
    if (live < threads.size() || elsewhere != 0 || (arrived.count != 0 && !same_site(arrived.first->site, site))) return true;
    for (u32 lane = 0; lane < WARP; ++lane)
        if (warp_of(self)[lane]->state == State::collective) return true;
    return false;
}

// All of these threads meet at one line.
void all_meet(State state, const char* operation, Site site, const std::vector<Thread*>& threads, Gathering& arrived) {
    Thread& self = *now.running;
    wait(self, state, operation, ALL_LANES, site, nullptr);
    // To look at every thread whenever one arrives would take most of the time of a barrier.
    if (may_diverge(self, state, site, threads, arrived)) {
        for (const Thread* other : threads) {
            if (other->state == State::exited)
                fail(self, waits(self) + ", which " + name_of(*other, self) + " never reaches: it has ended");
            bool stuck = other->state == State::collective && other->block == self.block && other->warp() == self.warp() &&
                         (other->mask >> self.lane() & 1) != 0;
            bool elsewhere = is_whole(other->state) && (other->state != state || !same_site(other->site, site));
            if (stuck || (elsewhere && (other->block == self.block || other->state == state)))
                fail(self, "the threads of the block diverge: " + waits(self) + ", " + waits(*other));
        }
    }
    if (arrived.count == 0) arrived.first = &self;
    if (++arrived.count < threads.size()) return suspend();
    arrived = {};
    meet(threads.data(), threads.size());
    for (Thread* thread : threads) make_ready(*thread);
    suspend();
}
} // namespace

void bar_sync(Site site) {
    Block& block = *now.running->block;
    all_meet(State::barrier, "bar.sync", site, block.threads, block.arrived);
}

void cluster_sync(Site site) { all_meet(State::cluster_barrier, "barrier.cluster", site, now.threads, now.cluster_arrived); }

u32 cluster_rank() { return now.running->block->rank; }

// Warps arrive as wholes: a warp arrives when its last lane does.
void bar_sync_named(u32 id, u32 threads, Site site) {
    Thread& self = *now.running;
    auto mine = [&] { return "bar.sync " + std::to_string(id) + ", " + std::to_string(threads) + " (" + place(site) + ")"; };
    if (id == 0 || id >= self.block->named.size()) fail(self, mine() + ": named barriers are 1 to 15");
    if (threads == 0 || threads % WARP != 0 || threads > now.launch.threads)
        fail(self, mine() + ": not a number of whole warps of the block");
    wait(self, State::named_barrier, "bar.sync", ALL_LANES, site, nullptr);
    self.waits_at = id;
    self.waits_for = threads;
    Thread* const* warp = warp_of(self);
    u32 present = 0;
    for (u32 lane = 0; lane < WARP; ++lane) {
        const Thread& other = *warp[lane];
        if (other.state == State::exited)
            fail(self, waits(self) + ", which thread " + std::to_string(other.index) + " never reaches: it has ended");
        const bool stuck = other.state == State::collective && (other.mask >> self.lane() & 1) != 0;
        const bool here =
            other.state == State::named_barrier && other.waits_at == id && other.waits_for == threads && same_site(other.site, site);
        if (stuck || (!here && (is_whole(other.state) || other.state == State::named_barrier)))
            fail(self, "the lanes of the warp diverge: " + waits(self) + ", " + waits(other));
        present += here ? 1 : 0;
    }
    if (present < WARP) return suspend();
    NamedBarrier& barrier = self.block->named[id];
    if (!barrier.arrived.empty() && barrier.threads != threads)
        fail(self, mine() + ", where " + name_of(*barrier.arrived[0], self) + " waits for " + std::to_string(barrier.threads) +
                       " threads (" + place(barrier.arrived[0]->site) + ")");
    barrier.threads = threads;
    barrier.arrived.insert(barrier.arrived.end(), warp, warp + WARP);
    if (barrier.arrived.size() < threads) return suspend();
    meet(barrier.arrived.data(), threads);
    for (Thread* thread : barrier.arrived) make_ready(*thread);
    barrier.arrived.clear();
    suspend();
}

// Lanes of a warp meet. The last to arrive computes for all of them: `complete` gets the operand of every lane in the mask.
void rendezvous(const char* operation, u32 mask, Site site, void* operand, void (*complete)(Thread* const*)) {
    Thread& self = *now.running;
    wait(self, State::collective, operation, mask, site, operand);
    if ((mask >> self.lane() & 1) == 0) fail(self, waits(self) + ", which do not include its own");
    Thread* const* warp = warp_of(self);
    // A lane that joins lanes which already wait here finds what they found, because later arrivals elsewhere looked at them.
    Meeting& meeting = self.block->meetings[self.warp()];
    const bool joins = meeting.present != 0 && meeting.first->mask == mask && same_text(meeting.first->operation, operation) &&
                       same_site(meeting.first->site, site);
    u32 present = joins ? meeting.present | 1u << self.lane() : 0;
    for (u32 lane = 0; lane < WARP && !joins; ++lane) {
        const Thread& other = *warp[lane];
        bool named = (mask >> lane & 1) != 0;
        bool names_me = other.state == State::collective && (other.mask >> self.lane() & 1) != 0;
        if (named && other.state == State::exited)
            fail(self, waits(self) + ", which thread " + std::to_string(other.index) + " never reaches: it has ended");
        if (named && (is_whole(other.state) || other.state == State::named_barrier))
            fail(self, "the lanes of the warp diverge: " + waits(self) + ", " + waits(other));
        if ((named && other.state == State::collective) || names_me) {
            bool meets_me = other.mask == mask && same_text(other.operation, operation) && same_site(other.site, site);
            if (!meets_me) fail(self, "the lanes of the warp diverge: " + waits(self) + ", " + waits(other));
            present |= 1u << lane;
        }
    }
    if (joins || meeting.present == 0) meeting = {joins ? meeting.first : &self, present};
    if (present != mask) return suspend();
    if (meeting.first->mask == mask) meeting = {};
    complete(warp);
    for (u32 lane = 0; lane < WARP; ++lane)
        if ((mask >> lane & 1) != 0) make_ready(*warp[lane]);
    suspend();
}

void nobody_waits_for(const Thread& self) {
    // If no barrier of all threads has begun, only threads of the own warp can wait for this one.
    const bool begun = self.block->arrived.count != 0 || now.cluster_arrived.count != 0;
    Thread* const* threads = begun ? now.threads.data() : warp_of(self);
    const std::size_t count = begun ? now.threads.size() : WARP;
    for (std::size_t i = 0; i < count; ++i) {
        const Thread* other = threads[i];
        const bool mine = other->block == self.block;
        bool waits_for_me =
            other->state == State::cluster_barrier || (mine && other->state == State::barrier) ||
            (mine && other->state == State::collective && other->warp() == self.warp() && (other->mask >> self.lane() & 1) != 0) ||
            (mine && other->state == State::named_barrier && other->warp() == self.warp());
        if (waits_for_me)
            fail(self, "ends while " + name_of(*other, self) + " waits for it at " + other->operation + " (" + place(other->site) + ")");
    }
}

} // namespace emulator
