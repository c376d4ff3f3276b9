// bulk.cpp: cp.async.bulk in both directions, and the fence between the proxies.
#include "block.hpp"
#include <algorithm>

namespace emulator {

namespace {
constexpr const char *LOAD = "cp.async.bulk", *STORE = "cp.async.bulk.global";
constexpr u32 UNIT = 16;

void check_size(const Thread& self, u32 bytes, const char* operation, Site site) {
    if (bytes == 0 || bytes % UNIT != 0)
        fail(self, std::string(operation) + " (" + place(site) + ") of " + std::to_string(bytes) + " bytes: not a multiple of 16 above 0");
}

Place target_of(const Load& load) { return {&load.block->shared, load.to}; }

void land(const Load& load) {
    const Place to = target_of(load);
    std::memcpy(to.bytes(), load.from.bytes(), load.bytes);
    Mbarrier& mbarrier = *load.mbarrier;
    const Access done{now.serial, mbarrier.phase + 1, mbarrier.agent, number_of(load.site)};
    set_writer(to, load.bytes, done);
    if (now.launch.detect_races)
        each_cell(load.from, load.bytes, false, [&](Cell& cell) {
            for (Access* reader : {&cell.reader, &cell.other_reader})
                if (reader->clock == UNDER_WAY && reader->party == mbarrier.agent && reader->serial == now.serial) *reader = done;
        });
    copied(*load.thread, *load.block, mbarrier, load.bytes, load.site);
}

void land_at(std::size_t i) {
    const Load load = now.loads[i];
    now.loads[i] = now.loads.back();
    now.loads.pop_back();
    land(load);
}

// The asynchronous copy reads what lies there now.
void read(Store& store) {
    if (store.read.empty()) store.read.assign(store.from.bytes(), store.from.bytes() + store.bytes);
}
} // namespace

void fence_proxy_async(Site) {
    maybe_preempt();
    Thread& self = *now.running;
    self.fences.push_back(self.clock);
    ++self.clock;
}

void cp_async_bulk_load(shared_address to, const void* from, u32 bytes, shared_address barrier, u32 ranks, Site site) {
    maybe_preempt();
    Thread& self = *now.running;
    check_size(self, bytes, LOAD, site);
    if (ranks == 0) ranks = 1u << self.block->rank;
    if (ranks >> now.blocks.size() != 0)
        fail(self, std::string(LOAD) + " (" + place(site) + ") is for a block that its cluster of " + std::to_string(now.blocks.size()) +
                       " has not");
    const Place source = global_place(self, from, bytes, UNIT, LOAD, "reads", site);
    for (Block* block : now.blocks) {
        if ((ranks >> block->rank & 1) == 0) continue;
        if (block->live == 0) fail(self, std::string(LOAD) + " (" + place(site) + ") is for " + name_of(*block) + ", which has ended");
        const Place target = shared_place(self, *block, to, bytes, UNIT, LOAD, "copies", site);
        Mbarrier& mbarrier = mbarrier_for_copy(self, *block, barrier, LOAD, site);
        Actor me = actor_of(self, site);
        me.access.clock = UNDER_WAY;
        note_write(me, target, bytes, LOAD, "copies", site);
        me.access.party = mbarrier.agent;
        me.async = true;
        note_read(me, source, bytes, Way::plain, LOAD, site);
        now.loads.push_back({block, static_cast<u32>(target.offset), source, bytes, &mbarrier, &self, site});
        if (!now.lazy_copies && now.random.below(2) == 0) land_at(now.loads.size() - 1);
    }
}

bool land_one() {
    if (now.loads.empty()) return false;
    land_at(now.random.below(static_cast<u32>(now.loads.size())));
    return true;
}

void loads_exit(const Thread& last) {
    for (std::size_t i = now.loads.size(); i > 0; --i) {
        const Load& load = now.loads[i - 1];
        if (load.block != last.block) continue;
        if (now.launch.detect_races)
            fail(last, "is the last of its block to end, while a cp.async.bulk of " + name_of(*load.thread, last) + " is under way (" +
                           place(load.site) + ")");
        now.loads.erase(now.loads.begin() + static_cast<std::ptrdiff_t>(i - 1));
    }
}

void cp_async_bulk_store(void* to, shared_address from, u32 bytes, Site site) {
    maybe_preempt();
    Thread& self = *now.running;
    check_size(self, bytes, STORE, site);
    const Place source = shared_place(self, *self.block, from, bytes, UNIT, STORE, "reads", site);
    const Place target = global_place(self, to, bytes, UNIT, STORE, "writes", site);
    if (self.store_agent == NOBODY) {
        self.store_agent = add_agent(Agent::store_reads, *self.block, self.index);
        add_agent(Agent::store_writes, *self.block, self.index);
    }
    Actor me = actor_of(self, site);
    me.async = true;
    me.access.clock = self.store_groups + 1;
    me.access.party = self.store_agent;
    note_read(me, source, bytes, Way::plain, STORE, site);
    me.access.party = static_cast<Party>(self.store_agent + 1);
    note_write(me, target, bytes, STORE, "writes", site);
    self.uncommitted_stores.push_back({target, source, bytes, site, {}});
    if (!now.lazy_copies && now.random.below(2) == 0) read(self.uncommitted_stores.back());
}

void cp_async_bulk_commit_group(Site) {
    Thread& self = *now.running;
    ++self.store_groups;
    if (!self.uncommitted_stores.empty()) self.stores.push_back({self.store_groups, std::move(self.uncommitted_stores)});
    self.uncommitted_stores.clear();
}

void cp_async_bulk_wait_group(u32 pending, bool reads, Site) {
    maybe_preempt();
    Thread& self = *now.running;
    const u32 done = self.store_groups > pending ? self.store_groups - pending : 0;
    if (done == 0 || self.store_agent == NOBODY) return;
    for (StoreGroup& group : self.stores) {
        if (group.number > done) break;
        for (Store& store : group.stores) {
            read(store);
            if (!reads) std::memcpy(store.to.bytes(), store.read.data(), store.bytes);
        }
    }
    if (!reads) std::erase_if(self.stores, [&](const StoreGroup& group) { return group.number <= done; });
    Join join;
    join.add(self.known);
    join.set(self.store_agent, done);
    if (!reads) join.set(static_cast<Party>(self.store_agent + 1), done);
    self.known = join.take();
}

void stores_exit(Thread& thread) {
    auto forgotten = [&](const Store& store) {
        if (now.launch.detect_races)
            fail(thread, "ends without having waited until its " + std::string(STORE) + " has read (" + place(store.site) + ")");
    };
    for (const Store& store : thread.uncommitted_stores) forgotten(store);
    for (StoreGroup& group : thread.stores) {
        for (Store& store : group.stores) {
            if (group.number > clock_of(*thread.known, thread.store_agent)) forgotten(store);
            read(store);
            now.stores.push_back(std::move(store));
        }
    }
}

void write_stores() {
    for (const Store& store : now.stores) std::memcpy(store.to.bytes(), store.read.data(), store.bytes);
    now.stores.clear();
}

} // namespace emulator
