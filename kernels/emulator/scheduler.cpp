// scheduler.cpp: threads are fibers, which one scheduler resumes in a random order that the seed decides. Also how a launch begins and
// ends.
#include "block.hpp"
#include <algorithm>
#include <sys/mman.h>
#include <unistd.h>

emulator::Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

Current now;

namespace {
constexpr std::size_t STACK_BYTES = 256 << 10;
constexpr u32 MAX_CLUSTER = 8;

jmp_buf scheduler;
std::vector<std::unique_ptr<Thread>> all_threads;
std::vector<std::unique_ptr<Block>> all_blocks;

std::map<std::string, Kernel>& kernels() {
    static std::map<std::string, Kernel> table;
    return table;
}

[[noreturn]] void body() {
    for (;;) {
        now.kernel->call(now.arguments.data());
        Thread& self = *now.running;
        overlap_exit(self);
        copies_exit(self);
        stores_exit(self);
        warpgroup_exit(self);
        self.state = State::exited;
        nobody_waits_for(self);
        if (--self.block->live == 0) {
            loads_exit(self);
            mbarriers_exit(self);
        }
        if (_setjmp(self.context) == 0) _longjmp(scheduler, 1);
    }
}

// Gives the thread a stack, with an inaccessible page below it.
void give_stack(Thread& thread) {
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    constexpr int FLAGS = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* stack = mmap(nullptr, STACK_BYTES + page, PROT_READ | PROT_WRITE, FLAGS, -1, 0);
    if (stack == MAP_FAILED || mprotect(stack, page, PROT_NONE) != 0) {
        std::fputs("no memory for the stacks of the threads\n", stderr);
        std::_Exit(1);
    }
    thread.start.uc_stack.ss_sp = static_cast<char*>(stack) + page;
    thread.start.uc_stack.ss_size = STACK_BYTES;
}

[[gnu::noinline]] void resume(Thread& thread) {
    now.running = &thread;
    threadIdx = {thread.index, 0, 0};
    blockIdx = thread.block->index;
    if (_setjmp(scheduler) != 0) return;
    if (thread.has_context) _longjmp(thread.context, 1);
    thread.has_context = true;
    void* stack = thread.start.uc_stack.ss_sp;
    getcontext(&thread.start);
    thread.start.uc_stack.ss_sp = stack;
    thread.start.uc_stack.ss_size = STACK_BYTES;
    thread.start.uc_link = nullptr;
    makecontext(&thread.start, body, 0);
    setcontext(&thread.start);
}

std::string lanes(u32 mask) {
    char text[16];
    std::snprintf(text, sizeof text, "0x%08x", mask);
    return text;
}

// The index of the ready thread that goes on. Now and then it is any thread, so that nobody waits for ever.
u32 choose() {
    u32 best = now.random.below(static_cast<u32>(now.ready.size()));
    if (now.order == Order::uniform || now.random.below(32) == 0) return best;
    for (u32 i = 0; i < now.ready.size(); ++i)
        if (now.ready[i]->priority > now.ready[best]->priority) best = i;
    return best;
}

// How many threads have the same rank.
u32 group_size() {
    const u32 cluster = static_cast<u32>(now.blocks.size());
    std::vector<u32> sizes{WARP};
    if (now.launch.threads > WARPGROUP_THREADS) sizes.push_back(WARPGROUP_THREADS);
    if (cluster > 1) sizes.push_back(now.launch.threads);
    return sizes[(now.launch.seed / 18 + now.launch.seed / 3) % sizes.size()];
}

void start_block(Block& block) {
    block.live = now.launch.threads;
    block.arrived = {};
    block.meetings.assign(now.launch.threads / WARP, {});
    block.named.fill({});
    block.mbarriers.clear();
    block.warpgroups.clear();
    start_shared(block, now.launch.shared_bytes);
    const u32 group = now.order == Order::by_group ? group_size() : 1;
    for (Thread* thread : block.threads) {
        static_cast<Progress&>(*thread) = {};
        thread->known = nothing_known();
        const bool ranks_as_before = thread->index % group != 0;
        thread->priority = ranks_as_before ? block.threads[thread->index - 1]->priority : now.random.next();
        make_ready(*thread);
    }
}

// No thread can go on, and no copy will land. This says who waits for what, each kind of waiting once.
void deadlock() {
    std::string sentence;
    std::vector<const Thread*> told;
    for (const Thread* thread : now.threads) {
        auto same = [&](const Thread* other) {
            return other->block == thread->block && same_text(other->operation, thread->operation) &&
                   same_site(other->site, thread->site) && other->waits_at == thread->waits_at;
        };
        if (thread->state == State::exited || std::any_of(told.begin(), told.end(), same)) continue;
        told.push_back(thread);
        sentence +=
            (sentence.empty() ? "" : "; ") + name_of(*thread, *now.threads[0]) + waits(*thread).substr(waits(*thread).find(" is at "));
    }
    if (!told.empty()) now.error = "kernel `" + now.launch.kernel + "` is deadlocked: " + sentence;
}

void run_cluster(u64 number) {
    now.random.state = now.launch.seed * 0x9e3779b97f4a7c15ull + now.serial - now.first_serial;
    // 18 seeds in a row see every combination of the three.
    constexpr Order ORDERS[] = {Order::uniform, Order::by_thread, Order::by_group};
    constexpr u32 PREEMPTIONS[] = {0, 24, 200};
    now.order = ORDERS[now.launch.seed % 3];
    now.preemption = PREEMPTIONS[now.launch.seed / 6 % 3];
    now.until_preemption = now.preemption;
    now.lazy_copies = now.launch.seed % 2 == 0;
    now.cluster_arrived = {};
    now.ready.clear();
    now.agents.clear();
    forget_hearing();
    now.loads.clear();
    now.stores.clear();
    const Index grid = now.launch.grid;
    const u32 cluster = static_cast<u32>(now.blocks.size()), across = grid.x / cluster;
    for (Block* block : now.blocks)
        block->index = {static_cast<u32>(number % across) * cluster + block->rank, static_cast<u32>(number / across % grid.y),
                        static_cast<u32>(number / across / grid.y)};
    for (Block* block : now.blocks) start_block(*block);
    for (;;) {
        // A late copy lands when nothing else can happen. Seldom it lands before.
        const bool lands = !now.loads.empty() && (now.ready.empty() || now.random.below(now.lazy_copies ? 512 : 16) == 0);
        if (lands) {
            if (_setjmp(scheduler) == 0) land_one();
        }
        if (!now.error.empty()) return;
        if (now.ready.empty()) {
            if (now.loads.empty()) break;
            continue;
        }
        u32 i = choose();
        Thread* next = now.ready[i];
        now.ready[i] = now.ready.back();
        now.ready.pop_back();
        resume(*next);
        if (!now.error.empty()) return;
    }
    write_stores();
    deadlock();
}

std::string refusal(const Launch& launch, const Kernel& kernel) {
    const std::string about = "kernel `" + launch.kernel + "` ";
    const u64 blocks = static_cast<u64>(launch.grid.x) * launch.grid.y * launch.grid.z;
    if (launch.threads == 0 || launch.threads % WARP != 0 || launch.threads > kernel.max_threads)
        return about + "takes blocks of up to " + std::to_string(kernel.max_threads) + " threads, in whole warps; got " +
               std::to_string(launch.threads);
    if (blocks == 0 || launch.grid.y > 65535 || launch.grid.z > 65535 || blocks > 1u << 24)
        return about + "cannot be launched on a grid of " + std::to_string(launch.grid.x) + " x " + std::to_string(launch.grid.y) + " x " +
               std::to_string(launch.grid.z);
    if (kernel.cluster == 0 || kernel.cluster > MAX_CLUSTER)
        return about + "is of clusters of " + std::to_string(kernel.cluster) + " blocks; no device has more than " +
               std::to_string(MAX_CLUSTER);
    if (launch.grid.x % kernel.cluster != 0)
        return about + "is of clusters of " + std::to_string(kernel.cluster) + " blocks, and cannot be launched on a grid of " +
               std::to_string(launch.grid.x) + " across";
    if (launch.shared_bytes > 227 << 10)
        return about + "asks for " + std::to_string(launch.shared_bytes) + " bytes of shared memory; no device has more than " +
               std::to_string(227 << 10);
    if (launch.arguments.size() != kernel.argument_bytes.size())
        return about + "takes " + std::to_string(kernel.argument_bytes.size()) + " arguments; got " +
               std::to_string(launch.arguments.size());
    for (std::size_t i = 0; i < launch.arguments.size(); ++i)
        if (launch.arguments[i].size() != kernel.argument_bytes[i])
            return about + "takes " + std::to_string(kernel.argument_bytes[i]) + " bytes as argument " + std::to_string(i) + "; got " +
                   std::to_string(launch.arguments[i].size());
    return {};
}

void make_cluster(u32 blocks, u32 threads) {
    while (all_blocks.size() < blocks) all_blocks.push_back(std::make_unique<Block>());
    while (all_threads.size() < static_cast<std::size_t>(blocks) * threads) {
        all_threads.push_back(std::make_unique<Thread>());
        give_stack(*all_threads.back());
    }
    now.blocks.clear();
    now.threads.clear();
    for (u32 rank = 0; rank < blocks; ++rank) {
        Block& block = *all_blocks[rank];
        now.blocks.push_back(&block);
        block.rank = rank;
        block.threads.clear();
        for (u32 i = 0; i < threads; ++i) {
            Thread& thread = *all_threads[now.threads.size()];
            thread.index = i;
            thread.party = static_cast<Party>(now.threads.size());
            thread.block = &block;
            block.threads.push_back(&thread);
            now.threads.push_back(&thread);
        }
    }
}
} // namespace

