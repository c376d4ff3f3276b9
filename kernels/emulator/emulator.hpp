// emulator.hpp: what common/instructions.cuh calls when a kernel is compiled as C++. common/platform.cuh includes it after the types.
// kernels/README.md has the rules that each function checks.
#pragma once
#include <cmath>
#include <cstring>
#include <functional>
#include <source_location>
#include <type_traits>
#include <utility>
#include <vector>

namespace emulator {

using Site = std::source_location;

struct Index {
    u32 x = 0, y = 0, z = 0;
};

// Lower addresses are invalid in shared memory, as a null pointer is elsewhere.
constexpr shared_address SHARED_BASE = 1024;

// Whether this launch asked for the defect of this name, or for barriers with this label to be left out.
bool mutant(const char* name);

// ---- barriers, exchanges, matrices
void bar_sync(Site site);
void bar_warp_sync(u32 mask, Site site);
void fence(Site site);
void griddepcontrol_wait(Site site);
u32 shfl_sync_idx(u32 mask, u32 value, u32 source, Site site);
u32 shfl_sync_bfly(u32 mask, u32 value, u32 lane_mask, Site site);
u32 shfl_sync_down(u32 mask, u32 value, u32 delta, Site site);
u32 vote_sync_ballot(u32 mask, bool predicate, Site site);
enum class Half { bf16, f16 };
void ldmatrix(u32* fragment, u32 matrices, bool transposed, shared_address row, Site site);
void mma_m16n8k16(float* d, const u32* a, const u32* b, Half type, Site site);

// ---- memory
enum class Way { plain, read_only };
void read_shared(shared_address address, void* to, u32 bytes, const char* operation, Site site);
void write_shared(shared_address address, const void* from, u32 bytes, const char* operation, Site site);
void read_global(const void* address, void* to, u32 bytes, Way way, const char* operation, Site site);
void write_global(void* address, const void* from, u32 bytes, const char* operation, Site site);
enum class Atomic { add, min, bit_or, increment };
u32 atomic(void* address, u32 value, Atomic what, Site site);
void cp_async(shared_address to, const void* from, u32 bytes, u32 source_bytes, const char* operation, Site site);
void cp_async_commit_group();
void cp_async_wait_group(u32 pending);

// ---- compute capability 9.0 (common/hopper.cuh)
u32 cluster_rank();
void cluster_sync(Site site);
void setmaxnreg(bool increase, u32 registers, Site site);
void bar_sync_named(u32 id, u32 threads, Site site);
void mbarrier_init(shared_address barrier, u32 count, Site site);
void fence_mbarrier_init(Site site);
void mbarrier_arrive(shared_address barrier, Site site);
void mbarrier_arrive_expect_tx(shared_address barrier, u32 bytes, Site site);
void mbarrier_arrive_cluster(shared_address barrier, u32 rank, Site site);
void mbarrier_wait(shared_address barrier, u32 parity, Site site);
// `ranks` has bits for the blocks of the cluster that get the bytes. With 0 this block alone gets them.
void cp_async_bulk_load(shared_address to, const void* from, u32 bytes, shared_address barrier, u32 ranks, Site site);
void cp_async_bulk_store(void* to, shared_address from, u32 bytes, Site site);
void cp_async_bulk_commit_group(Site site);
void cp_async_bulk_wait_group(u32 pending, bool read, Site site);
void fence_proxy_async(Site site);
void stmatrix(shared_address row, const u32* fragment, u32 matrices, bool transposed, Site site);
void wgmma_fence(Site site);
void wgmma_commit_group(Site site);
void wgmma_wait_group(u32 pending, Site site);
// `low` has the 64 sums of the columns 0..127, `high` those of the columns 128..255. `high` is null if there are none.
void wgmma(float* low, float* high, u32 columns, u64 a, u64 b, bool accumulate, bool a_transposed, bool b_transposed, Site site);

template <class T> T load_shared(shared_address address, const char* operation, Site site) {
    T value;
    read_shared(address, &value, sizeof value, operation, site);
    return value;
}
template <class T> void store_shared(shared_address address, const T& value, const char* operation, Site site) {
    write_shared(address, &value, sizeof value, operation, site);
}
template <class T> T load_global(const void* address, const char* operation, Site site) {
    T value;
    read_global(address, &value, sizeof value, Way::plain, operation, site);
    return value;
}
template <class T> T load_global_nc(const void* address, const char* operation, Site site) {
    T value;
    read_global(address, &value, sizeof value, Way::read_only, operation, site);
    return value;
}
template <class T> void store_global(void* address, const T& value, const char* operation, Site site) {
    write_global(address, &value, sizeof value, operation, site);
}

// ---- arithmetic (arithmetic.cpp)
u32 bits_of(float x);
float float_of(u32 bits);
u64 bits_of(double x);
double double_of(u64 bits);
float round_f32(float x);
double round_f64(double x);
float ex2_approx(float x);
float lg2_approx(float x);
float rcp_approx(float x);
float sqrt_rn(float x);
double sqrt_rn(double x);
float fma_rn(float a, float b, float c);
double fma_rn(double a, double b, double c);
float max_f32(float a, float b);
float min_f32(float a, float b);
u16 bf16_of(float x);
u16 f16_of(float x);
float f32_of_f16(u16 bits);

// ---- sums as tensor cores make them (arithmetic.cpp)
// How many bits of every term are kept below the largest term's power of two, by wgmma and by mma.sync. For mma.sync it is the fewest of
// any device.
constexpr i32 WGMMA_FRACTION_BITS = 25, MMA_FRACTION_BITS = 24;
// The power of two of a number that tensor cores multiply or add. `least` is that of subnormal numbers. For 0 it is below all others.
i32 exponent_of_factor(float x, i32 least);
// sum + Σ products[k], for a few products. exponents[k] is the sum of the exponents of the factors of product k.
float fused_sum(float sum, const double* products, const i32* exponents, u32 count, i32 fraction_bits);

// ---- entry points: each KERNEL makes a static Registration
struct Kernel {
    u32 max_threads;
    u32 cluster; // how many blocks a cluster has
    std::vector<u32> argument_bytes;
    std::function<void(const unsigned char* const*)> call;
};

void add_kernel(const char* name, Kernel kernel);

struct Registration {
    template <class... Parameters> Registration(const char* name, u32 max_threads, void (*function)(Parameters...), u32 cluster = 1) {
        static_assert((std::is_trivially_copyable_v<Parameters> && ...), "a kernel's parameters are copied as bytes");
        add_kernel(name,
                   Kernel{max_threads, cluster, {static_cast<u32>(sizeof(Parameters))...}, [function](const unsigned char* const* bytes) {
                              unpack(function, bytes, std::index_sequence_for<Parameters...>{});
                          }});
    }

private:
    template <class T> static T read(const unsigned char* bytes) {
        T value;
        std::memcpy(&value, bytes, sizeof value);
        return value;
    }
    template <class... Parameters, std::size_t... i>
    static void unpack(void (*function)(Parameters...), [[maybe_unused]] const unsigned char* const* bytes, std::index_sequence<i...>) {
        function(read<std::remove_const_t<Parameters>>(bytes[i])...);
    }
};

} // namespace emulator

// CUDA's built-in variables. Blocks are one-dimensional.
extern emulator::Index threadIdx, blockIdx, blockDim, gridDim;
