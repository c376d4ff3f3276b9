// copies.cpp: cp.async.
#include "block.hpp"

namespace emulator {

namespace {
void land(Block& block, Copy& copy) {
    if (copy.landed) return;
    copy.landed = true;
    unsigned char* to = &block.shared.bytes[copy.to - SHARED_BASE];
    std::memset(to, 0, copy.bytes);
    if (copy.source_bytes > 0) std::memcpy(to, find(reinterpret_cast<u64>(copy.from)).bytes(), copy.source_bytes);
}

// From here on the copied bytes are as if `thread` had just stored them.
void complete(const Thread& thread, Copy& copy) {
    land(*thread.block, copy);
    const Place to{&thread.block->shared, static_cast<i64>(copy.to - SHARED_BASE)};
    set_writer(to, copy.bytes, actor_of(thread, copy.site).access);
}
} // namespace

void cp_async(shared_address to, const void* from, u32 bytes, u32 source_bytes, const char* operation, Site site) {
    maybe_preempt();
    Thread& self = *now.running;
    if (source_bytes > bytes)
        fail(self, std::string(operation) + " copies " + std::to_string(source_bytes) + " bytes into " + std::to_string(bytes) + " (" +
                       place(site) + ")");
    const Place target = shared_place(self, *self.block, to, bytes, bytes, operation, "writes", site);
    Actor me = actor_of(self, site);
    if (source_bytes > 0) {
        const Place source = global_place(self, from, source_bytes, bytes, operation, "reads", site);
        if (source_bytes % CELL_BYTES != 0)
            fail(self, std::string(operation) + " " + bytes_at(source_bytes, "reads", source) + " (" + place(site) + "): an odd number");
        note_read(me, source, source_bytes, Way::plain, operation, site);
    } else if (reinterpret_cast<u64>(from) % bytes != 0) {
        fail(self,
             std::string(operation) + " is given a source that is not a multiple of " + std::to_string(bytes) + " (" + place(site) + ")");
    }
    me.access.clock = UNDER_WAY;
    note_write(me, target, bytes, operation, "copies", site);
    self.uncommitted.push_back({to, from, bytes, source_bytes, false, operation, site});
    if (!now.lazy_copies && now.random.below(2) == 0) land(*self.block, self.uncommitted.back());
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
        self.groups.erase(self.groups.begin());
    }
    for (std::size_t left = due.size(); left > 0; --left) {
        std::swap(due[left - 1], due[now.random.below(static_cast<u32>(left))]);
        complete(self, due[left - 1]);
    }
}

void copies_exit(const Thread& thread) {
    if (!now.launch.detect_races) return;
    auto forgotten = [&](const Copy& copy) {
        fail(thread, "ends without having waited for its " + std::string(copy.operation) + " (" + place(copy.site) + ")");
    };
    if (!thread.uncommitted.empty()) forgotten(thread.uncommitted.front());
    for (const auto& group : thread.groups)
        if (!group.empty()) forgotten(group.front());
}

} // namespace emulator