u64 Random::next() {
    u64 z = state += 0x9e3779b97f4a7c15ull;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
}

void add_kernel(const char* name, Kernel kernel) { kernels().emplace(name, std::move(kernel)); }

bool mutant(const char* name) {
    const char* wanted = now.launch.mutant.c_str();
    if (*wanted == 0 || std::strcmp(*wanted == '?' ? wanted + 1 : wanted, name) != 0) return false;
    ++now.mutant_hits;
    return true;
}

void fail(const Thread& thread, const std::string& what) {
    now.error = "kernel `" + now.launch.kernel + "`, " + name_of(*thread.block) + ", thread " + std::to_string(thread.index) + ": " + what;
    _longjmp(scheduler, 1);
}

void maybe_preempt() {
    if (now.preemption == 0 || --now.until_preemption > 0) return;
    now.until_preemption = 1 + now.random.below(2 * now.preemption);
    now.running->priority = now.random.next();
    now.ready.push_back(now.running);
    suspend();
}

[[gnu::noinline]] void suspend() {
    if (_setjmp(now.running->context) == 0) _longjmp(scheduler, 1);
}

void make_ready(Thread& thread) {
    thread.state = State::ready;
    now.ready.push_back(&thread);
}

void wait(Thread& self, State state, const char* operation, u32 mask, Site site, void* operand) {
    self.state = state;
    self.operation = operation;
    self.mask = mask;
    self.site = site;
    self.operand = operand;
    self.waits_at = 0;
}

