// driver.cpp: a CUDA driver for tests, without a GPU. Built with the emulator and the kernels into a libcuda.so.1, which a child
// process finds on its loader path in place of the real one.
//
// Streams do nothing before they must: work is done when somebody waits, so that whoever reads too early, frees too early or
// orders streams wrongly gets a wrong result. Pageable memory of the host is read when a copy to the device is enqueued, and
// written when a copy from it returns, as the real driver mostly does; `late` has it read when the stream gets there, which the
// description of the driver's API allows. While a stream is captured, allocations, copies, waits and loading are errors, and
// spoil the capture.
//
// SAMTONE_TEST_DRIVER chooses what it lacks: words separated by spaces, each name=number
//   init=N        cuInit gives N            version=N    latest CUDA, 1000·major + 10·minor (default 12040)
//   devices=N     (default 2)               capability=N 10·major + minor (default 80)
//   load=N        cuModuleLoadDataEx gives N, with a log
//   loads=N       the module after the N-th gives 218
//   allocations=N the allocation after the N-th gives 2 (out of memory)
//   launches=N    the launch after the N-th faults: 700 from then on
//   refused=N     the launch after the N-th gives 1, and those after it are done again
//   plain=1       a launch that may overlap with the one before gives 1
//   captures=N    the capture after the N-th is spoiled before its third launch
//   graphs=N      no more than N graphs, and as many executables, at a time: 2 for the next
//   late=N        copies of N bytes or more read the host's memory late
#include "driver.hpp"

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
    static const std::map<int, int> limits = {{1, 1024}, {2, 1024}, {3, 1024}, {4, 64}, {5, 2147483647}, {6, 65535}, {7, 65535}};
    switch (attribute) {
    case 10: *value = 32; break; // threads of a warp
    case 16: *value = 4; break; // multiprocessors
    case 75: *value = capability / 10; break;
    case 76: *value = capability % 10; break;
    case 97: *value = most_shared_bytes(); break;
    case 115: *value = 1; break; // pools of memory
    default: *value = limits.contains(attribute) ? limits.at(attribute) : 0; // of threads, and of a block's and a grid's edges
    }
    return DONE;
}
Code cuDeviceTotalMem_v2(std::size_t* bytes, int) {
    ENTER;
    *bytes = std::size_t{8} << 30;
    return DONE;
}
Code cuDeviceGetPCIBusId(char* id, int length, int device) {
    ENTER;
    std::snprintf(id, static_cast<std::size_t>(length), "0000:%02x:00.0", device);
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
Code cuDevicePrimaryCtxGetState(int device, unsigned* flags, int* active) {
    ENTER;
    *flags = 0;
    *active = contexts[device].retained > 0 ? 1 : 0;
    return DONE;
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
    if (Code code = unsafe_call(true); code != DONE) return code;
    return drain_all();
}

Code cuModuleLoadDataEx(Module** module, const void* image, unsigned count, int* options, void** values) {
    ENTER;
    if (current.back() == nullptr) return INVALID_CONTEXT;
    if (Code code = unsafe_call(); code != DONE) return code;
    if (long code = setting("load", 0); code != 0) {
        for (unsigned i = 0; i < count; ++i) // the error log, and its size in the place of a pointer
            if (options[i] == 5) std::strcpy(static_cast<char*>(values[i]), "ptxas error   : planted by the test");
        return static_cast<Code>(code);
    }
    if (loaded++ >= setting("loads", 1L << 40)) return INVALID_PTX;
    const bool later = std::strstr(static_cast<const char*>(image), "\n.target sm_90") != nullptr;
    if (later && setting("capability", 80) < 90) return INVALID_PTX;
    *module = new Module;
    (*module)->text = static_cast<const char*>(image);
    (*module)->context = current.back();
    return DONE;
}
Code cuModuleUnload(Module* module) {
    ENTER;
    if (Code code = unsafe_call(); code != DONE) return code;
    *module->loaded = false; // whatever still is to run of it faults
    delete module;
    return DONE;
}
Code cuModuleGetFunction(Function** function, Module* module, const char* name) {
    ENTER;
    std::size_t at = module->text.find(".entry " + std::string(name) + "(");
    if (at == std::string::npos) return NOT_FOUND;
    std::string list = module->text.substr(at, module->text.find(')', at) - at + 1);
    module->functions.push_back(std::make_unique<Function>(Function{name, parameters(list), 48 << 10, module->context, module->loaded}));
    const std::size_t body = module->text.find('{', at), next = module->text.find(".entry ", body);
    const std::size_t wait = module->text.find("\n\tgriddepcontrol.wait;", body);
    module->functions.back()->waits = wait < next;
    *function = module->functions.back().get();
    return DONE;
}
Code cuFuncSetAttribute(Function* function, int attribute, int value) {
    ENTER;
    if (attribute != 8 || value > most_shared_bytes()) return INVALID_VALUE;
    function->shared_bytes = value;
    return DONE;
}
static Code launch_kernel(Function* function, unsigned x, unsigned y, unsigned threads, unsigned shared_bytes, void* handle,
                          void** values, bool overlaps) {
    Stream* stream = stream_of(handle);
    if (function->context != current.back()) return INVALID_CONTEXT;
    if (stream->context != nullptr && stream->context != current.back()) return INVALID_HANDLE;
    if (static_cast<int>(shared_bytes) > function->shared_bytes) return INVALID_VALUE;
    emulator::Launch launch;
    launch.kernel = function->name;
    launch.grid = {x, y, 1};
    launch.overlaps = overlaps;
    launch.threads = threads;
    launch.shared_bytes = shared_bytes;
    for (std::size_t i = 0; i < function->parameters.size(); ++i) {
        const auto* bytes = static_cast<const unsigned char*>(values[i]);
        launch.arguments.emplace_back(bytes, bytes + function->parameters[i]);
    }
    if (x == 0 || y == 0 || y > 65535 || threads > 1024) return INVALID_VALUE;
    if (launched == setting("refused", -1)) return ++launched, INVALID_VALUE;
    const bool faults = launched++ >= setting("launches", 1L << 40);
    return enqueue(stream, [launch, faults, loaded = function->loaded] {
        if (!*loaded) return fault("a kernel of a module that was unloaded");
        if (faults) return fault("a launch that was told to fault");
        std::string error = emulator::run(launch);
        return error.empty() ? DONE : fault(error);
    });
}
Code cuLaunchKernel(Function* function, unsigned x, unsigned y, unsigned, unsigned threads, unsigned, unsigned,
                    unsigned shared_bytes, void* handle, void** values, void**) {
    ENTER;
    return launch_kernel(function, x, y, threads, shared_bytes, handle, values, false);
}
Code cuLaunchKernelEx(const LaunchConfig* config, Function* function, void** values, void**) {
    ENTER;
    const auto& [x, y, z, threads, block_y, block_z, shared_bytes, stream, attributes, count] = *config;
    if (z != 1 || block_y != 1 || block_z != 1 || count != 1 || attributes->id != 6 || attributes->value != 1) return INVALID_VALUE;
    if (!function->waits || setting("version", 12040) < 12030 || setting("plain", 0) != 0) return INVALID_VALUE;
    return launch_kernel(function, x, y, threads, shared_bytes, stream, values, true);
}

Code cuMemAlloc_v2(u64* pointer, std::size_t bytes) {
    ENTER;
    if (Code code = unsafe_call(); code != DONE) return code;
    return allocate(pointer, bytes);
}
Code cuMemAllocAsync(u64* pointer, std::size_t bytes, void* stream) {
    ENTER;
    if (stream_of(stream)->capturing) return spoil(stream_of(stream)); // it would be memory of the graph, gone between replays
    return allocate(pointer, bytes);
}
Code cuMemHostAlloc(void** pointer, std::size_t bytes, unsigned) {
    ENTER;
    *pointer = std::malloc(bytes);
    pinned[reinterpret_cast<u64>(*pointer)] = {bytes, current.back()};
    return DONE;
}
Code cuMemAllocHost_v2(void** pointer, std::size_t bytes) { return cuMemHostAlloc(pointer, bytes, 0); }
Code cuMemFreeHost(void* pointer) {
    ENTER;
    if (pinned.erase(reinterpret_cast<u64>(pointer)) == 0) return INVALID_VALUE;
    std::free(pointer);
    return DONE;
}
Code cuMemFree_v2(u64 pointer) {
    ENTER;
    if (Code code = unsafe_call(); code != DONE) return code;
    if (Code code = drain_all(); code != DONE) return code;
    return release(pointer);
}
Code cuMemFreeAsync(u64 pointer, void* stream) {
    ENTER;
    if (stream_of(stream)->capturing) return stream_of(stream)->spoiled = true, INVALID_VALUE; // no memory of the graph
    return enqueue(stream_of(stream), [pointer] { return release(pointer); });
}
Code cuMemcpyHtoDAsync_v2(u64 to, const void* from, std::size_t bytes, void* handle) {
    ENTER;
    Stream* stream = stream_of(handle);
    if (stream->capturing) return spoil(stream); // a graph would read the host's memory again, when it is gone
    if (find(allocations, to, bytes) == nullptr) return INVALID_VALUE;
    const auto* start = static_cast<const unsigned char*>(from);
    if (static_cast<long>(bytes) >= setting("late", 1L << 40))
        return enqueue(stream, [to, start, bytes] { return write(to, std::vector<unsigned char>(start, start + bytes)); });
    return enqueue(stream, [to, content = std::vector<unsigned char>(start, start + bytes)] { return write(to, content); });
}
Code cuMemcpyDtoHAsync_v2(void* to, u64 from, std::size_t bytes, void* handle) {
    ENTER;
    Stream* stream = stream_of(handle);
    if (stream->capturing) return spoil(stream);
    if (find(allocations, from, bytes) == nullptr) return INVALID_VALUE;
    if (Code code = drain(*stream); code != DONE) return code;
    std::vector<unsigned char> content;
    if (std::string error = emulator::download(from, bytes, content); !error.empty()) return sticky = fault(error);
    std::copy(content.begin(), content.end(), static_cast<unsigned char*>(to));
    return DONE;
}
Code cuMemcpyDtoDAsync_v2(u64 to, u64 from, std::size_t bytes, void* handle) {
    ENTER;
    if (find(allocations, to, bytes) == nullptr || find(allocations, from, bytes) == nullptr) return INVALID_VALUE;
    return enqueue(stream_of(handle), [to, from, bytes] {
        std::vector<unsigned char> content;
        std::string error = emulator::download(from, bytes, content);
        return error.empty() ? write(to, content) : fault(error);
    });
}
Code cuMemcpy2DAsync_v2(const Copy2D* copy, void* stream) { // from the host or to it, row by row
    const bool down = copy->from.type == DEVICE && copy->to.type == HOST;
    if (copy->from.x != 0 || copy->from.y != 0 || copy->to.x != 0 || copy->to.y != 0) return INVALID_VALUE;
    if (!down && (copy->from.type != HOST || copy->to.type != DEVICE)) return INVALID_VALUE;
    for (std::size_t row = 0; row < copy->height; ++row) {
        const std::size_t from = row * copy->from.pitch, to = row * copy->to.pitch;
        Code code = down ? cuMemcpyDtoHAsync_v2(static_cast<char*>(copy->to.host) + to, copy->from.device + from, copy->width, stream)
                         : cuMemcpyHtoDAsync_v2(copy->to.device + to, static_cast<char*>(copy->from.host) + from, copy->width, stream);
        if (code != DONE) return code;
    }
    return DONE;
}
Code cuMemsetD32Async(u64 to, unsigned value, std::size_t count, void* stream) {
    ENTER;
    if (find(allocations, to, 4 * count) == nullptr) return INVALID_VALUE;
    std::vector<unsigned char> content(4 * count);
    for (std::size_t i = 0; i < count; ++i) std::memcpy(content.data() + 4 * i, &value, 4);
    return enqueue(stream_of(stream), [to, content] { return write(to, content); });
}
Code cuMemsetD8Async(u64 to, unsigned char value, std::size_t count, void* stream) {
    ENTER;
    if (find(allocations, to, count) == nullptr) return INVALID_VALUE;
    return enqueue(stream_of(stream), [to, content = std::vector<unsigned char>(count, value)] { return write(to, content); });
}
Code cuPointerGetAttribute(void* data, int attribute, u64 pointer) {
    ENTER;
    const bool on_host = find(pinned, pointer, 1) != nullptr;
    const Allocation* found = find(on_host ? pinned : allocations, pointer, 1);
    if (found == nullptr) return INVALID_VALUE;
    const u64 start = std::prev((on_host ? pinned : allocations).upper_bound(pointer))->first;
    switch (attribute) {
    case 2: *static_cast<unsigned*>(data) = on_host ? 1 : 2; return DONE;
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
    // What comes before a capture is no part of it, nor can what is captured be waited for outside.
    if (stream_of(handle)->capturing && !event->captured) return spoil(stream_of(handle)), CAPTURE_ISOLATION;
    if (event->captured) return stream_of(handle)->capturing ? DONE : CAPTURED_EVENT;
    return enqueue(stream_of(handle), [event, stream = event->stream, mark = event->marked] {
        return drain(*stream, [event, mark] { return event->done >= mark; });
    });
}
Code cuStreamIsCapturing(void* handle, int* status) {
    ENTER;
    *status = stream_of(handle)->capturing ? 1 : 0;
    return DONE;
}
Code cuStreamBeginCapture_v2(void* handle, int mode) {
    ENTER;
    Stream* stream = stream_of(handle);
    if (stream == default_stream() || stream->capturing) return CAPTURE_UNSUPPORTED;
    stream->capturing = true;
    stream->mode = mode;
    stream->capturer = std::this_thread::get_id();
    stream->brittle = captures++ >= setting("captures", 1L << 40);
    return DONE;
}
Code cuStreamQuery(void* handle) {
    ENTER;
    Stream* stream = stream_of(handle);
    return stream->capturing ? spoil(stream) : stream->work.empty() ? DONE : NOT_READY;
}
Code cuStreamEndCapture(void* handle, Graph** graph) {
    ENTER;
    Stream* stream = stream_of(handle);
    *graph = nullptr;
    if (!stream->capturing) return INVALID_VALUE;
    std::vector<Work> captured = std::exchange(stream->captured, {});
    stream->capturing = stream->brittle = false;
    return std::exchange(stream->spoiled, false) ? CAPTURE_INVALIDATED : keep(graphs, graph, std::move(captured));
}
Code cuGraphInstantiateWithFlags(Graph** executable, Graph* graph, unsigned long long) {
    ENTER;
    *executable = nullptr;
    return graphs.contains(graph) ? keep(executables, executable, graph->work) : INVALID_VALUE;
}
Code cuGraphUpload(Graph* graph, void* stream) {
    ENTER;
    if (stream_of(stream)->capturing) return spoil(stream_of(stream));
    return executables.contains(graph) ? DONE : INVALID_VALUE;
}
Code cuGraphLaunch(Graph* graph, void* handle) {
    ENTER;
    if (!executables.contains(graph)) return INVALID_VALUE;
    for (const Work& work : graph->work)
        if (Code code = enqueue(stream_of(handle), work); code != DONE) return code;
    return DONE;
}
Code cuGraphGetNodes(Graph* graph, void** nodes, std::size_t* count) { // how many there are, and no more
    ENTER;
    if (!graphs.contains(graph) || (nodes != nullptr && !graph->work.empty())) return INVALID_VALUE;
    *count = graph->work.size();
    return DONE;
}
Code cuGraphDestroy(Graph* graph) {
    ENTER;
    return destroy(graphs, graph);
}
Code cuGraphExecDestroy(Graph* graph) { // what was launched of it goes on
    ENTER;
    return destroy(executables, graph);
}

Code cuEventCreate(Event** event, unsigned) {
    ENTER;
    *event = new Event;
    return DONE;
}
Code cuEventRecord(Event* event, void* handle) {
    ENTER;
    event->stream = stream_of(handle);
    if (event->captured = event->stream->capturing; event->captured) return DONE;
    return enqueue(event->stream, [event, mark = ++event->marked] {
        event->done = mark;
        event->reached = std::chrono::steady_clock::now();
        return DONE;
    });
}
Code cuEventElapsedTime_v2(float* milliseconds, Event* from, Event* to) {
    ENTER;
    for (const Event* event : {from, to}) {
        if (event->captured || event->stream == nullptr) return INVALID_HANDLE;
        if (event->done < event->marked) return NOT_READY;
    }
    *milliseconds = std::chrono::duration<float, std::milli>(to->reached - from->reached).count();
    return DONE;
}
Code cuEventElapsedTime(float* milliseconds, Event* from, Event* to) { return cuEventElapsedTime_v2(milliseconds, from, to); }
Code cuEventSynchronize(Event* event) {
    ENTER;
    if (event->captured) return CAPTURED_EVENT;
    if (event->stream == nullptr) return DONE;
    return drain(*event->stream, [event, mark = event->marked] { return event->done >= mark; });
}
Code cuEventDestroy_v2(Event*) { return DONE; } // waits may still be enqueued: kept until the process ends
}
