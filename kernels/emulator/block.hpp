// block.hpp: the state of a launch, which the emulator's own files share. Kernels never see it. In the emulator a block is a thread block.
#pragma once
#include "../common/platform.cuh"
#include "memory.hpp"
#include <array>
#include <csetjmp>
#include <map>
#include <memory>
#include <string>
#include <ucontext.h>

namespace emulator {

constexpr u32 WARPGROUP_THREADS = 128;

// splitmix64. It is small, and gives the same numbers on every machine.
struct Random {
    u64 state = 0;
    u64 next();
    u32 below(u32 bound) { return static_cast<u32>((next() >> 32) * bound >> 32); }
};

SiteNumber number_of(Site site);
std::string place(Site site);
std::string place(SiteNumber number);

// cp.async
struct Copy {
    shared_address to;
    const void* from;
    u32 bytes, source_bytes;
    bool landed;
    const char* operation;
    Site site;
};

// cp.async.bulk from shared to global memory.
struct Store {
    Place to, from;
    u32 bytes;
    Site site;
    std::vector<unsigned char> read; // what lay in shared memory, once the copy has read it
};
struct StoreGroup {
    u32 number;
    std::vector<Store> stores;
};

// Which ready thread goes on: any; or mostly the thread that ranks highest; or mostly one of the group (warp, warpgroup, block) that ranks
// highest. In the last two cases some threads run far ahead.
enum class Order { uniform, by_thread, by_group };

enum class State { ready, collective, barrier, cluster_barrier, named_barrier, mbarrier, warpgroup, exited };

struct Block;

// What a thread has done in its block so far.
struct Progress {
    State state = State::exited;
    u64 priority = 0;
    u32 clock = 1;
    Known known;
    std::vector<u32> fences; // up to which clocks its stores are visible to asynchronous reads as well

    Known fenced;              // what it knew at its last fence, which its atomics tell other blocks; null: it has not fenced
    std::vector<u64> told;     // at which places its atomics told it
    std::vector<u32> unfenced; // releases that its atomics found. The thread knows of them after its next fence
    bool waited = false;       // for the launches before this one

    // These say what it waits for.
    const char* operation = nullptr;
    u32 mask = 0;
    Site site;
    void* operand = nullptr;
    u32 waits_at = 0, waits_for = 0; // mbarrier and parity, or named barrier and threads

    std::vector<Copy> uncommitted;
    std::vector<std::vector<Copy>> groups;

    Party store_agent = NOBODY; // the party of its reading stores; the next party is that of its writing stores
    u32 store_groups = 0;       // how many groups it has committed
    std::vector<Store> uncommitted_stores;
    std::vector<StoreGroup> stores;

    u32 wgmmas = 0, wgmma_groups = 0, wgmma_waited = 0, last_wgmma_group = 0;
    bool wgmma_fenced = false;
    Site wgmma_site;
    u32 register_changes = 0;
};

// One CUDA thread.
struct Thread : Progress {
    u32 index = 0;
    Party party = 0;
    Block* block = nullptr;

    ucontext_t start{};
    jmp_buf context{};
    bool has_context = false;

