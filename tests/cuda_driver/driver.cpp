// driver.cpp: a CUDA driver for tests, without a GPU. Built with the emulator and the kernels into a libcuda.so.1, which a child
// process finds on its loader path in place of the real one.
//
// Streams do nothing before they must: work is done when somebody waits, so that whoever reads too early, frees too early or
// orders streams wrongly gets a wrong result. Pageable memory of the host is read when a copy to the device is enqueued, and
// written when a copy from it returns, as the real driver does. While a stream is captured, copies and waits are errors.
//
// SAMTONE_TEST_DRIVER chooses what it lacks: words separated by spaces, each name=number
//   init=N        cuInit gives N            version=N    latest CUDA, 1000·major + 10·minor (default 12040)
//   devices=N     (default 2)               capability=N 10·major + minor (default 80)
//   load=N        cuModuleLoadDataEx gives N, with a log
//   allocations=N the allocation after the N-th gives 2 (out of memory)
//   launches=N    the launch after the N-th faults: 700 from then on
#include "../../kernels/emulator/block.hpp"
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
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
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    ILLEGAL_ADDRESS = 700,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901
};

long setting(const char* name, long otherwise) {
    const char* all = std::getenv("SAMTONE_TEST_DRIVER");
    std::string text = std::string(" ") + (all == nullptr ? "" : all), wanted = std::string(" ") + name + "=";
    std::size_t at = text.find(wanted);
    return at == std::string::npos ? otherwise : std::strtol(text.c_str() + at + wanted.size(), nullptr, 10);
}

struct Context {
    int device = 0, retained = 0;
};

struct Event;

// One thing a stream does. Gives an error code.
using Work = std::function<Code()>;

struct Stream {
    Context* context = nullptr;
    std::deque<Work> work; // not done yet
    bool capturing = false, spoiled = false;
    std::vector<Work> captured;
};

struct Event {
    Stream* stream = nullptr;
    u64 marked = 0; // how many times it was recorded, and how far that is done
    u64 done = 0;
};

struct Graph {
    std::vector<Work> work;
};

struct Function {
    std::string name;
    std::vector<u32> parameters;
    int shared_bytes = 48 << 10;
    Context* context = nullptr;
};

struct Module {
    std::string text;
    Context* context = nullptr;
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
std::map<u64, Allocation> allocations;
std::vector<std::unique_ptr<Stream>> streams;
long allocated = 0, launched = 0;
thread_local std::vector<Context*> current{nullptr};

#define ENTER                                             \
    std::lock_guard<std::recursive_mutex> guard(lock);    \
    if (!initialised) return NOT_INITIALIZED;             \
    if (sticky != DONE) return sticky

Stream* default_stream() {
    static Stream stream;
    return &stream;
}
// One for all threads: stricter orders only fewer things.
Stream* stream_of(void* handle) { return reinterpret_cast<u64>(handle) <= 2 ? default_stream() : static_cast<Stream*>(handle); }

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
    if (stream->capturing) stream->captured.push_back(std::move(work));
    else stream->work.push_back(std::move(work));
    return DONE;
}

// A wait or a copy while a stream is captured fails, and the capture with it.
Code spoil(Stream* stream) {
    stream->spoiled = true;
    return CAPTURE_UNSUPPORTED;
}

