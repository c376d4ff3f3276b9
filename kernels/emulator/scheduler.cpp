// scheduler.cpp: threads as fibers that one scheduler resumes in seeded random order; barriers; how a launch ends.
#include "block.hpp"
#include <algorithm>
#include <map>
#include <sys/mman.h>
#include <unistd.h>

emulator::Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

Current now;

namespace {
constexpr std::size_t STACK_BYTES = 256 << 10;

jmp_buf scheduler;
std::vector<std::unique_ptr<Thread>> all_threads;

std::map<std::string, Kernel>& kernels() {
    static std::map<std::string, Kernel> table;
    return table;
}

[[noreturn]] void body() {
    for (;;) {
        now.kernel->call(now.arguments.data());
        Thread& self = *now.running;
        thread_exits(self);
        self.state = State::exited;
        for (const Thread* other : now.threads) {
            bool waits_for_me = (other->state == State::barrier) ||
                                (other->state == State::collective && other->warp() == self.warp() &&
                                 (other->mask >> self.lane() & 1) != 0);
            if (waits_for_me)
                fail(self, "ends while thread " + std::to_string(other->index) + " waits for it at " + other->operation +
                               " (" + place(other->site) + ")");
        }
        if (_setjmp(self.context) == 0) _longjmp(scheduler, 1);
    }
}

// A stack with an inaccessible page below it.
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

[[gnu::noinline]] void suspend() {
    if (_setjmp(now.running->context) == 0) _longjmp(scheduler, 1);
}

void make_ready(Thread& thread) {
    thread.state = State::ready;
    now.ready.push_back(&thread);
}

std::string lanes(u32 mask) {
    char text[16];
    std::snprintf(text, sizeof text, "0x%08x", mask);
    return text;
}

std::string waits(const Thread& thread) {
    return "thread " + std::to_string(thread.index) + " is at " + thread.operation +
           (thread.state == State::collective ? " of lanes " + lanes(thread.mask) : "") + " (" + place(thread.site) + ")";
}

// Usually one literal, whose address says so.
bool same_text(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }

bool same_site(Site a, Site b) { return a.line() == b.line() && same_text(a.file_name(), b.file_name()); }

void wait(Thread& self, State state, const char* operation, u32 mask, Site site, void* operand) {
    self.state = state;
    self.operation = operation;
    self.mask = mask;
    self.site = site;
    self.operand = operand;
}

// Index of the ready thread that goes on. Now and then any may, so that nobody waits for ever.
u32 choose() {
    u32 best = now.random.below(static_cast<u32>(now.ready.size()));
    if (now.order == Order::uniform || now.random.below(32) == 0) return best;
    for (u32 i = 0; i < now.ready.size(); ++i)
        if (now.ready[i]->priority > now.ready[best]->priority) best = i;
    return best;
}

void run_block() {
    now.random.state = now.launch.seed * 0x9e3779b97f4a7c15ull + now.serial - now.first_serial;
    // 18 seeds in a row see every combination of the three.
    constexpr Order ORDERS[] = {Order::uniform, Order::by_thread, Order::by_warp};
    constexpr u32 PREEMPTIONS[] = {0, 24, 200};
    now.order = ORDERS[now.launch.seed % 3];
    now.preemption = PREEMPTIONS[now.launch.seed / 6 % 3];
    now.until_preemption = now.preemption;
    now.lazy_copies = now.launch.seed % 2 == 0;
    now.arrived = 0;
    now.ready.clear();
    now.meetings.assign(now.launch.threads / WARP, {});
    start_shared(now.launch.shared_bytes);
    for (Thread* thread : now.threads) {
        thread->epoch = 0;
        thread->clock = 1;
        thread->seen.fill(0);
        thread->uncommitted.clear();
        thread->groups.clear();
        bool ranks_as_before = now.order == Order::by_warp && thread->lane() != 0;
        thread->priority = ranks_as_before ? now.threads[thread->index - 1]->priority : now.random.next();
        make_ready(*thread);
    }
    while (!now.ready.empty() && now.error.empty()) {
        u32 i = choose();
        Thread* next = now.ready[i];
        now.ready[i] = now.ready.back();
        now.ready.pop_back();
        resume(*next);
    }
    if (!now.error.empty()) return;
    for (const Thread* thread : now.threads) {
        if (thread->state == State::exited) continue;
        // The rules above end a launch at the first thread that cannot meet the others; this is for what they miss.
        now.error = "kernel `" + now.launch.kernel + "` is deadlocked: " + waits(*thread);
        return;
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
    now.error = "kernel `" + now.launch.kernel + "`, block (" + std::to_string(now.block.x) + ", " +
                std::to_string(now.block.y) + ", " + std::to_string(now.block.z) + "), thread " +
                std::to_string(thread.index) + ": " + what;
    _longjmp(scheduler, 1);
}

void maybe_preempt() {
    if (now.preemption == 0 || --now.until_preemption > 0) return;
    now.until_preemption = 1 + now.random.below(2 * now.preemption);
    now.running->priority = now.random.next();
    now.ready.push_back(now.running);
    suspend();
}

void fence(Site) { maybe_preempt(); }

void bar_sync(Site site) {
    Thread& self = *now.running;
    wait(self, State::barrier, "bar.sync", ALL_LANES, site, nullptr);
    for (const Thread* other : now.threads) {
        if (other->state == State::exited)
            fail(self, waits(self) + ", which thread " + std::to_string(other->index) + " never reaches: it has ended");
        bool stuck = other->state == State::collective && other->warp() == self.warp() &&
                     (other->mask >> self.lane() & 1) != 0;
        bool elsewhere = other->state == State::barrier && !same_site(other->site, site);
        if (stuck || elsewhere) fail(self, "the threads of the block diverge: " + waits(self) + ", " + waits(*other));
    }
    if (++now.arrived < now.launch.threads) return suspend();
    now.arrived = 0;
    for (Thread* thread : now.threads) {
        ++thread->epoch;
        make_ready(*thread);
    }
    suspend();
}

// Lanes of a warp meet. The last to arrive computes for all: `complete` gets the operand of every lane in mask.
void rendezvous(const char* operation, u32 mask, Site site, void* operand, void (*complete)(Thread* const*)) {
    Thread& self = *now.running;
    wait(self, State::collective, operation, mask, site, operand);
    if ((mask >> self.lane() & 1) == 0) fail(self, waits(self) + ", which do not include its own");
    Thread* const* warp = &now.threads[self.warp() * WARP];
    // Who joins the lanes that already wait here finds what they found: later arrivals elsewhere looked at them.
    Meeting& meeting = now.meetings[self.warp()];
    const bool joins = meeting.present != 0 && meeting.first->mask == mask &&
                       same_text(meeting.first->operation, operation) && same_site(meeting.first->site, site);
    u32 present = joins ? meeting.present | 1u << self.lane() : 0;
    for (u32 lane = 0; lane < WARP && !joins; ++lane) {
        const Thread& other = *warp[lane];
        bool named = (mask >> lane & 1) != 0;
        bool names_me = other.state == State::collective && (other.mask >> self.lane() & 1) != 0;
        if (named && other.state == State::exited)
            fail(self, waits(self) + ", which thread " + std::to_string(other.index) + " never reaches: it has ended");
        if (named && other.state == State::barrier)
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

std::string run(const Launch& launch) {
    auto found = kernels().find(launch.kernel);
    if (found == kernels().end()) return "there is no kernel `" + launch.kernel + "` here";
    const Kernel& kernel = found->second;
    const std::string about = "kernel `" + launch.kernel + "` ";
    const u64 blocks = static_cast<u64>(launch.grid.x) * launch.grid.y * launch.grid.z;
    if (launch.threads == 0 || launch.threads % WARP != 0 || launch.threads > kernel.max_threads)
        return about + "takes blocks of up to " + std::to_string(kernel.max_threads) + " threads, in whole warps; got " +
               std::to_string(launch.threads);
    if (blocks == 0 || launch.grid.y > 65535 || launch.grid.z > 65535 || blocks > 1u << 24)
        return about + "cannot be launched on a grid of " + std::to_string(launch.grid.x) + " x " +
               std::to_string(launch.grid.y) + " x " + std::to_string(launch.grid.z);
    if (launch.shared_bytes > 227 << 10)
        return about + "asks for " + std::to_string(launch.shared_bytes) +
               " bytes of shared memory; no device has more than " + std::to_string(227 << 10);
    if (launch.arguments.size() != kernel.argument_bytes.size())
        return about + "takes " + std::to_string(kernel.argument_bytes.size()) + " arguments; got " +
               std::to_string(launch.arguments.size());
    for (std::size_t i = 0; i < launch.arguments.size(); ++i)
        if (launch.arguments[i].size() != kernel.argument_bytes[i])
            return about + "takes " + std::to_string(kernel.argument_bytes[i]) + " bytes as argument " + std::to_string(i) +
                   "; got " + std::to_string(launch.arguments[i].size());

    now.launch = launch;
    now.kernel = &kernel;
    now.error.clear();
    now.mutant_hits = 0;
    now.arguments.clear();
    for (const auto& argument : now.launch.arguments) now.arguments.push_back(argument.data());
    while (all_threads.size() < launch.threads) {
        all_threads.push_back(std::make_unique<Thread>());
        all_threads.back()->index = static_cast<u32>(all_threads.size() - 1);
        give_stack(*all_threads.back());
    }
    now.threads.clear();
    for (u32 i = 0; i < launch.threads; ++i) now.threads.push_back(all_threads[i].get());
    blockDim = {launch.threads, 1, 1};
    gridDim = launch.grid;

    std::vector<u64> order(blocks);
    for (u64 i = 0; i < blocks; ++i) order[i] = i;
    Random random{launch.seed};
    for (u64 i = blocks; i > 1; --i) std::swap(order[i - 1], order[random.below(static_cast<u32>(i))]);

    now.first_serial = now.serial + 1;
    for (u64 block : order) {
        ++now.serial;
        now.block = {static_cast<u32>(block % launch.grid.x), static_cast<u32>(block / launch.grid.x % launch.grid.y),
                     static_cast<u32>(block / launch.grid.x / launch.grid.y)};
        blockIdx = now.block;
        run_block();
        if (!now.error.empty()) {
            for (auto& thread : all_threads) thread->has_context = false; // their stacks hold unfinished kernels
            return now.error;
        }
    }
    // A name that begins with ? may be one of another kernel.
    if (!launch.mutant.empty() && launch.mutant[0] != '?' && now.mutant_hits == 0) return about + "never reaches `" + launch.mutant + "`";
    return {};
}

} // namespace emulator
