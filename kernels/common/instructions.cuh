// instructions.cuh: every PTX instruction that kernels for compute capability 8.0 use, as a function named after it.
//
// Each function states the instruction and, beside it, what the emulator does for it, so that the two cannot drift apart. Kernels contain
// no other inline PTX, and reach memory only from here. A kernel only passes a pointer to global memory on. In this file a block is a
// thread block.
//
// Lanes: t = lane % 4, g = lane / 4. A u32 of two 16-bit elements holds the element of the lower index in its lower half.
// Addresses: every access is aligned to its size. A caller never writes the last parameter, SAMTONE_SITE.
// clang-format off
#pragma once
#include "platform.cuh"

// ---- which thread this is

// The lane in the warp, 0..31. Blocks are one-dimensional, so thread threadIdx.x is lane threadIdx.x % 32.
SAMTONE_DEVICE u32 lane_id() { return threadIdx.x % WARP; }

// The number of the warp in the block.
SAMTONE_DEVICE u32 warp_id() { return threadIdx.x / WARP; }

// The first address of the launch's shared memory, which is aligned to 1024 bytes. All of it is dynamic, and the kernel lays it out.
#ifdef SAMTONE_EMULATED
SAMTONE_DEVICE shared_address shared_base() { return emulator::SHARED_BASE; }
#else
extern __shared__ __align__(1024) unsigned char samtone_shared[];
SAMTONE_DEVICE shared_address shared_base() { return static_cast<u32>(__cvta_generic_to_shared(samtone_shared)); }
#endif

// ---- barriers and fences

// bar.sync 0: all threads of the block meet, at the same line. Orders shared and global memory within the block.
SAMTONE_DEVICE void bar_sync(SAMTONE_SITE_ONLY) {
    SAMTONE_PTX("bar.sync 0;" ::: "memory");
    SAMTONE_EMULATED_AS(emulator::bar_sync(site));
}

// bar.warp.sync: the lanes of `mask` meet. Orders memory among them. No other collective of a warp does.
SAMTONE_DEVICE void bar_warp_sync(u32 mask SAMTONE_SITE) {
    SAMTONE_PTX("bar.warp.sync %0;" ::"r"(mask) : "memory");
    SAMTONE_EMULATED_AS(emulator::bar_warp_sync(mask, site));
}

// fence.acq_rel.gpu: by its later atomics this thread tells what it knows of, its own writes and those before a barrier. Another thread
// learns it by a later atomic at the same place, followed by a fence.
SAMTONE_DEVICE void fence_acq_rel_gpu(SAMTONE_SITE_ONLY) {
    SAMTONE_PTX("fence.acq_rel.gpu;" ::: "memory");
    SAMTONE_EMULATED_AS(emulator::fence(site));
}

// griddepcontrol.wait: all launches before this one are complete, and this thread sees what they wrote. On devices of compute capability
// 9.0 a launch may begin while the one before it runs, if the driver was told so. On other devices there is nothing to wait for.
SAMTONE_DEVICE void griddepcontrol_wait(SAMTONE_SITE_ONLY) {
    SAMTONE_PTX_90("griddepcontrol.wait;" ::: "memory");
    SAMTONE_EMULATED_AS(emulator::griddepcontrol_wait(site));
}

// griddepcontrol.launch_dependents: this block has no objection to the next launch beginning, and waiting.
SAMTONE_DEVICE void griddepcontrol_launch_dependents() { SAMTONE_PTX_90("griddepcontrol.launch_dependents;" ::: "memory"); }

// Every kernel begins with this. After D1 it may touch global memory: what earlier launches wrote is there, and what they read is free. A
// launch that has waited is complete only after those before it. So who waits for the launch before waits for all of them.
SAMTONE_DEVICE void begin_launch(SAMTONE_SITE_ONLY) {
    SYNC(D1, griddepcontrol_wait(SAMTONE_EMULATED_AS(site)));
    griddepcontrol_launch_dependents();
}

// ---- exchanges within a warp: every lane of `mask` calls, at the same line, and is itself in `mask`

// shfl.sync.idx: gives the value of lane source % 32.
SAMTONE_DEVICE u32 shfl_sync_idx(u32 mask, u32 value, u32 source SAMTONE_SITE) {
    u32 r = 0;
    SAMTONE_PTX("shfl.sync.idx.b32 %0, %1, %2, 31, %3;" : "=r"(r) : "r"(value), "r"(source), "r"(mask));
    SAMTONE_EMULATED_AS(r = emulator::shfl_sync_idx(mask, value, source, site));
    return r;
}

