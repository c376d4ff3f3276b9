// clocks.hpp: who knows what: vector clocks, by which accesses are ordered.
//
// Every party counts its own time: a thread goes on by one where it tells others what it did (an arrival, a barrier) and
// where it fences; an agent, which acts behind a thread's back, with every phase or group. What a party knows of others is a
// vector: all that party p did up to at[p] is ordered before what it does now. Vectors never change once made, and are
// shared: all threads that meet at a barrier have the same one, so that knowing costs nothing per thread.
#pragma once
#include "../common/platform.cuh"
#include <memory>
#include <vector>

namespace emulator {

// Number of a thread in its cluster, or beyond these that of an agent.
using Party = u16;
constexpr Party NOBODY = 0xffff;

using Clock = std::vector<u32>;
using Known = std::shared_ptr<const Clock>;

// Parties that joined later have done nothing that an older vector could know.
inline u32 clock_of(const Clock& at, Party party) { return party < at.size() ? at[party] : 0; }

// Puts together what several parties know and did.
class Join {
  public:
    void add(const Known& known);
    void set(Party party, u32 clock);
    // The sum, and starts anew.
    Known take();

  private:
    Clock at;
    std::vector<Known> added; // the last few: threads that met have the same
};

Known nothing_known();
Known with(const Known& known, Party party, u32 clock);

// What all of several threads know, each of which also knows all that it did itself.
class Common {
  public:
    void add(const Known& known, Party self);
    const Clock& value() const { return at; }

  private:
    struct Added {
        Known known;
        Party but; // it was not asked of itself; NOBODY: fully added
    };
    bool any = false;
    Clock at;
    std::vector<Added> added;
};

} // namespace emulator
