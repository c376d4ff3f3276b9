// clocks.hpp: who knows what. Vector clocks order accesses.
//
// Every party counts its own time. A thread goes on by one where it tells others what it did (at an arrival or a barrier) and where it
// fences. An agent, which acts behind a thread's back, goes on with every phase or group. What a party knows of others is a vector:
// everything that party p did up to at[p] is ordered before what this party does now. A vector never changes once it is made, and is
// shared. All threads that meet at a barrier have the same one, so that their knowledge takes no memory for each thread.
#pragma once
#include "../common/platform.cuh"
#include <memory>
#include <vector>

namespace emulator {

// The number of a thread in its cluster. Numbers beyond those of the threads are agents.
using Party = u16;
constexpr Party NOBODY = 0xffff;

using Clock = std::vector<u32>;
using Known = std::shared_ptr<const Clock>;

// An older vector can know nothing of parties that joined later, and has no entries for them.
inline u32 clock_of(const Clock& at, Party party) { return party < at.size() ? at[party] : 0; }

// Puts together what several parties know and did.
class Join {
public:
    void add(const Known& known);
    void set(Party party, u32 clock);
    // Gives the sum, and starts anew.
    Known take();

private:
    Clock at;
    std::vector<Known> added; // the last few vectors that were added. Threads that met have the same
};

Known nothing_known();
Known with(const Known& known, Party party, u32 clock);

// What all of several threads know, if each of them also knows everything that it did itself.
class Common {
public:
    void add(const Known& known, Party self);
    const Clock& value() const { return at; }

private:
    struct Added {
        Known known;
        Party but; // the party that was not asked about itself; NOBODY: fully added
    };
    bool any = false;
    Clock at;
    std::vector<Added> added;
};

} // namespace emulator