    u32 lane() const { return index % WARP; }
    u32 warp() const { return index / WARP; }
};

// A place where lanes of a warp wait for each other.
struct Meeting {
    const Thread* first = nullptr; // the first lane to arrive
    u32 present = 0;
};

struct NamedBarrier {
    u32 threads = 0; // how many shall meet, as the first to arrive says
    std::vector<Thread*> arrived;
};

struct Mbarrier {
    u32 offset = 0, count = 0;
    u32 phase = 0, pending = 0;
    i64 bytes = 0; // expected and not yet copied; if negative, copied and not yet expected
    Party agent = NOBODY, maker = NOBODY;
    u32 made_at = 0; // the clock of its maker
    bool fenced = false;
    Site site;
    Join arrivals;
    Known done;                                  // what the phases before have done
    std::vector<std::pair<Known, Known>> waited; // what a thread knew before it waited for the phase, and what it knew then
    std::vector<Thread*> waiters;
};

struct Warpgroup;

// The threads that wait at a barrier of all threads of a block, or of a cluster. All wait at the line of the first.
struct Gathering {
    u32 count = 0;
    const Thread* first = nullptr;
};

struct Block {
    Index index;
    u32 rank = 0;
    std::vector<Thread*> threads;
    u32 live = 0; // how many threads have not ended
    Memory shared;
    Gathering arrived;             // at bar.sync
    std::vector<Meeting> meetings; // for each warp, the meeting that began when there was no other
    std::array<NamedBarrier, 16> named;
    std::map<u32, Mbarrier> mbarriers; // by offset
    std::vector<std::shared_ptr<Warpgroup>> warpgroups;
};

// A party that acts behind a thread's back. An mbarrier makes the copies that it counts. A warpgroup makes products, as one party for each
// warp that waits for them. The bulk stores of a thread are two parties, for reading and for writing. And what a thread of another cluster
// did up to a fence, a release, is a party.
struct Agent {
    enum Kind { mbarrier, wgmma, store_reads, store_writes, release } kind;
    const Block* block;
    u32 number; // offset of the mbarrier, or number of the warpgroup, thread or release
};

struct Launch {
    std::string kernel;
    Index grid;
    u32 threads = 0, shared_bytes = 0;
    u64 seed = 0;
    std::string mutant;
    bool detect_races = true;
    bool overlaps = false; // begins before the launches before it are complete
    std::vector<std::vector<unsigned char>> arguments;
};

// The part of a bulk copy that goes into one block.
struct Load {
    Block* block;
    u32 to;
    Place from;
    u32 bytes;
    Mbarrier* mbarrier;
    const Thread* thread;
    Site site;
};

struct Current {
    Launch launch;
    const Kernel* kernel = nullptr;
    std::vector<const unsigned char*> arguments;
    std::vector<Block*> blocks;   // of the cluster
    std::vector<Thread*> threads; // of all these blocks, by party
    std::vector<Agent> agents;    // the parties that follow the threads
    std::vector<Thread*> ready;
    std::vector<Load> loads;   // under way
    std::vector<Store> stores; // have read, and have not written yet
    Thread* running = nullptr;
    u32 first_serial = 2, serial = 1; // of the launch's first cluster, and of this cluster
    Random random;
    Order order = Order::uniform;
    u32 preemption = 0, until_preemption = 0; // the mean number of accesses between two preemptions; 0: never
    bool lazy_copies = true;                  // asynchronous copies land only when they must. Else they may land at once
    u64 mutant_hits = 0;
    Gathering cluster_arrived; // at barrier.cluster
    std::string error;
};

extern Current now;

// ---- scheduler.cpp
// Ends the launch with a sentence about a thread. It does not return, and runs no destructors of the kernel.
[[noreturn]] void fail(const Thread& thread, const std::string& what);
// Lets another thread run now and then. Called where memory is touched.
void maybe_preempt();
// The running thread gives way until somebody makes it ready.
void suspend();
void make_ready(Thread& thread);
// Called when the running thread is about to wait.
void wait(Thread& self, State state, const char* operation, u32 mask, Site site, void* operand);
std::string waits(const Thread& thread);
// How the sentence of another thread, `to`, names a thread.
std::string name_of(const Thread& thread, const Thread& to);
std::string name_of(const Block& block);
bool same_text(const char* a, const char* b);
bool same_site(Site a, Site b);
// Runs the launch. Gives the sentence that says what went wrong, or an empty one.
std::string run(const Launch& launch);

// ---- barriers.cpp
// Lanes of a warp meet. The last to arrive computes for all of them: `complete` gets all lanes of the warp.
void rendezvous(const char* operation, u32 mask, Site site, void* operand, void (*complete)(Thread* const*));
// What each of these threads did before is ordered before what any of them does later.
void meet(Thread* const* threads, std::size_t count);
// Fails if somebody waits for this thread, which ends.
void nobody_waits_for(const Thread& self);

// ---- memory.cpp: for a launch that overlaps with those before it
void overlap_exit(const Thread& thread);

// ---- messages.cpp
void forget_messages(); // of the launch before
void forget_hearing();  // of the cluster before
// Called at an atomic of the running thread, with its place.
void message(Thread& self, Place at);
// Whether this access by another cluster of the launch is ordered before what a party does that knows `known`.
bool was_told(const Access& earlier, const Clock& known);

// ---- memory.cpp
// Who accesses memory, and what is noted of it.
struct Actor {
    const Thread& thread; // the thread that sentences name
    const Clock& known;
    Party self; // whose own accesses are ordered anyway
    bool async; // reads by the asynchronous proxy
    Access access;
};
Actor actor_of(const Thread& thread, Site site);
Party add_agent(Agent::Kind kind, const Block& block, u32 number);
void start_shared(Block& block, u32 bytes);
Place shared_place(const Thread& thread, Block& block, shared_address address, u32 bytes, u32 alignment, const char* operation,
                   const char* what, Site site);
Place global_place(const Thread& thread, const void* address, u32 bytes, u32 alignment, const char* operation, const char* what, Site site);
void note_read(const Actor& actor, Place at, u32 bytes, Way way, const char* operation, Site site);
// `what` says how: "writes" or "copies".
void note_write(const Actor& actor, Place at, u32 bytes, const char* operation, const char* what, Site site);
// Makes this access the only history of the bytes.
void set_writer(Place at, u32 bytes, const Access& access);
std::string bytes_at(u32 bytes, const char* what, Place at);
void check_read_shared(const Thread& thread, shared_address address, void* to, u32 bytes, const char* operation, Site site);
void check_write_shared(const Thread& thread, shared_address address, const void* from, u32 bytes, const char* operation, Site site);

// ---- what a thread must not leave behind, and what happens behind its back
void copies_exit(const Thread& thread);  // copies.cpp
void stores_exit(Thread& thread);        // bulk.cpp
void loads_exit(const Thread& last);     // bulk.cpp: called for the last thread of a block
bool land_one();                         // bulk.cpp: gives false if none is under way
void write_stores();                     // bulk.cpp: at the end of a cluster
void mbarriers_exit(const Thread& last); // mbarrier.cpp
Mbarrier& mbarrier_for_copy(const Thread& self, Block& block, shared_address address, const char* operation, Site site);
void copied(const Thread& thread, Block& block, Mbarrier& mbarrier, u32 bytes, Site site); // mbarrier.cpp
std::string waits_for_mbarrier(const Thread& thread);
void warpgroup_exit(const Thread& thread); // warpgroup.cpp

// ---- host.cpp
u64 allocate(const std::string& name, u64 bytes);
std::string release(u64 address);
std::string upload(u64 address, const unsigned char* bytes, u64 count);
std::string download(u64 address, u64 count, std::vector<unsigned char>& bytes);
Place find(u64 address);

} // namespace emulator
