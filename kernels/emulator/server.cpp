// server.cpp: the emulator as a process. So a crash of emulated code is an error of the caller and not its end. It speaks the protocol of
// kernels/README.md on standard input and output.
#include "block.hpp"
#include <csignal>
#include <cstdio>
#include <unistd.h>

namespace {
using namespace emulator;
using Bytes = std::vector<unsigned char>;

void receive(void* to, std::size_t bytes) {
    if (bytes > 0 && std::fread(to, 1, bytes, stdin) != bytes) std::exit(0); // the caller is gone
}

template <class T> T receive() {
    T value;
    receive(&value, sizeof value);
    return value;
}

Bytes receive_blob() {
    Bytes bytes(receive<u64>());
    receive(bytes.data(), bytes.size());
    return bytes;
}

std::string receive_text() {
    Bytes bytes = receive_blob();
    return {bytes.begin(), bytes.end()};
}

void answer(const std::string& refusal, const void* bytes = nullptr, u64 count = 0) {
    const bool refused = !refusal.empty();
    if (refused) {
        bytes = refusal.data();
        count = refusal.size();
    }
    std::fputc(refused ? 1 : 0, stdout);
    std::fwrite(&count, 1, sizeof count, stdout);
    if (count > 0) std::fwrite(bytes, 1, count, stdout);
    std::fflush(stdout);
}

void serve_launch() {
    Launch launch;
    launch.kernel = receive_text();
    u32 x = receive<u32>(), y = receive<u32>(), z = receive<u32>();
    launch.grid = {x, y, z};
    launch.threads = receive<u32>();
    launch.shared_bytes = receive<u32>();
    launch.seed = receive<u64>();
    launch.detect_races = receive<u32>() != 0;
    launch.overlaps = receive<u32>() != 0;
    u32 seconds = receive<u32>();
    launch.mutant = receive_text();
    for (u32 left = receive<u32>(); left > 0; --left) launch.arguments.push_back(receive_blob());
    alarm(seconds);
    std::string refusal = run(launch);
    alarm(0);
    answer(refusal);
}

// This runs on a stack of its own, because the fault may be that the stack of a thread is full.
void on_signal(int signal) {
    char text[512];
    const char* what = signal == SIGALRM ? "is still running at the end of its time"
                                         : "touched memory other than by instructions.cuh (a plain use of a pointer to "
                                           "global memory, or too many local variables)";
    int length = std::snprintf(text, sizeof text, "kernel `%s`, block (%u, %u, %u), thread %u: %s\n", now.launch.kernel.c_str(), blockIdx.x,
                               blockIdx.y, blockIdx.z, threadIdx.x, what);
    [[maybe_unused]] auto written = write(STDERR_FILENO, text, static_cast<std::size_t>(length));
    _exit(1);
}
} // namespace

int main() {
    static unsigned char signal_stack[64 << 10];
    stack_t stack{};
    stack.ss_sp = signal_stack;
    stack.ss_size = sizeof signal_stack;
    sigaltstack(&stack, nullptr);
    for (int signal : {SIGSEGV, SIGBUS, SIGALRM}) {
        struct sigaction action{};
        action.sa_handler = on_signal;
        action.sa_flags = SA_ONSTACK;
        sigaction(signal, &action, nullptr);
    }
    for (;;) {
        switch (receive<unsigned char>()) {
        case 1: {
            std::string name = receive_text();
            u64 address = allocate(name, receive<u64>());
            answer({}, &address, sizeof address);
            break;
        }
        case 2:
            answer(release(receive<u64>()));
            break;
        case 3: {
            u64 address = receive<u64>();
            Bytes bytes = receive_blob();
            answer(upload(address, bytes.data(), bytes.size()));
            break;
        }
        case 4: {
            u64 address = receive<u64>(), count = receive<u64>();
            Bytes bytes;
            std::string refusal = download(address, count, bytes);
            answer(refusal, bytes.data(), bytes.size());
            break;
        }
        case 5:
            serve_launch();
            break;
        default:
            answer("an unknown request");
            return 1;
        }
    }
}