// shfl.sync.bfly: gives the value of lane ^ lane_mask. lane_mask is below 32.
SAMTONE_DEVICE u32 shfl_sync_bfly(u32 mask, u32 value, u32 lane_mask SAMTONE_SITE) {
    u32 r = 0;
    SAMTONE_PTX("shfl.sync.bfly.b32 %0, %1, %2, 31, %3;" : "=r"(r) : "r"(value), "r"(lane_mask), "r"(mask));
    SAMTONE_EMULATED_AS(r = emulator::shfl_sync_bfly(mask, value, lane_mask, site));
    return r;
}

// shfl.sync.down: gives the value of lane + delta, or the lane's own value where that is past lane 31.
SAMTONE_DEVICE u32 shfl_sync_down(u32 mask, u32 value, u32 delta SAMTONE_SITE) {
    u32 r = 0;
    SAMTONE_PTX("shfl.sync.down.b32 %0, %1, %2, 31, %3;" : "=r"(r) : "r"(value), "r"(delta), "r"(mask));
    SAMTONE_EMULATED_AS(r = emulator::shfl_sync_down(mask, value, delta, site));
    return r;
}

// vote.sync.ballot: bit i is the predicate of lane i. It is 0 for lanes outside of `mask`.
SAMTONE_DEVICE u32 vote_sync_ballot(u32 mask, bool predicate SAMTONE_SITE) {
    u32 r = 0;
    SAMTONE_PTX("{.reg .pred p; setp.ne.u32 p, %1, 0; vote.sync.ballot.b32 %0, p, %2;}"
                : "=r"(r) : "r"(static_cast<u32>(predicate)), "r"(mask));
    SAMTONE_EMULATED_AS(r = emulator::vote_sync_ballot(mask, predicate, site));
    return r;
}

// mov.b32: the bits of a float, and back.
SAMTONE_DEVICE u32 bits_of(float x) {
    u32 r = 0;
    SAMTONE_PURE_PTX("mov.b32 %0, %1;" : "=r"(r) : "f"(x));
    SAMTONE_EMULATED_AS(r = emulator::bits_of(x));
    return r;
}
SAMTONE_DEVICE float float_of(u32 bits) {
    float r = 0;
    SAMTONE_PURE_PTX("mov.b32 %0, %1;" : "=f"(r) : "r"(bits));
    SAMTONE_EMULATED_AS(r = emulator::float_of(bits));
    return r;
}

// The same exchanges for a float.
SAMTONE_DEVICE float shfl_sync_idx(u32 mask, float value, u32 source SAMTONE_SITE) {
    return float_of(shfl_sync_idx(mask, bits_of(value), source SAMTONE_EMULATED_AS(, site)));
}
SAMTONE_DEVICE float shfl_sync_bfly(u32 mask, float value, u32 lane_mask SAMTONE_SITE) {
    return float_of(shfl_sync_bfly(mask, bits_of(value), lane_mask SAMTONE_EMULATED_AS(, site)));
}
SAMTONE_DEVICE float shfl_sync_down(u32 mask, float value, u32 delta SAMTONE_SITE) {
    return float_of(shfl_sync_down(mask, bits_of(value), delta SAMTONE_EMULATED_AS(, site)));
}

// ---- copies from global to shared memory that complete later

