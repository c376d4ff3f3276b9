// driver.hpp: what the driver for tests keeps: contexts, streams and their work, events, graphs, modules, memory. Included once.
#pragma once
#include "../../kernels/emulator/block.hpp"
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace {
using Code = int;
enum : Code {
    DONE = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    INVALID_DEVICE = 101,
    INVALID_CONTEXT = 201,
    INVALID_PTX = 218,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    ILLEGAL_ADDRESS = 700,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
    CAPTURE_ISOLATION = 905,
    CAPTURED_EVENT = 907
};

long setting(const char* name, long otherwise) {
    const char* all = std::getenv("SAMTONE_TEST_DRIVER");
    std::string text = std::string(" ") + (all == nullptr ? "" : all), wanted = std::string(" ") + name + "=";
    std::size_t at = text.find(wanted);
    return at == std::string::npos ? otherwise : std::strtol(text.c_str() + at + wanted.size(), nullptr, 10);
}

// 99 KiB: the least of 8.0 and later, that of 8.6, 8.9, 12.0.
int most_shared_bytes() { return (setting("capability", 80) == 90 ? 227 : 99) << 10; }

struct Context {
    int device = 0, retained = 0;
};

struct Event;

// One thing a stream does. Gives an error code.
using Work = std::function<Code()>;

struct Stream {
    Context* context = nullptr;
    std::deque<Work> work; // not done yet
    bool capturing = false, spoiled = false, brittle = false; // brittle: spoiled before its third launch
    int mode = 0; // of the capture: 0 global, 1 of the thread that began it, 2 relaxed
    std::thread::id capturer;
    std::vector<Work> captured;
};

struct Event {
    Stream* stream = nullptr;
    u64 marked = 0; // how many times it was recorded, and how far that is done
    u64 done = 0;
    std::chrono::steady_clock::time_point reached; // when that was
    bool captured = false; // recorded into a graph, the last time
};

struct Graph {
    std::vector<Work> work;
};

struct Function {
    std::string name;
    std::vector<u32> parameters;
    int shared_bytes = 48 << 10;
    Context* context = nullptr;
    std::shared_ptr<bool> loaded;
    bool waits = false; // by an instruction, for launches before it
};

// As `cuda.h` has them.
struct LaunchAttribute {
    int id;
    char padding[4];
    union {
        char bytes[64];
        int value;
    };
};
struct LaunchConfig {
    unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
    void* stream;
    LaunchAttribute* attributes;
    unsigned attribute_count;
};
static_assert(sizeof(LaunchAttribute) == 72 && sizeof(LaunchConfig) == 56, "of 64 bits");

enum : unsigned { HOST = 1, DEVICE = 2 };
struct Side2D {
    std::size_t x, y;
    unsigned type;
    void* host;
    u64 device;
    void* array;
    std::size_t pitch;
};
struct Copy2D {
    Side2D from, to;
    std::size_t width, height;
};
static_assert(sizeof(Copy2D) == 128, "of 64 bits");

struct Module {
    std::string text;
    Context* context = nullptr;
    std::shared_ptr<bool> loaded = std::make_shared<bool>(true);
    std::vector<std::unique_ptr<Function>> functions;
};

struct Allocation {
    u64 bytes = 0;
    Context* context = nullptr;
};

std::recursive_mutex lock;
bool initialised = false;
Code sticky = DONE;
Context contexts[8];
std::map<u64, Allocation> allocations, pinned; // of devices, and page-locked on the host
std::vector<std::unique_ptr<Stream>> streams;
std::set<Graph*> graphs, executables;
long allocated = 0, launched = 0, loaded = 0, captures = 0;
thread_local std::vector<Context*> current{nullptr};

#define ENTER                                             \
    std::lock_guard<std::recursive_mutex> guard(lock);    \
    if (!initialised) return NOT_INITIALIZED;             \
    if (sticky != DONE) return sticky

Stream* default_stream() {
    static Stream stream;
    return &stream;
}
// The default stream of a thread is another for each thread, and outlives it.
Stream* thread_stream() {
    static thread_local Stream* stream = nullptr;
    if (stream == nullptr) stream = streams.emplace_back(std::make_unique<Stream>()).get();
    return stream;
}
Stream* stream_of(void* handle) {
    const u64 number = reinterpret_cast<u64>(handle);
    return number == 2 ? thread_stream() : number < 2 ? default_stream() : static_cast<Stream*>(handle);
}

// Does what the stream has to do, until `enough` or until nothing is left.
Code drain(Stream& stream, const std::function<bool()>& enough = [] { return false; }) {
    while (sticky == DONE && !stream.work.empty() && !enough()) {
        Work work = std::move(stream.work.front());
        stream.work.pop_front();
        sticky = work();
    }
    return sticky;
}

// Everything, the last stream first, so that nothing is ordered by chance.
Code drain_all() {
    for (auto stream = streams.rbegin(); stream != streams.rend(); ++stream)
        if (Code code = drain(**stream); code != DONE) return code;
    return drain(*default_stream());
}

Code enqueue(Stream* stream, Work work) {
    if (stream->brittle && stream->captured.size() == 2) stream->spoiled = true;
    if (stream->spoiled) return CAPTURE_INVALIDATED;
    if (stream->capturing) stream->captured.push_back(std::move(work));
    else stream->work.push_back(std::move(work));
    return DONE;
}

// A wait or a copy while a stream is captured fails, and the capture with it.
Code spoil(Stream* stream) {
    stream->spoiled = true;
    return CAPTURE_UNSUPPORTED;
}

// A call that may wait for a stream, or for all: not allowed to a thread, or to any, while a stream is captured.
Code unsafe_call(bool waits = false) {
    Code code = DONE;
    for (auto& stream : streams)
        if (stream->capturing && (waits || stream->mode == 0 || (stream->mode == 1 && stream->capturer == std::this_thread::get_id())))
            code = spoil(stream.get());
    return code;
}

// Memory that holds all of these bytes, of a live allocation.
const Allocation* find(const std::map<u64, Allocation>& all, u64 address, u64 bytes) {
    auto next = all.upper_bound(address);
    if (next == all.begin()) return nullptr;
    auto found = std::prev(next);
    return address + bytes <= found->first + found->second.bytes ? &found->second : nullptr;
}

Code fault(const std::string& sentence) {
    std::fprintf(stderr, "test driver: %s\n", sentence.c_str());
    return ILLEGAL_ADDRESS;
}

Code write(u64 to, const std::vector<unsigned char>& bytes) {
    std::string error = emulator::upload(to, bytes.data(), bytes.size());
    return error.empty() ? DONE : fault(error);
}

Code allocate(u64* pointer, std::size_t bytes) {
    if (bytes == 0 || current.back() == nullptr) return bytes == 0 ? INVALID_VALUE : INVALID_CONTEXT;
    if (allocated++ >= setting("allocations", 1L << 40)) return OUT_OF_MEMORY;
    *pointer = emulator::allocate("allocation " + std::to_string(allocated), bytes);
    allocations[*pointer] = {bytes, current.back()};
    return DONE;
}

Code keep(std::set<Graph*>& all, Graph** graph, std::vector<Work> work) {
    if (static_cast<long>(all.size()) >= setting("graphs", 1L << 40)) return OUT_OF_MEMORY;
    all.insert(*graph = new Graph{std::move(work)});
    return DONE;
}

Code destroy(std::set<Graph*>& all, Graph* graph) {
    if (all.erase(graph) == 0) return INVALID_VALUE;
    delete graph;
    return DONE;
}

Code release(u64 pointer) {
    if (allocations.erase(pointer) == 0) return INVALID_VALUE;
    std::string error = emulator::release(pointer);
    return error.empty() ? DONE : fault(error);
}

std::vector<u32> parameters(const std::string& list) {
    std::vector<u32> all;
    for (std::size_t at = list.find(".param"); at != std::string::npos; at = list.find(".param", at + 1)) {
        std::string one = list.substr(at + 6, list.find_first_of(",)", at) - at - 6);
        std::size_t open = one.find('['), type = one.rfind('.', open == std::string::npos ? one.size() : open);
        u32 bits = static_cast<u32>(std::strtoul(one.c_str() + type + 2, nullptr, 10));
        const bool array = open != std::string::npos;
        all.push_back(bits / 8 * (array ? static_cast<u32>(std::strtoul(one.c_str() + open + 1, nullptr, 10)) : 1));
    }
    return all;
}
} // namespace
