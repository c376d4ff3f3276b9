// clocks.cpp: vector clocks put together.
#include "clocks.hpp"
#include <algorithm>

namespace emulator {

namespace {
constexpr std::size_t REMEMBERED = 8;
constexpr u32 FOREVER = 0xffffffff;
} // namespace

void Join::add(const Known& known) {
    if (std::find(added.begin(), added.end(), known) != added.end()) return;
    if (added.size() == REMEMBERED) added.erase(added.begin());
    added.push_back(known);
    const Clock& other = *known;
    if (at.size() < other.size()) at.resize(other.size());
    for (std::size_t i = 0; i < other.size(); ++i) at[i] = std::max(at[i], other[i]);
}

void Join::set(Party party, u32 clock) {
    if (at.size() <= party) at.resize(party + 1u);
    at[party] = std::max(at[party], clock);
}

Known Join::take() {
    Known taken = std::make_shared<const Clock>(std::move(at));
    at.clear();
    added.clear();
    return taken;
}

Known nothing_known() {
    static const Known nothing = std::make_shared<const Clock>();
    return nothing;
}

Known with(const Known& known, Party party, u32 clock) {
    Join join;
    join.add(known);
    join.set(party, clock);
    return join.take();
}

void Common::add(const Known& known, Party self) {
    for (Added& before : added) {
        if (before.known != known) continue;
        // A thread with the same vector was not asked about itself. This is another thread, so that what it knows of that one counts.
        if (before.but != NOBODY && before.but != self) {
            if (before.but < at.size()) at[before.but] = std::min(at[before.but], clock_of(*known, before.but));
            before.but = NOBODY;
        }
        return;
    }
    added.push_back({known, self});
    if (!any) {
        at = *known;
        if (at.size() <= self) at.resize(self + 1u);
        at[self] = FOREVER;
        any = true;
        return;
    }
    // An entry that the sum does not have counts as 0, and so does an entry that this vector does not have.
    for (std::size_t i = 0; i < at.size(); ++i)
        if (i != self) at[i] = std::min(at[i], clock_of(*known, static_cast<Party>(i)));
}

} // namespace emulator