// cp.async.cg, 16 bytes: the first source_bytes come from global memory, the rest are zeros. Both addresses are multiples of 16.
SAMTONE_DEVICE void cp_async_cg_16(shared_address to, const void* from, u32 source_bytes SAMTONE_SITE) {
    SAMTONE_PTX("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(source_bytes) : "memory");
    SAMTONE_EMULATED_AS(emulator::cp_async(to, from, 16, source_bytes, "cp.async.cg 16", site));
}

// cp.async.ca, 8 and 4 bytes: the same, but the first-level cache keeps the bytes.
SAMTONE_DEVICE void cp_async_ca_8(shared_address to, const void* from, u32 source_bytes SAMTONE_SITE) {
    SAMTONE_PTX("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(from), "r"(source_bytes) : "memory");
    SAMTONE_EMULATED_AS(emulator::cp_async(to, from, 8, source_bytes, "cp.async.ca 8", site));
}
SAMTONE_DEVICE void cp_async_ca_4(shared_address to, const void* from, u32 source_bytes SAMTONE_SITE) {
    SAMTONE_PTX("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(source_bytes) : "memory");
    SAMTONE_EMULATED_AS(emulator::cp_async(to, from, 4, source_bytes, "cp.async.ca 4", site));
}

// cp.async.commit_group: the copies that this thread started since the last commit form a group.
SAMTONE_DEVICE void cp_async_commit_group() {
    SAMTONE_PTX("cp.async.commit_group;" ::: "memory");
    SAMTONE_EMULATED_AS(emulator::cp_async_commit_group());
}

// cp.async.wait_group: waits until at most `pending` groups of this thread, the youngest, are still under way. Other threads see the copied
// bytes only after a barrier.
template <u32 pending> SAMTONE_DEVICE void cp_async_wait_group() {
    SAMTONE_PTX("cp.async.wait_group %0;" ::"n"(pending) : "memory");
    SAMTONE_EMULATED_AS(emulator::cp_async_wait_group(pending));
}

// ---- matrices

// ldmatrix: 8x8 matrices of 16-bit elements. Lane 8i + j gives the address of row j of matrix i: 16 bytes, aligned to 16. r[i] holds the
// elements (g, 2t) and (g, 2t + 1) of matrix i, or with .trans the elements (2t, g) and (2t + 1, g). All 32 lanes call. x1 reads the
// addresses of lanes 0..7 only, and x2 those of lanes 0..15.
SAMTONE_DEVICE void ldmatrix_x1(u32 (&r)[1], shared_address row SAMTONE_SITE) {
    SAMTONE_PTX("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(row) : "memory");
    SAMTONE_EMULATED_AS(emulator::ldmatrix(r, 1, false, row, site));
}
SAMTONE_DEVICE void ldmatrix_x2(u32 (&r)[2], shared_address row SAMTONE_SITE) {
    SAMTONE_PTX("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(row) : "memory");
    SAMTONE_EMULATED_AS(emulator::ldmatrix(r, 2, false, row, site));
}
SAMTONE_DEVICE void ldmatrix_x4(u32 (&r)[4], shared_address row SAMTONE_SITE) {
    SAMTONE_PTX("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
    SAMTONE_EMULATED_AS(emulator::ldmatrix(r, 4, false, row, site));
}
SAMTONE_DEVICE void ldmatrix_x1_trans(u32 (&r)[1], shared_address row SAMTONE_SITE) {
    SAMTONE_PTX("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(row) : "memory");
    SAMTONE_EMULATED_AS(emulator::ldmatrix(r, 1, true, row, site));
}
SAMTONE_DEVICE void ldmatrix_x2_trans(u32 (&r)[2], shared_address row SAMTONE_SITE) {
    SAMTONE_PTX("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                : "=r"(r[0]), "=r"(r[1]) : "r"(row) : "memory");
    SAMTONE_EMULATED_AS(emulator::ldmatrix(r, 2, true, row, site));
}
SAMTONE_DEVICE void ldmatrix_x4_trans(u32 (&r)[4], shared_address row SAMTONE_SITE) {
    SAMTONE_PTX("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
    SAMTONE_EMULATED_AS(emulator::ldmatrix(r, 4, true, row, site));
}

// mma.sync m16n8k16: d (16x8, f32) += a (16x16, by rows) · b (16x8, by columns).
//   a[0] (g, 2t..)  a[1] (g + 8, 2t..)  a[2] (g, 2t + 8..)  a[3] (g + 8, 2t + 8..)      row, k
//   b[0] (2t.., g)  b[1] (2t + 8.., g)                                                  k, column
//   d[0] (g, 2t)    d[1] (g, 2t + 1)    d[2] (g + 8, 2t)    d[3] (g + 8, 2t + 1)        row, column
SAMTONE_DEVICE void mma_m16n8k16_bf16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2] SAMTONE_SITE) {
    SAMTONE_PTX("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    SAMTONE_EMULATED_AS(emulator::mma_m16n8k16(d, a, b, emulator::Half::bf16, site));
}
SAMTONE_DEVICE void mma_m16n8k16_f16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2] SAMTONE_SITE) {
    SAMTONE_PTX("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    SAMTONE_EMULATED_AS(emulator::mma_m16n8k16(d, a, b, emulator::Half::f16, site));
}

// ---- arithmetic: plain + - * / on floats round to nearest. fma_rn is for a product and a sum with one rounding

// ex2.approx.ftz: 2^x with a relative error up to 2^-22. Subnormal arguments and results are zeros.
SAMTONE_DEVICE float ex2_approx(float x) {
    float r = 0;
    SAMTONE_PURE_PTX("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    SAMTONE_EMULATED_AS(r = emulator::ex2_approx(x));
    return r;
}

// lg2.approx.ftz: log2 x. The error is up to 2^-22 for x in (0.5, 2), and up to 2^-22 of the result elsewhere.
SAMTONE_DEVICE float lg2_approx(float x) {
    float r = 0;
    SAMTONE_PURE_PTX("lg2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    SAMTONE_EMULATED_AS(r = emulator::lg2_approx(x));
    return r;
}

// rcp.approx.ftz: 1 / x with an error up to 1 ulp. Subnormal arguments and results are zeros.
SAMTONE_DEVICE float rcp_approx(float x) {
    float r = 0;
    SAMTONE_PURE_PTX("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    SAMTONE_EMULATED_AS(r = emulator::rcp_approx(x));
    return r;
}

// sqrt.rn, f32 and f64: correctly rounded.
SAMTONE_DEVICE float sqrt_rn(float x) {
    float r = 0;
    SAMTONE_PURE_PTX("sqrt.rn.f32 %0, %1;" : "=f"(r) : "f"(x));
    SAMTONE_EMULATED_AS(r = emulator::sqrt_rn(x));
    return r;
}
SAMTONE_DEVICE double sqrt_rn(double x) {
    double r = 0;
    SAMTONE_PURE_PTX("sqrt.rn.f64 %0, %1;" : "=d"(r) : "d"(x));
    SAMTONE_EMULATED_AS(r = emulator::sqrt_rn(x));
    return r;
}

// mul.rn: a · b, rounded before anything else is done with it. The compiler may fuse a plain * with a sum that follows, and decides so anew
// for every kernel. Where two kernels must give the same bits, their products are of this kind.
SAMTONE_DEVICE float mul_rn(float a, float b) {
    float r = 0;
    SAMTONE_PURE_PTX("mul.rn.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    SAMTONE_EMULATED_AS(r = a * b);
    return r;
}

// fma.rn, f32 and f64: a · b + c, rounded once.
SAMTONE_DEVICE float fma_rn(float a, float b, float c) {
    float r = 0;
    SAMTONE_PURE_PTX("fma.rn.f32 %0, %1, %2, %3;" : "=f"(r) : "f"(a), "f"(b), "f"(c));
    SAMTONE_EMULATED_AS(r = emulator::fma_rn(a, b, c));
    return r;
}
SAMTONE_DEVICE double fma_rn(double a, double b, double c) {
    double r = 0;
    SAMTONE_PURE_PTX("fma.rn.f64 %0, %1, %2, %3;" : "=d"(r) : "d"(a), "d"(b), "d"(c));
    SAMTONE_EMULATED_AS(r = emulator::fma_rn(a, b, c));
    return r;
}

// Gives the same number, but the compiler knows nothing of it. So it computes here what depends on the number, and not in advance, where
// that would occupy registers for long.
SAMTONE_DEVICE u32 only_here(u32 x) {
    SAMTONE_PTX("" : "+r"(x));
    return x;
}

// exp, log, log1p, exp2 in f64, within 1 ulp. These are the compiler's own functions, inlined. Kernels call them O(M) times only.
SAMTONE_DEVICE double exp_f64(double x) { return exp(x); }
SAMTONE_DEVICE double log_f64(double x) { return log(x); }
SAMTONE_DEVICE double log1p_f64(double x) { return log1p(x); }
SAMTONE_DEVICE double exp2_f64(double x) { return exp2(x); }

// cvt.rni: the nearest whole number, or the even one where two are equally near.
SAMTONE_DEVICE float round_f32(float x) {
    float r = 0;
    SAMTONE_PURE_PTX("cvt.rni.f32.f32 %0, %1;" : "=f"(r) : "f"(x));
    SAMTONE_EMULATED_AS(r = emulator::round_f32(x));
    return r;
}
SAMTONE_DEVICE double round_f64(double x) {
    double r = 0;
    SAMTONE_PURE_PTX("cvt.rni.f64.f64 %0, %1;" : "=d"(r) : "d"(x));
    SAMTONE_EMULATED_AS(r = emulator::round_f64(x));
    return r;
}

// mov.b64: the bits of a double, and back.
SAMTONE_DEVICE u64 bits_of(double x) {
    u64 r = 0;
    SAMTONE_PURE_PTX("mov.b64 %0, %1;" : "=l"(r) : "d"(x));
    SAMTONE_EMULATED_AS(r = emulator::bits_of(x));
    return r;
}
SAMTONE_DEVICE double double_of(u64 bits) {
    double r = 0;
    SAMTONE_PURE_PTX("mov.b64 %0, %1;" : "=d"(r) : "l"(bits));
    SAMTONE_EMULATED_AS(r = emulator::double_of(bits));
    return r;
}
// shfl.sync.bfly of a double, by two exchanges.
SAMTONE_DEVICE double shfl_sync_bfly(u32 mask, double value, u32 lane_mask SAMTONE_SITE) {
    const u64 bits = bits_of(value);
    const u32 low = shfl_sync_bfly(mask, static_cast<u32>(bits), lane_mask SAMTONE_EMULATED_AS(, site));
    const u32 high = shfl_sync_bfly(mask, static_cast<u32>(bits >> 32), lane_mask SAMTONE_EMULATED_AS(, site));
    return double_of(static_cast<u64>(high) << 32 | low);
}

// max, min: of two numbers. Of a number and a NaN they give the number.
SAMTONE_DEVICE float max_f32(float a, float b) {
    float r = 0;
    SAMTONE_PURE_PTX("max.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    SAMTONE_EMULATED_AS(r = emulator::max_f32(a, b));
    return r;
}
SAMTONE_DEVICE float min_f32(float a, float b) {
    float r = 0;
    SAMTONE_PURE_PTX("min.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    SAMTONE_EMULATED_AS(r = emulator::min_f32(a, b));
    return r;
}

// ---- conversions to nearest even: a NaN becomes 0x7fff, what is too large becomes infinite, and subnormal numbers stay

// cvt.rn.bf16x2.f32, cvt.rn.f16x2.f32: `low` goes into the lower half.
SAMTONE_DEVICE u32 cvt_rn_bf16x2_f32(float low, float high) {
    u32 r = 0;
    SAMTONE_PURE_PTX("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    SAMTONE_EMULATED_AS(r = emulator::bf16_of(low) | static_cast<u32>(emulator::bf16_of(high)) << 16);
    return r;
}
SAMTONE_DEVICE u32 cvt_rn_f16x2_f32(float low, float high) {
    u32 r = 0;
    SAMTONE_PURE_PTX("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    SAMTONE_EMULATED_AS(r = emulator::f16_of(low) | static_cast<u32>(emulator::f16_of(high)) << 16);
    return r;
}

// cvt.rn.bf16.f32, cvt.rn.f16.f32.
SAMTONE_DEVICE bf16 cvt_rn_bf16_f32(float x) {
    bf16 r{};
    SAMTONE_PURE_PTX("cvt.rn.bf16.f32 %0, %1;" : "=h"(r.bits) : "f"(x));
    SAMTONE_EMULATED_AS(r.bits = emulator::bf16_of(x));
    return r;
}
SAMTONE_DEVICE f16 cvt_rn_f16_f32(float x) {
    f16 r{};
    SAMTONE_PURE_PTX("cvt.rn.f16.f32 %0, %1;" : "=h"(r.bits) : "f"(x));
    SAMTONE_EMULATED_AS(r.bits = emulator::f16_of(x));
    return r;
}

// cvt.f32.f16. A bf16 is the upper half of a float, so its conversion needs no instruction (cvt.f32.bf16 is of 9.0). Both are exact.
SAMTONE_DEVICE float cvt_f32(f16 x) {
    float r = 0;
    SAMTONE_PURE_PTX("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(x.bits));
    SAMTONE_EMULATED_AS(r = emulator::f32_of_f16(x.bits));
    return r;
}
SAMTONE_DEVICE float cvt_f32(bf16 x) { return float_of(static_cast<u32>(x.bits) << 16); }

#include "memory.cuh"
