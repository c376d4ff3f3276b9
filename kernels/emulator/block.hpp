// block.hpp: the state of a launch, shared by the emulator's own files. Kernels never see it.
#pragma once
#include "../common/platform.cuh"
#include <array>
#include <csetjmp>
#include <deque>
#include <memory>
#include <string>
#include <ucontext.h>

namespace emulator {

// splitmix64: small, and the same on every machine.
struct Random {
    u64 state = 0;
    u64 next();
    u32 below(u32 bound) { return static_cast<u32>((next() >> 32) * bound >> 32); }
};

// Where in the kernel an access was, as a small number.
using SiteNumber = u16;
SiteNumber number_of(Site site);
std::string place(Site site);
std::string place(SiteNumber number);

// One access to a cell of memory: enough to ask whether a barrier lies between it and now.
struct Access {
    u32 serial = 0; // of the block; 0: none, 1: the host
    u32 epoch = 0;  // block barriers passed
    u32 clock = 0;  // warp barriers passed
    u16 thread = 0;
    SiteNumber site = 0;
};

struct Copy {
    shared_address to;
    const void* from;
    u32 bytes, source_bytes;
    bool landed;
    const char* operation;
    Site site;
};

// Who goes on: anybody; or mostly the thread, or a thread of the warp, that ranks highest, so that some run far ahead.
enum class Order { uniform, by_thread, by_warp };

enum class State { ready, collective, barrier, exited };

// One CUDA thread.
struct Thread {
    u32 index = 0;
    State state = State::exited;
    u64 priority = 0;
    u32 epoch = 0, clock = 0;
    std::array<u32, WARP> seen{}; // per lane of the own warp: accesses up to this clock are ordered before ours

    // while it waits in a collective or barrier
    const char* operation = nullptr;
    u32 mask = 0;
    Site site;
    void* operand = nullptr;

    std::vector<Copy> uncommitted;
    std::deque<std::vector<Copy>> groups;

    ucontext_t start{};
    jmp_buf context{};
    bool has_context = false;

    u32 lane() const { return index % WARP; }
    u32 warp() const { return index / WARP; }
};

// Where lanes of a warp wait for each other.
struct Meeting {
    const Thread* first = nullptr; // to arrive
    u32 present = 0;
};

struct Launch {
    std::string kernel;
    Index grid;
    u32 threads = 0, shared_bytes = 0;
    u64 seed = 0;
    std::string mutant;
    bool detect_races = true;
    std::vector<std::vector<unsigned char>> arguments;
};

struct Current {
    Launch launch;
    const Kernel* kernel = nullptr;
    std::vector<const unsigned char*> arguments;
    std::vector<Thread*> threads;
    std::vector<Thread*> ready;
    std::vector<Meeting> meetings; // per warp, the one that began when there was no other
    Thread* running = nullptr;
    Index block;
    u32 first_serial = 2, serial = 1; // of the launch's first block, and of this block
    Random random;
    Order order = Order::uniform;
    u32 preemption = 0, until_preemption = 0; // mean number of accesses between two preemptions; 0: never
    bool lazy_copies = true;                  // asynchronous copies land when they must, else perhaps at once
    u64 mutant_hits = 0;
    u32 arrived = 0; // at the block barrier
    std::string error;
};

extern Current now;

// Ends the launch with a sentence about a thread. Does not return, runs no destructors of the kernel.
[[noreturn]] void fail(const Thread& thread, const std::string& what);

// Lets another thread run, now and then, where memory is touched.
void maybe_preempt();

// Runs the launch; gives the sentence, empty if all went well.
std::string run(const Launch& launch);

// ---- memory.cpp
void start_shared(u32 bytes);
void check_read_shared(const Thread& thread, shared_address address, void* to, u32 bytes, const char* operation, Site site);
void thread_exits(const Thread& thread);
u64 allocate(const std::string& name, u64 bytes);
std::string release(u64 address);
std::string upload(u64 address, const unsigned char* bytes, u64 count);
std::string download(u64 address, u64 count, std::vector<unsigned char>& bytes);

} // namespace emulator