// Memory that holds all of these bytes, of a live allocation.
const Allocation* find(u64 address, u64 bytes) {
    auto next = allocations.upper_bound(address);
    if (next == allocations.begin()) return nullptr;
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

extern "C" {
Code cuInit(unsigned) {
    std::lock_guard<std::recursive_mutex> guard(lock);
    if (long code = setting("init", 0); code != 0) return static_cast<Code>(code);
    initialised = true;
    return DONE;
}
Code cuGetErrorString(Code code, const char** text) { // as cudarc prints its errors
    static thread_local std::string last;
    *text = (last = "code " + std::to_string(code) + " of the test driver").c_str();
    return DONE;
}
Code cuDriverGetVersion(int* version) {
    *version = static_cast<int>(setting("version", 12040));
    return DONE;
}
Code cuDeviceGetCount(int* count) {
    ENTER;
    *count = static_cast<int>(setting("devices", 2));
    return DONE;
}
Code cuDeviceGet(int* device, int ordinal) {
    ENTER;
    *device = ordinal;
    return ordinal >= 0 && ordinal < setting("devices", 2) ? DONE : INVALID_DEVICE;
}
Code cuDeviceGetName(char* name, int length, int device) {
    ENTER;
    std::snprintf(name, static_cast<std::size_t>(length), "Test Device %d", device);
    return DONE;
}
Code cuDeviceGetAttribute(int* value, int attribute, int) {
    ENTER;
    const int capability = static_cast<int>(setting("capability", 80));
    *value = attribute == 75 ? capability / 10 : attribute == 76 ? capability % 10 : attribute == 115 ? 1 : 0;
    return DONE;
}
Code cuDevicePrimaryCtxRetain(Context** context, int device) {
    ENTER;
    *context = &contexts[device];
    (*context)->device = device;
    ++(*context)->retained;
    return DONE;
}
Code cuDevicePrimaryCtxRelease_v2(int device) {
    ENTER;
    return contexts[device].retained-- > 0 ? DONE : INVALID_CONTEXT;
}
Code cuCtxGetCurrent(Context** context) {
    ENTER;
    *context = current.back();
    return DONE;
}
Code cuCtxSetCurrent(Context* context) {
    ENTER;
    current.back() = context;
    return DONE;
}
Code cuCtxPushCurrent_v2(Context* context) {
    ENTER;
    current.push_back(context);
    return DONE;
}
Code cuCtxPopCurrent_v2(Context** context) {
    ENTER;
    if (current.size() < 2) return INVALID_CONTEXT;
    *context = current.back();
    current.pop_back();
    return DONE;
}
Code cuCtxSynchronize() {
    ENTER;
    return drain_all();
}

Code cuModuleLoadDataEx(Module** module, const void* image, unsigned count, int* options, void** values) {
    ENTER;
    if (current.back() == nullptr) return INVALID_CONTEXT;
    if (long code = setting("load", 0); code != 0) {
        for (unsigned i = 0; i < count; ++i) // the error log, and its size in the place of a pointer
            if (options[i] == 5) std::strcpy(static_cast<char*>(values[i]), "ptxas error   : planted by the test");
        return static_cast<Code>(code);
    }
    *module = new Module{static_cast<const char*>(image), current.back(), {}};
    return DONE;
}
Code cuModuleUnload(Module* module) {
    ENTER;
    drain_all();
    delete module;
    return DONE;
}
Code cuModuleGetFunction(Function** function, Module* module, const char* name) {
    ENTER;
    std::size_t at = module->text.find(".entry " + std::string(name) + "(");
    if (at == std::string::npos) return NOT_FOUND;
    std::string list = module->text.substr(at, module->text.find(')', at) - at + 1);
    module->functions.push_back(std::make_unique<Function>(Function{name, parameters(list), 48 << 10, module->context}));
    *function = module->functions.back().get();
    return DONE;
}
Code cuFuncSetAttribute(Function* function, int attribute, int value) {
    ENTER;
    if (attribute != 8 || value > 163 << 10) return INVALID_VALUE; // what compute capability 8.0 has
    function->shared_bytes = value;
    return DONE;
}
Code cuLaunchKernel(Function* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned,
                    unsigned shared_bytes, void* handle, void** values, void**) {
    ENTER;
    Stream* stream = stream_of(handle);
    if (function->context != current.back()) return INVALID_CONTEXT;
    if (stream->context != nullptr && stream->context != current.back()) return INVALID_HANDLE;
    if (static_cast<int>(shared_bytes) > function->shared_bytes) return INVALID_VALUE;
    emulator::Launch launch;
    launch.kernel = function->name;
    launch.grid = {x, y, z};
    launch.threads = threads;
    launch.shared_bytes = shared_bytes;
    for (std::size_t i = 0; i < function->parameters.size(); ++i) {
        const auto* bytes = static_cast<const unsigned char*>(values[i]);
        launch.arguments.emplace_back(bytes, bytes + function->parameters[i]);
    }
    const bool faults = launched++ >= setting("launches", 1L << 40);
    return enqueue(stream, [launch, faults] {
        if (faults) return fault("a launch that was told to fault");
        std::string error = emulator::run(launch);
        return error.empty() ? DONE : fault(error);
    });
}

Code cuMemAlloc_v2(u64* pointer, std::size_t bytes) {
    ENTER;
    return allocate(pointer, bytes);
}
Code cuMemAllocAsync(u64* pointer, std::size_t bytes, void*) {
    ENTER;
    return allocate(pointer, bytes);
}
Code cuMemFree_v2(u64 pointer) {
    ENTER;
    if (Code code = drain_all(); code != DONE) return code;
    return release(pointer);
}
Code cuMemFreeAsync(u64 pointer, void* stream) {
    ENTER;
    return enqueue(stream_of(stream), [pointer] { return release(pointer); });
}
Code cuMemcpyHtoDAsync_v2(u64 to, const void* from, std::size_t bytes, void* handle) {
    ENTER;
    Stream* stream = stream_of(handle);
    if (stream->capturing) return spoil(stream); // a graph would read the host's memory again, when it is gone
    if (find(to, bytes) == nullptr) return INVALID_VALUE;
    const auto* start = static_cast<const unsigned char*>(from);
    return enqueue(stream, [to, content = std::vector<unsigned char>(start, start + bytes)] { return write(to, content); });
}
Code cuMemcpyDtoHAsync_v2(void* to, u64 from, std::size_t bytes, void* handle) {
    ENTER;
    Stream* stream = stream_of(handle);
    if (stream->capturing) return spoil(stream);
    if (find(from, bytes) == nullptr) return INVALID_VALUE;
    if (Code code = drain(*stream); code != DONE) return code;
    std::vector<unsigned char> content;
    if (std::string error = emulator::download(from, bytes, content); !error.empty()) return sticky = fault(error);
    std::copy(content.begin(), content.end(), static_cast<unsigned char*>(to));
    return DONE;
}
Code cuMemsetD32Async(u64 to, unsigned value, std::size_t count, void* stream) {
    ENTER;
    if (find(to, 4 * count) == nullptr) return INVALID_VALUE;
    std::vector<unsigned char> content(4 * count);
    for (std::size_t i = 0; i < count; ++i) std::memcpy(content.data() + 4 * i, &value, 4);
    return enqueue(stream_of(stream), [to, content] { return write(to, content); });
}
Code cuMemsetD8Async(u64 to, unsigned char value, std::size_t count, void* stream) {
    ENTER;
    if (find(to, count) == nullptr) return INVALID_VALUE;
    return enqueue(stream_of(stream), [to, content = std::vector<unsigned char>(count, value)] { return write(to, content); });
}
Code cuPointerGetAttribute(void* data, int attribute, u64 pointer) {
    ENTER;
    const Allocation* found = find(pointer, 1);
    if (found == nullptr) return INVALID_VALUE;
    const u64 start = std::prev(allocations.upper_bound(pointer))->first;
    switch (attribute) {
    case 8: *static_cast<unsigned*>(data) = 0; return DONE;
    case 9: *static_cast<int*>(data) = found->context->device; return DONE;
    case 11: *static_cast<u64*>(data) = start; return DONE;
    case 12: *static_cast<std::size_t*>(data) = found->bytes; return DONE;
    default: return INVALID_VALUE;
    }
}

Code cuStreamCreate(Stream** stream, unsigned) {
    ENTER;
    streams.push_back(std::make_unique<Stream>());
    *stream = streams.back().get();
    (*stream)->context = current.back();
    return DONE;
}
Code cuStreamDestroy_v2(Stream* stream) { // its work goes on; here it is done at once. Events still point to it
    ENTER;
    return drain(*stream);
}
Code cuStreamSynchronize(void* handle) {
    ENTER;
    Stream* stream = stream_of(handle);
    return stream->capturing ? spoil(stream) : drain(*stream);
}
Code cuStreamWaitEvent(void* handle, Event* event, unsigned) {
    ENTER;
    if (event->stream == nullptr) return DONE;
    return enqueue(stream_of(handle), [event, stream = event->stream, mark = event->marked] {
        return drain(*stream, [event, mark] { return event->done >= mark; });
    });
}
Code cuStreamIsCapturing(void* handle, int* status) {
    ENTER;
    *status = stream_of(handle)->capturing ? 1 : 0;
    return DONE;
}
Code cuStreamBeginCapture_v2(void* handle, int) {
    ENTER;
    Stream* stream = stream_of(handle);
    if (stream == default_stream() || stream->capturing) return CAPTURE_UNSUPPORTED;
    stream->capturing = true;
    return DONE;
}
Code cuStreamEndCapture(void* handle, Graph** graph) {
    ENTER;
    Stream* stream = stream_of(handle);
    *graph = new Graph{std::move(stream->captured)};
    stream->captured.clear();
    stream->capturing = false;
    return std::exchange(stream->spoiled, false) ? CAPTURE_INVALIDATED : DONE;
}
Code cuGraphInstantiateWithFlags(Graph** executable, Graph* graph, unsigned long long) {
    ENTER;
    *executable = new Graph(*graph);
    return DONE;
}
Code cuGraphLaunch(Graph* graph, void* stream) {
    ENTER;
    for (const Work& work : graph->work) enqueue(stream_of(stream), work);
    return DONE;
}
Code cuGraphDestroy(Graph* graph) {
    delete graph;
    return DONE;
}
Code cuGraphExecDestroy(Graph* graph) {
    delete graph;
    return DONE;
}

Code cuEventCreate(Event** event, unsigned) {
    ENTER;
    *event = new Event;
    return DONE;
}
Code cuEventRecord(Event* event, void* handle) {
    ENTER;
    event->stream = stream_of(handle);
    return enqueue(event->stream, [event, mark = ++event->marked] {
        event->done = mark;
        return DONE;
    });
}
Code cuEventDestroy_v2(Event*) { return DONE; } // waits may still be enqueued: kept until the process ends
}
