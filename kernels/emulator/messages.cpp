// messages.cpp: messages from block to block. A thread that fences tells what it knows by its atomics after the fence. A thread that
// changes the same place later, and then fences too, learns it.
//
// A release is what a thread knew at a fence. Its first atomic at some place after the fence tells it there. Clusters run one after the
// other, and each numbers its parties anew. So in a cluster that hears of a release, the release is a party of its own. Its clock is 1 for
// those who know of it, and barriers there pass it on as they do everything else.
#include "block.hpp"
#include <algorithm>

namespace emulator {

namespace {
struct Release {
    u32 serial; // of the cluster
    Known known;
    std::vector<u32> heard; // the releases of other clusters that its thread knew of
};
std::vector<Release> releases;           // of this launch
std::map<u64, std::vector<u32>> told;    // by address: the releases that were told there, the first one first
std::map<u32, std::vector<Party>> heard; // by number: the parties that stand for the releases of a cluster which this one has heard of

u32 release_of(Party party) { return now.agents[party - now.threads.size()].number; }

// The party that stands for a release of another cluster.
Party party_of(u32 number, const Thread& thread) {
    std::vector<Party>& known = heard[releases[number].serial];
    auto found = std::find_if(known.begin(), known.end(), [number](Party party) { return release_of(party) == number; });
    if (found != known.end()) return *found;
    if (now.threads.size() + now.agents.size() >= NOBODY) fail(thread, "hears of more messages than the emulator can tell apart");
    known.push_back(add_agent(Agent::release, *thread.block, number));
    return known.back();
}

void hear(Join& join, u32 number, const Thread& thread) {
    const Release& release = releases[number];
    if (release.serial == now.serial) join.add(release.known);
    else join.set(party_of(number, thread), 1);
    for (u32 more : release.heard) join.set(party_of(more, thread), 1);
}
} // namespace

void forget_messages() {
    releases.clear();
    told.clear();
}

void forget_hearing() { heard.clear(); }

void fence(Site) {
    maybe_preempt();
    Thread& self = *now.running;
    Join join;
    join.add(self.known);
    for (u32 number : self.unfenced) hear(join, number, self);
    self.unfenced.clear();
    join.set(self.party, self.clock++);
    self.known = self.fenced = join.take();
    self.told.clear();
}

void message(Thread& self, Place at) {
    std::vector<u32>& here = told[reinterpret_cast<u64>(at.bytes())];
    for (u32 number : here)
        if (std::find(self.unfenced.begin(), self.unfenced.end(), number) == self.unfenced.end()) self.unfenced.push_back(number);
    const u64 place = reinterpret_cast<u64>(at.bytes());
    if (self.fenced == nullptr || std::find(self.told.begin(), self.told.end(), place) != self.told.end()) return;
    self.told.push_back(place);
    std::vector<u32> others;
    for (const auto& [serial, parties] : heard)
        for (Party party : parties)
            if (clock_of(*self.fenced, party) != 0) others.push_back(release_of(party));
    here.push_back(static_cast<u32>(releases.size()));
    releases.push_back({now.serial, self.fenced, std::move(others)});
}

bool was_told(const Access& earlier, const Clock& known) {
    auto found = heard.find(earlier.serial);
    if (found == heard.end()) return false;
    return std::any_of(found->second.begin(), found->second.end(), [&](Party party) {
        return clock_of(known, party) != 0 && clock_of(*releases[release_of(party)].known, earlier.party) >= earlier.clock;
    });
}

} // namespace emulator
