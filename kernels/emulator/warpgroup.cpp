// warpgroup.cpp: what the four warps of a warpgroup do together: setmaxnreg, and wgmma, which goes on behind their backs.
//
// The threads of a warpgroup need not meet at a wgmma. The first to come makes the product, and the others must want the same one. Each
// adds its registers to it. A product is computed when it must be: when the first thread waits for its group. With eager copies it may be
// computed as soon as the last thread has issued it. Until a thread has waited, its registers hold NaNs. Their numbers are kept in a Tile,
// which all products that add to the same registers share.
#include "block.hpp"
#include "wgmma.hpp"
#include <deque>

namespace emulator {

namespace {
constexpr u32 THREADS = WARPGROUP_THREADS, WARPS = THREADS / WARP, SUMS = 64, COLUMNS = 128;
constexpr std::size_t SUM_BYTES = SUMS * sizeof(float);
constexpr const char *WGMMA = "wgmma.mma_async", *WAIT = "wgmma.wait_group", *SETMAXNREG = "setmaxnreg";

struct Tile {
    std::array<float*, THREADS> registers{}; // null: this thread has not issued a product of the tile
    std::array<bool, THREADS> done{};        // this thread has waited
    u32 left = THREADS;                      // how many threads have not waited
    u32 last_group = 0;
    Sums sums{};
};

// What each thread knew when it issued a product, and what all of them knew. It serves one product, or several in a row.
struct Learned {
    Common common;
    std::array<Known, THREADS> knew;
    void add(const Thread& thread, const Known& known) {
        common.add(known, thread.party);
        knew[thread.index % THREADS] = known;
    }
};

struct Product {
    Site site;
    u32 columns, group, waited; // how many groups its threads have waited for
    u64 a, b;
    bool accumulate, a_transposed, b_transposed;
    std::shared_ptr<Tile> tiles[2];
    const Thread* first;
    u32 issued = 0;
    std::shared_ptr<Learned> learned;
};

struct Change {
    bool increase;
    u32 registers;
    Site site;
    const Thread* first;
};
} // namespace

struct Warpgroup {
    u32 number = 0;
    Party agent = NOBODY; // this party and the three after it are the products, as each of the four warps has waited for them
    std::deque<Product> products;
    u32 first_product = 0; // the number of products[0]
    std::vector<std::shared_ptr<Tile>> tiles;
    std::vector<Thread*> waiters;                      // they wait for others to issue
    std::shared_ptr<Learned> learned;                  // at the last product
    std::array<std::pair<Known, Known>, WARPS> waited; // what a thread of the warp knew before and after its last wait
    std::vector<Change> changes;
};

namespace {
Warpgroup& warpgroup_of(Thread& self, const char* operation, Site site) {
    auto& groups = self.block->warpgroups;
    if (now.launch.threads % THREADS != 0)
        fail(self, std::string(operation) + " (" + place(site) + ") is of whole warpgroups of 128 threads; the block has " +
                       std::to_string(now.launch.threads) + " threads");
    if (groups.empty()) groups.resize(now.launch.threads / THREADS);
    auto& group = groups[self.index / THREADS];
    if (group == nullptr) {
        group = std::make_shared<Warpgroup>();
        group->number = self.index / THREADS;
    }
    return *group;
}

[[noreturn]] void diverge(const Thread& self, const char* operation, Site site, const Thread& other, Site there, const char* what) {
    fail(self, "the threads of the warpgroup diverge: thread " + std::to_string(self.index) + " is at " + operation + " (" + place(site) +
                   "), " + name_of(other, self) + " was at " + operation + " (" + place(there) + ")" + what);
}

// The first thread to come asks whether all others can still come.
void check_live(const Thread& self, const char* operation, Site site) {
    for (u32 i = 0; i < THREADS; ++i) {
        const Thread& other = *self.block->threads[self.index / THREADS * THREADS + i];
        if (other.state == State::exited)
            fail(self, std::string(operation) + " (" + place(site) + ") is of all threads of the warpgroup, and " + name_of(other, self) +
                           " has ended");
    }
}

// The tile whose numbers a thread's registers stand for, if any.
std::shared_ptr<Tile> find_tile(const Warpgroup& group, u32 thread, const float* registers) {
    for (const auto& tile : group.tiles)
        if (tile->registers[thread] == registers && !tile->done[thread]) return tile;
    return nullptr;
}

void give_registers(Warpgroup& group, const Thread& self, std::shared_ptr<Tile>& tile, float* registers, bool accumulate, u32 number,
                    Site site) {
    const u32 thread = self.index % THREADS;
    std::shared_ptr<Tile> mine = find_tile(group, thread, registers);
    if (tile == nullptr) {
        if (mine == nullptr) group.tiles.push_back(std::make_shared<Tile>());
        tile = mine != nullptr ? mine : group.tiles.back();
    }
    if ((mine != nullptr && mine != tile) || (tile->registers[thread] != nullptr && tile->registers[thread] != registers))
        fail(self, std::string(WGMMA) + " (" + place(site) + ") gets other registers than other threads of the warpgroup give it");
    tile->last_group = std::max(tile->last_group, number); // other threads may be ahead
    if (mine != nullptr) return;
    tile->registers[thread] = registers;
    if (accumulate) std::memcpy(&tile->sums[thread * SUMS], registers, SUM_BYTES);
    std::memset(registers, 0xff, SUM_BYTES); // NaNs
}

// All threads of the warpgroup have issued the product. This checks whether it may read its operands.
void check_operands(const Warpgroup& group, const Product& product, const Thread& last) {
    const Access access{now.serial, product.group, group.agent, number_of(product.site)};
    const Actor me{last, product.learned->common.value(), NOBODY, true, access};
    auto check = [&](shared_address chunk) {
        const Place at = shared_place(last, *last.block, chunk, CHUNK_BYTES, CHUNK_BYTES, WGMMA, "reads", product.site);
        note_read(me, at, CHUNK_BYTES, Way::plain, WGMMA, product.site);
    };
    each_chunk(operand_of(product.a, product.a_transposed), 64, check);
    each_chunk(operand_of(product.b, product.b_transposed), product.columns, check);
}

void compute(const Block& block, Product& product) {
    const unsigned char* shared = block.shared.bytes.data();
    Matrix a, b;
    gather(a, operand_of(product.a, product.a_transposed), 64, shared);
    gather(b, operand_of(product.b, product.b_transposed), product.columns, shared);
    for (u32 half = 0; half < product.columns / COLUMNS; ++half) {
        Sums& sums = product.tiles[half]->sums;
        if (!product.accumulate) sums.fill(0);
        multiply(sums, a, b, half * COLUMNS);
    }
}

// Computes the products in the order in which they were issued.
void compute_groups(const Block& block, Warpgroup& group, u32 last) {
    while (!group.products.empty() && group.products.front().group <= last && group.products.front().issued == THREADS) {
        compute(block, group.products.front());
        group.products.pop_front();
        ++group.first_product;
    }
}

// Notes what the thread knows when it issues the product. That is put together only once while nobody learns more.
void learn(Warpgroup& group, Product& product, const Thread& self) {
    const Known& mine = self.known;
    const u32 thread = self.index % THREADS;
    if (product.issued == 0) {
        if (group.learned == nullptr || group.learned->knew[thread] != mine) group.learned = std::make_shared<Learned>();
        product.learned = group.learned;
    }
    if (product.learned->knew[thread] == mine) return;
    if (product.learned->knew[thread] != nullptr) { // it knew less when it issued an earlier product
        auto own = std::make_shared<Learned>();
        for (u32 i = 0; i < THREADS; ++i) {
            const Thread& other = *self.block->threads[self.index - thread + i];
            if (i != thread && other.wgmmas >= self.wgmmas) own->add(other, product.learned->knew[i]);
        }
        if (group.learned == product.learned) group.learned = own;
        product.learned = own;
    }
    product.learned->add(self, mine);
}
} // namespace

namespace {
// The registers that a thread has at launch. A kernel gets these if it is compiled for one block of so many threads on a multiprocessor.
u32 launch_registers() {
    constexpr u32 OF_MULTIPROCESSOR = 1 << 16, MOST = 256;
    return std::min(MOST, OF_MULTIPROCESSOR / now.launch.threads / 8 * 8);
}

// Called when all warpgroups have changed theirs. An increase waits until there are enough registers, which here is for ever.
void check_registers(const Thread& self, Site site) {
    const auto& groups = self.block->warpgroups;
    u32 all = 0;
    for (const auto& group : groups) {
        if (group == nullptr || group->changes.empty()) return;
        all += THREADS * group->changes.back().registers;
    }
    const u32 there = THREADS * static_cast<u32>(groups.size()) * launch_registers();
    if (all > there)
        fail(self, std::string(SETMAXNREG) + " (" + place(site) + "): the block's warpgroups would have " + std::to_string(all) +
                       " registers, of " + std::to_string(there));
}
} // namespace

void setmaxnreg(bool increase, u32 registers, Site site) {
    maybe_preempt();
    Thread& self = *now.running;
    if (registers % 8 != 0 || registers < 24 || registers > 256)
        fail(self, std::string(SETMAXNREG) + " (" + place(site) + ") to " + std::to_string(registers) +
                       " registers: not a multiple of 8 from 24 to 256");
    Warpgroup& group = warpgroup_of(self, SETMAXNREG, site);
    const u32 number = self.register_changes++;
    if (number == group.changes.size()) {
        check_live(self, SETMAXNREG, site);
        const u32 held = number == 0 ? launch_registers() : group.changes.back().registers;
        if (increase ? registers < held : registers > held)
            fail(self, std::string(SETMAXNREG) + (increase ? ".inc (" : ".dec (") + place(site) + ") to " + std::to_string(registers) +
                           " registers, of " + std::to_string(held));
        group.changes.push_back({increase, registers, site, &self});
        check_registers(self, site);
    }
    const Change& change = group.changes[number];
    if (change.increase != increase || change.registers != registers || !same_site(change.site, site))
        diverge(self, SETMAXNREG, site, *change.first, change.site, "");
}

void wgmma_fence(Site) {
    maybe_preempt();
    now.running->wgmma_fenced = true;
}

void wgmma(float* low, float* high, u32 columns, u64 a, u64 b, bool accumulate, bool a_transposed, bool b_transposed, Site site) {
    maybe_preempt();
    Thread& self = *now.running;
    Warpgroup& group = warpgroup_of(self, WGMMA, site);
    if (group.agent == NOBODY) {
        group.agent = add_agent(Agent::wgmma, *self.block, group.number);
        for (u32 warp = 1; warp < WARPS; ++warp) add_agent(Agent::wgmma, *self.block, group.number);
    }
    if (!self.wgmma_fenced)
        fail(self, std::string(WGMMA) + " (" + place(site) + ") with no wgmma.fence since " +
                       (self.wgmma_waited == 0 ? "the thread began" : "the last wgmma.wait_group"));
    const u32 number = self.wgmmas++ - group.first_product;
    if (number == group.products.size()) {
        check_live(self, WGMMA, site);
        if (std::string wrong = operand_of(a, a_transposed).wrong(64); !wrong.empty())
            fail(self, std::string(WGMMA) + " (" + place(site) + ") of an operand a that " + wrong);
        if (std::string wrong = operand_of(b, b_transposed).wrong(columns); !wrong.empty())
            fail(self, std::string(WGMMA) + " (" + place(site) + ") of an operand b that " + wrong);
        group.products.push_back(
            {site, columns, self.wgmma_groups + 1, self.wgmma_waited, a, b, accumulate, a_transposed, b_transposed, {}, &self, 0, nullptr});
    }
    Product& product = group.products[number];
    if (!same_site(product.site, site) || product.columns != columns || product.a_transposed != a_transposed ||
        product.b_transposed != b_transposed)
        diverge(self, WGMMA, site, *product.first, product.site, "");
    if (product.group != self.wgmma_groups + 1 || product.waited != self.wgmma_waited)
        diverge(self, WGMMA, site, *product.first, product.site, ", in another group or after another wait");
    if (product.a != a || product.b != b || product.accumulate != accumulate)
        diverge(self, WGMMA, site, *product.first, product.site, ", with another operand");
    self.last_wgmma_group = product.group;
    self.wgmma_site = site;
    learn(group, product, self);
    give_registers(group, self, product.tiles[0], low, accumulate, product.group, site);
    if (high != nullptr) give_registers(group, self, product.tiles[1], high, accumulate, product.group, site);
    if (++product.issued < THREADS) return;
    check_operands(group, product, self);
    for (Thread* waiter : group.waiters) make_ready(*waiter);
    group.waiters.clear();
    if (!now.lazy_copies && now.random.below(2) == 0) compute_groups(*self.block, group, product.group);
}

void wgmma_commit_group(Site) {
    maybe_preempt();
    ++now.running->wgmma_groups;
}

void wgmma_wait_group(u32 pending, Site site) {
    maybe_preempt();
    Thread& self = *now.running;
    Warpgroup& group = warpgroup_of(self, WAIT, site);
    self.wgmma_fenced = false;
    const u32 last = self.wgmma_groups > pending ? self.wgmma_groups - pending : 0;
    if (last <= self.wgmma_waited) return;
    auto missing = [&] {
        for (const Product& product : group.products)
            if (product.group <= last && product.issued < THREADS) return true;
        return false;
    };
    while (missing()) {
        wait(self, State::warpgroup, WAIT, 0, site, nullptr);
        group.waiters.push_back(&self);
        suspend();
    }
    compute_groups(*self.block, group, last);
    const u32 thread = self.index % THREADS;
    for (std::size_t i = group.tiles.size(); i > 0; --i) {
        Tile& tile = *group.tiles[i - 1];
        if (tile.registers[thread] == nullptr || tile.done[thread] || tile.last_group > last) continue;
        std::memcpy(tile.registers[thread], &tile.sums[thread * SUMS], SUM_BYTES);
        tile.done[thread] = true;
        if (--tile.left == 0) group.tiles.erase(group.tiles.begin() + static_cast<std::ptrdiff_t>(i - 1));
    }
    self.wgmma_waited = last;
    if (group.agent == NOBODY) return;
    auto& [before, after] = group.waited[thread / WARP];
    if (before != self.known || clock_of(*after, static_cast<Party>(group.agent + thread / WARP)) != last) {
        before = self.known;
        after = with(self.known, static_cast<Party>(group.agent + thread / WARP), last);
    }
    self.known = after;
}

void warpgroup_exit(const Thread& thread) {
    if (thread.last_wgmma_group > thread.wgmma_waited && now.launch.detect_races)
        fail(thread, "ends without having waited for its " + std::string(WGMMA) + " (" + place(thread.wgmma_site) + ")");
    if (thread.block->warpgroups.empty()) return;
    const auto& group = thread.block->warpgroups[thread.index / THREADS];
    if (group == nullptr) return;
    if (thread.register_changes < group->changes.size()) {
        const Change& change = group->changes[thread.register_changes];
        fail(thread, "ends without having reached " + std::string(SETMAXNREG) + ", where " + name_of(*change.first, thread) + " was (" +
                         place(change.site) + ")");
    }
    const u32 reached = thread.wgmmas - group->first_product;
    if (reached < group->products.size()) {
        const Product& product = group->products[reached];
        fail(thread, "ends without having reached " + std::string(WGMMA) + ", where " + name_of(*product.first, thread) + " was (" +
                         place(product.site) + ")");
    }
}

} // namespace emulator