std::string name_of(const Block& block) {
    return "block (" + std::to_string(block.index.x) + ", " + std::to_string(block.index.y) + ", " + std::to_string(block.index.z) + ")";
}

std::string name_of(const Thread& thread, const Thread& to) {
    return "thread " + std::to_string(thread.index) + (thread.block == to.block ? "" : " of " + name_of(*thread.block));
}

std::string waits(const Thread& thread) {
    std::string at = thread.state == State::collective ? " of lanes " + lanes(thread.mask)
                     : thread.state == State::mbarrier ? waits_for_mbarrier(thread)
                     : thread.state == State::named_barrier
                         ? std::string(" ") + std::to_string(thread.waits_at) + " of " + std::to_string(thread.waits_for) + " threads"
                         : "";
    return "thread " + std::to_string(thread.index) + " is at " + thread.operation + at + " (" + place(thread.site) + ")";
}

// Usually both are the same literal, at the same address.
bool same_text(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }

bool same_site(Site a, Site b) { return a.line() == b.line() && same_text(a.file_name(), b.file_name()); }

std::string run(const Launch& launch) {
    auto found = kernels().find(launch.kernel);
    if (found == kernels().end()) return "there is no kernel `" + launch.kernel + "` here";
    const Kernel& kernel = found->second;
    if (std::string refused = refusal(launch, kernel); !refused.empty()) return refused;

    now.launch = launch;
    now.kernel = &kernel;
    now.error.clear();
    now.mutant_hits = 0;
    now.arguments.clear();
    for (const auto& argument : now.launch.arguments) now.arguments.push_back(argument.data());
    make_cluster(kernel.cluster, launch.threads);
    blockDim = {launch.threads, 1, 1};
    gridDim = launch.grid;

    const u64 clusters = static_cast<u64>(launch.grid.x) * launch.grid.y * launch.grid.z / kernel.cluster;
    std::vector<u64> order(clusters);
    for (u64 i = 0; i < clusters; ++i) order[i] = i;
    Random random{launch.seed};
    for (u64 i = clusters; i > 1; --i) std::swap(order[i - 1], order[random.below(static_cast<u32>(i))]);

    now.first_serial = now.serial + 1;
    forget_messages();
    for (u64 number : order) {
        ++now.serial;
        run_cluster(number);
        if (!now.error.empty()) {
            for (auto& thread : all_threads) thread->has_context = false; // their stacks hold unfinished kernels
            return now.error;
        }
    }
    // A name that begins with ? may belong to another kernel.
    if (!launch.mutant.empty() && launch.mutant[0] != '?' && now.mutant_hits == 0)
        return "kernel `" + launch.kernel + "` never reaches `" + launch.mutant + "`";
    return {};
}

} // namespace emulator
