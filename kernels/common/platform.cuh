// platform.cuh: what a kernel file may assume of its compiler: types, and a few macros.
//
// A kernel is compiled twice from the same text. A CUDA compiler that has no headers at hand makes PTX of it. Where SAMTONE_EMULATED
// is defined, a C++ compiler makes a program of it that runs on the emulator. Only this file and the headers of instructions know the
// difference.
//
//   KERNEL(name, threads, parameters…)   an entry point for thread blocks of at most `threads` threads
//   KERNEL_CLUSTER(name, threads, blocks, parameters…)   the same for clusters of `blocks` thread blocks. A grid is a multiple of that
//   SYNC(S1, call)                       a barrier or a wait. The header of the kernel explains its label. An emulated launch can leave
//                                        out every call of one label; then a test must fail
//   MUTANT(name)                         false. In a test of the emulator it is true if the launch asks for this defect
//   UNROLL                               the next loop is unrolled
//   KEEP_LOOP                            the next loop is not unrolled
//   BY_VALUE(type)                       a struct as a parameter. It stays in the constant bank, also when it is indexed at run time
//   ABI_STRUCT(name, { members })        a struct that the host writes or reads. Its padding is a member
//   SHARED_BYTES(kernel, bytes)          the dynamic shared memory that the host gives to a thread block
//
// The PTX tells the host what it must know, in constants that nothing on the device reads: `name_members` and `name_bytes` of a struct,
// `name_parameters` and `name_shared_bytes` of a kernel. tests/emulator/cuda_abi.rs compares them with src/cuda/abi.rs.
#pragma once

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;
using i64 = long long;

static_assert(sizeof(u16) == 2 && sizeof(u32) == 4 && sizeof(u64) == 8, "PTX types have fixed sizes");

// The storage of a 16-bit float. Arithmetic is done in f32.
struct bf16 {
    u16 bits;
};
struct f16 {
    u16 bits;
};

struct alignas(8) u32x2 {
    u32 x, y;
};
struct alignas(16) u32x4 {
    u32 x, y, z, w;
};
struct alignas(8) f32x2 {
    float x, y;
};
struct alignas(16) f32x4 {
    float x, y, z, w;
};

// A byte address in the shared memory of the thread block. Shared memory has no pointers. Instructions reach it by such addresses.
using shared_address = u32;

constexpr u32 WARP = 32;
constexpr u32 ALL_LANES = 0xffffffffu;

#define ABI_CONSTANT [[maybe_unused]] constexpr
#define ABI_STRUCT(name, ...)                          \
    struct name __VA_ARGS__;                           \
    ABI_CONSTANT char name##_members[] = #__VA_ARGS__; \
    ABI_CONSTANT u32 name##_bytes = sizeof(name)
#define SHARED_BYTES(kernel, ...) ABI_CONSTANT u32 kernel##_shared_bytes = __VA_ARGS__

#ifdef SAMTONE_EMULATED

#include "../emulator/emulator.hpp"

#define SAMTONE_DEVICE inline
#define SAMTONE_MEMBER
#define SAMTONE_PTX(...)
#define SAMTONE_PURE_PTX(...)
#define SAMTONE_PTX_90(...)
#define SAMTONE_EMULATED_AS(...) __VA_ARGS__
// The place of the instruction in the kernel. It is a last parameter that the caller never writes.
#define SAMTONE_SITE_ONLY emulator::Site site = emulator::Site::current()
#define SAMTONE_SITE , SAMTONE_SITE_ONLY

#define KERNEL(name, threads, ...)                                                    \
    ABI_CONSTANT char name##_parameters[] = #__VA_ARGS__;                             \
    extern "C" void name(__VA_ARGS__);                                                \
    static const emulator::Registration name##_registration(#name, (threads), &name); \
    extern "C" void name(__VA_ARGS__)
#define KERNEL_CLUSTER(name, threads, blocks, ...)                                              \
    ABI_CONSTANT char name##_parameters[] = #__VA_ARGS__;                                       \
    extern "C" void name(__VA_ARGS__);                                                          \
    static const emulator::Registration name##_registration(#name, (threads), &name, (blocks)); \
    extern "C" void name(__VA_ARGS__)
#define SYNC(label, ...)                 \
    do {                                 \
        if (!emulator::mutant(#label)) { \
            __VA_ARGS__;                 \
        }                                \
    } while (0)
#define MUTANT(name) emulator::mutant(#name)
#define UNROLL
#define KEEP_LOOP
#define BY_VALUE(type) const type

#else

#define SAMTONE_DEVICE static __device__ __forceinline__
#define SAMTONE_MEMBER __device__ __forceinline__
// An instruction that has an effect or involves other lanes stays in program order. A pure one may be moved and merged.
#define SAMTONE_PTX(...) asm volatile(__VA_ARGS__)
#define SAMTONE_PURE_PTX(...) asm(__VA_ARGS__)
// An instruction of compute capability 9.0 in a kernel for every device. In the PTX it is a comment. On a device that has the
// instruction, src/cuda/driver/ptx.rs makes it of the comment. So one kernel serves both kinds of devices.
#if __CUDA_ARCH__ >= 900
#define SAMTONE_PTX_90(text, ...) asm volatile(text __VA_ARGS__)
#else
#define SAMTONE_PTX_90(text, ...) asm volatile("// " text __VA_ARGS__)
#endif
#define SAMTONE_EMULATED_AS(...)
#define SAMTONE_SITE_ONLY
#define SAMTONE_SITE

#define KERNEL(name, threads, ...)                        \
    ABI_CONSTANT char name##_parameters[] = #__VA_ARGS__; \
    extern "C" __global__ void __launch_bounds__(threads, 1) name(__VA_ARGS__)
#define KERNEL_CLUSTER(name, threads, blocks, ...)        \
    ABI_CONSTANT char name##_parameters[] = #__VA_ARGS__; \
    extern "C" __global__ void __cluster_dims__(blocks, 1, 1) __launch_bounds__(threads, 1) name(__VA_ARGS__)
#define SYNC(label, ...) __VA_ARGS__
#define MUTANT(name) false
#define UNROLL _Pragma("unroll")
#define KEEP_LOOP _Pragma("unroll 1")
#define BY_VALUE(type) const __grid_constant__ type

#endif
