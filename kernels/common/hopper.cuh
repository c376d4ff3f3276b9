// hopper.cuh: PTX instructions of compute capability 9.0, the "a" ones included: clusters, mbarriers, bulk copies, wgmma.
//
// As in instructions.cuh, each function states the instruction and, beside it, what the emulator does for it. A block is a thread block.
//
// Warpgroup: four warps, the first of which has a number that is a multiple of four. wgmma and setmaxnreg need all its 128 threads, at the
// same line.
// Proxies: bulk copies and wgmma reach shared memory by the asynchronous proxy, loads and stores by the generic one. A thread that waited
// for the mbarrier of a bulk copy sees what the copy wrote. wgmma and bulk copies see what a thread stored only after that thread made a
// fence_proxy_async and a barrier followed.
// clang-format off
#pragma once
#include "instructions.cuh"

constexpr u32 WARPGROUP = 128;
SAMTONE_DEVICE u32 warpgroup_id() { return threadIdx.x / WARPGROUP; }

// ---- clusters: an address of shared memory means the same place in every block of the cluster

// %cluster_ctarank: the number of this block in its cluster.
SAMTONE_DEVICE u32 cluster_rank() {
    u32 r = 0;
    SAMTONE_PTX("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    SAMTONE_EMULATED_AS(r = emulator::cluster_rank());
    return r;
}

// barrier.cluster: all threads of all blocks of the cluster meet, at the same line. Orders memory among them.
SAMTONE_DEVICE void cluster_sync(SAMTONE_SITE_ONLY) {
    SAMTONE_PTX("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
    SAMTONE_EMULATED_AS(emulator::cluster_sync(site));
}

// ---- registers and named barriers

// setmaxnreg: from here on each thread of the warpgroup has so many registers, a multiple of 8 from 24 to 256.
template <u32 registers> SAMTONE_DEVICE void setmaxnreg_inc(SAMTONE_SITE_ONLY) {
    SAMTONE_PTX("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
    SAMTONE_EMULATED_AS(emulator::setmaxnreg(true, registers, site));
}
template <u32 registers> SAMTONE_DEVICE void setmaxnreg_dec(SAMTONE_SITE_ONLY) {
    SAMTONE_PTX("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
    SAMTONE_EMULATED_AS(emulator::setmaxnreg(false, registers, site));
}

// bar.sync id, threads: so many threads of the block meet, in whole warps, which name this barrier (1..15). Orders memory among them.
SAMTONE_DEVICE void bar_sync_named(u32 id, u32 threads SAMTONE_SITE) {
    SAMTONE_PTX("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
    SAMTONE_EMULATED_AS(emulator::bar_sync_named(id, threads, site));
}

// ---- mbarriers: 8 bytes of shared memory each. A phase ends when `count` threads have arrived and all expected bytes have been copied.
// The next phase begins at once. Their parity tells one phase from the next: the first has parity 0.

SAMTONE_DEVICE void mbarrier_init(shared_address barrier, u32 count SAMTONE_SITE) {
    SAMTONE_PTX("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
    SAMTONE_EMULATED_AS(emulator::mbarrier_init(barrier, count, site));
}

// fence.mbarrier_init: after it and a barrier of the cluster, other blocks and copies may use the mbarriers.
SAMTONE_DEVICE void fence_mbarrier_init(SAMTONE_SITE_ONLY) {
    SAMTONE_PTX("fence.mbarrier_init.release.cluster;" ::: "memory");
    SAMTONE_EMULATED_AS(emulator::fence_mbarrier_init(site));
}

// mbarrier.arrive at a barrier of this block.
SAMTONE_DEVICE void mbarrier_arrive(shared_address barrier SAMTONE_SITE) {
    SAMTONE_PTX("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
    SAMTONE_EMULATED_AS(emulator::mbarrier_arrive(barrier, site));
}

// mbarrier.arrive.expect_tx: arrives, and makes the phase also wait for so many more bytes.
SAMTONE_DEVICE void mbarrier_arrive_expect_tx(shared_address barrier, u32 bytes SAMTONE_SITE) {
    SAMTONE_PTX("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
    SAMTONE_EMULATED_AS(emulator::mbarrier_arrive_expect_tx(barrier, bytes, site));
}

// mapa, mbarrier.arrive: arrives at the barrier at this address in block `rank` of the cluster. This is a release to the own block only.
// That is enough for a thread that has read by wgmma alone, because wgmma_wait_group has ended those reads. With .release.cluster, each
// arrival would flush the writes of the caches.
SAMTONE_DEVICE void mbarrier_arrive_cluster(shared_address barrier, u32 rank SAMTONE_SITE) {
    SAMTONE_PTX("{.reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1; "
                "mbarrier.arrive.shared::cluster.b64 _, [remote];}" ::"r"(barrier), "r"(rank) : "memory");
    SAMTONE_EMULATED_AS(emulator::mbarrier_arrive_cluster(barrier, rank, site));
}

// mbarrier.try_wait.parity, until the phase of that parity has ended. Afterwards the thread sees what was done before the arrivals.
SAMTONE_DEVICE void mbarrier_wait(shared_address barrier, u32 parity SAMTONE_SITE) {
    SAMTONE_PTX("{\n\t.reg .pred done;\n\t"
                "WAIT:\n\tmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t@done bra DONE;\n\tbra WAIT;\n\t"
                "DONE:\n\t}" ::"r"(barrier), "r"(parity) : "memory");
    SAMTONE_EMULATED_AS(emulator::mbarrier_wait(barrier, parity, site));
}

// ---- bulk copies: one thread starts a copy of a multiple of 16 bytes, from and to addresses that are multiples of 16

// cp.async.bulk, global to shared memory. When the copy has landed, it adds its bytes to this block's barrier.
SAMTONE_DEVICE void cp_async_bulk_load(shared_address to, const void* from, u32 bytes, shared_address barrier SAMTONE_SITE) {
    SAMTONE_PTX("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
                "r"(bytes), "r"(barrier) : "memory");
    SAMTONE_EMULATED_AS(emulator::cp_async_bulk_load(to, from, bytes, barrier, 0, site));
}

// The same copy into every block of the cluster whose bit is set in `ranks`. It lands at this address in each block, and adds its bytes to
// the block's own barrier at the address `barrier`.
SAMTONE_DEVICE void cp_async_bulk_load_multicast(shared_address to, const void* from, u32 bytes, shared_address barrier,
                                                 u16 ranks SAMTONE_SITE) {
    SAMTONE_PTX("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;"
                ::"r"(to), "l"(from), "r"(bytes), "r"(barrier), "h"(ranks) : "memory");
    SAMTONE_EMULATED_AS(emulator::cp_async_bulk_load(to, from, bytes, barrier, ranks, site));
}

// cp.async.bulk, shared to global memory. The copy joins this thread's current group.
SAMTONE_DEVICE void cp_async_bulk_store(void* to, shared_address from, u32 bytes SAMTONE_SITE) {
    SAMTONE_PTX("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes) : "memory");
    SAMTONE_EMULATED_AS(emulator::cp_async_bulk_store(to, from, bytes, site));
}
SAMTONE_DEVICE void cp_async_bulk_commit_group(SAMTONE_SITE_ONLY) {
    SAMTONE_PTX("cp.async.bulk.commit_group;" ::: "memory");
    SAMTONE_EMULATED_AS(emulator::cp_async_bulk_commit_group(site));
}
// Waits until at most `pending` groups of this thread still read shared memory (…_read), or until at most so many are still under way.
template <u32 pending> SAMTONE_DEVICE void cp_async_bulk_wait_group_read(SAMTONE_SITE_ONLY) {
    SAMTONE_PTX("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
    SAMTONE_EMULATED_AS(emulator::cp_async_bulk_wait_group(pending, true, site));
}
template <u32 pending> SAMTONE_DEVICE void cp_async_bulk_wait_group(SAMTONE_SITE_ONLY) {
    SAMTONE_PTX("cp.async.bulk.wait_group %0;" ::"n"(pending) : "memory");
    SAMTONE_EMULATED_AS(emulator::cp_async_bulk_wait_group(pending, false, site));
}

// fence.proxy.async: asynchronous reads, by this thread or by others, that come later see what this thread stored to shared memory before.
SAMTONE_DEVICE void fence_proxy_async(SAMTONE_SITE_ONLY) {
    SAMTONE_PTX("fence.proxy.async.shared::cta;" ::: "memory");
    SAMTONE_EMULATED_AS(emulator::fence_proxy_async(site));
}

// ---- stmatrix: the counterpart of ldmatrix. Lane 8i + j gives the address of row j of matrix i: 16 bytes. r[i] holds the elements
// (g, 2t) and (g, 2t + 1) of matrix i, or with .trans the elements (2t, g) and (2t + 1, g).
SAMTONE_DEVICE void stmatrix_x4(shared_address row, const u32 (&r)[4] SAMTONE_SITE) {
    SAMTONE_PTX("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(r[0]), "r"(r[1]), "r"(r[2]),
                "r"(r[3]) : "memory");
    SAMTONE_EMULATED_AS(emulator::stmatrix(row, r, 4, false, site));
}
SAMTONE_DEVICE void stmatrix_x4_trans(shared_address row, const u32 (&r)[4] SAMTONE_SITE) {
    SAMTONE_PTX("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(r[0]), "r"(r[1]),
                "r"(r[2]), "r"(r[3]) : "memory");
    SAMTONE_EMULATED_AS(emulator::stmatrix(row, r, 4, true, site));
}

// ---- wgmma: d (64 x N, f32) = a (64 x 16) · b (16 x N), or += . Both operands are f16 in shared memory. A warpgroup starts it, and it
// goes on asynchronously. Warp w of the warpgroup holds the rows 16 w … 16 w + 15. In these, d[4 j + r] is row g + 8 (r / 2), column
// 8 j + 2 t + r % 2.
//
// 64 bits describe an operand: where it starts, and two strides. Its bytes lie in rows of 128. Eight rows make an atom of 1024 bytes,
// which is aligned to 1024 bytes. In it the 16-byte chunk c of row r is at c ^ r % 8: the bits 4..6 of an address are xored with its
// bits 7..9.
//   not transposed: k runs along a row, and row r is index m (or n) r. Eight rows take 1024 bytes. The next eight begin `stride` bytes
//                   further, and the next 16 of k begin 32 bytes further.
//   transposed:     m (or n) runs along a row, and row r is k r. A row has 64 indices. The next 64 indices begin `leading` bytes further,
//                   and the next eight of k begin `stride` bytes further.

// The descriptor of an operand that lies in rows of 128 bytes with that swizzle.
SAMTONE_DEVICE u64 wgmma_operand(shared_address start, u32 leading, u32 stride) {
    constexpr u64 SWIZZLE_128 = 1ull << 62;
    return SWIZZLE_128 | static_cast<u64>(stride / 16) << 32 | static_cast<u64>(leading / 16) << 16 | (start & 0x3ffff) / 16;
}

// The descriptor of what lies so many bytes further in the same operand.
SAMTONE_DEVICE u64 advanced(u64 operand, u32 bytes) { return operand + bytes / 16; }

// wgmma.fence: needed before the first wgmma, and whenever another instruction has used a register of theirs since.
SAMTONE_DEVICE void wgmma_fence(SAMTONE_SITE_ONLY) {
    SAMTONE_PTX("wgmma.fence.sync.aligned;" ::: "memory");
    SAMTONE_EMULATED_AS(emulator::wgmma_fence(site));
}
SAMTONE_DEVICE void wgmma_commit_group(SAMTONE_SITE_ONLY) {
    SAMTONE_PTX("wgmma.commit_group.sync.aligned;" ::: "memory");
    SAMTONE_EMULATED_AS(emulator::wgmma_commit_group(site));
}

// wgmma.wait_group: waits until at most `pending` groups are under way. Those still read their operands, and nobody may touch their sums.
template <u32 pending> SAMTONE_DEVICE void wgmma_wait_group(SAMTONE_SITE_ONLY) {
    SAMTONE_PTX("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
    SAMTONE_EMULATED_AS(emulator::wgmma_wait_group(pending, site));
}

// wgmma writes its sums without the compiler's knowledge. This keeps the compiler from moving a use of them across this line.
template <u32 N> SAMTONE_DEVICE void hold(float (&d)[N]) {
    UNROLL
    for (u32 i = 0; i < N; ++i) {
        SAMTONE_PTX("" : "+f"(d[i])::"memory");
        SAMTONE_EMULATED_AS(static_cast<void>(d[i]));
    }
}

template <bool A_TRANSPOSED, bool B_TRANSPOSED>
SAMTONE_DEVICE void wgmma_m64n128k16_f16(float (&d)[64], u64 a, u64 b, bool accumulate SAMTONE_SITE) {
    SAMTONE_PTX("{.reg .pred p; setp.ne.b32 p, %66, 0;\n\twgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
                "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
                "%64, %65, p, 1, 1, %67, %68;}"
                :
                "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
                "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
                "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
                "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
                "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),
                "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),
                "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
                "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
                : "l"(a), "l"(b), "r"(static_cast<u32>(accumulate)), "n"(A_TRANSPOSED ? 1 : 0), "n"(B_TRANSPOSED ? 1 : 0));
    SAMTONE_EMULATED_AS(emulator::wgmma(d, nullptr, 128, a, b, accumulate, A_TRANSPOSED, B_TRANSPOSED, site));
}
// The same for 256 columns: `low` has the sums of the columns 0..127, `high` those of 128..255.
template <bool A_TRANSPOSED, bool B_TRANSPOSED>
SAMTONE_DEVICE void wgmma_m64n256k16_f16(float (&low)[64], float (&high)[64], u64 a, u64 b, bool accumulate SAMTONE_SITE) {
    SAMTONE_PTX("{.reg .pred p; setp.ne.b32 p, %130, 0;\n\twgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 "
                "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
                "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
                "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
                "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
                "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
                "%128, %129, p, 1, 1, %131, %132;}"
                :
                "+f"(low[0]), "+f"(low[1]), "+f"(low[2]), "+f"(low[3]), "+f"(low[4]), "+f"(low[5]), "+f"(low[6]), "+f"(low[7]),
                "+f"(low[8]), "+f"(low[9]), "+f"(low[10]), "+f"(low[11]), "+f"(low[12]), "+f"(low[13]), "+f"(low[14]), "+f"(low[15]),
                "+f"(low[16]), "+f"(low[17]), "+f"(low[18]), "+f"(low[19]), "+f"(low[20]), "+f"(low[21]), "+f"(low[22]), "+f"(low[23]),
                "+f"(low[24]), "+f"(low[25]), "+f"(low[26]), "+f"(low[27]), "+f"(low[28]), "+f"(low[29]), "+f"(low[30]), "+f"(low[31]),
                "+f"(low[32]), "+f"(low[33]), "+f"(low[34]), "+f"(low[35]), "+f"(low[36]), "+f"(low[37]), "+f"(low[38]), "+f"(low[39]),
                "+f"(low[40]), "+f"(low[41]), "+f"(low[42]), "+f"(low[43]), "+f"(low[44]), "+f"(low[45]), "+f"(low[46]), "+f"(low[47]),
                "+f"(low[48]), "+f"(low[49]), "+f"(low[50]), "+f"(low[51]), "+f"(low[52]), "+f"(low[53]), "+f"(low[54]), "+f"(low[55]),
                "+f"(low[56]), "+f"(low[57]), "+f"(low[58]), "+f"(low[59]), "+f"(low[60]), "+f"(low[61]), "+f"(low[62]), "+f"(low[63]),
                "+f"(high[0]), "+f"(high[1]), "+f"(high[2]), "+f"(high[3]), "+f"(high[4]), "+f"(high[5]), "+f"(high[6]), "+f"(high[7]),
                "+f"(high[8]), "+f"(high[9]), "+f"(high[10]), "+f"(high[11]), "+f"(high[12]), "+f"(high[13]), "+f"(high[14]), "+f"(high[15]),
                "+f"(high[16]), "+f"(high[17]), "+f"(high[18]), "+f"(high[19]), "+f"(high[20]), "+f"(high[21]), "+f"(high[22]), "+f"(high[23]),
                "+f"(high[24]), "+f"(high[25]), "+f"(high[26]), "+f"(high[27]), "+f"(high[28]), "+f"(high[29]), "+f"(high[30]), "+f"(high[31]),
                "+f"(high[32]), "+f"(high[33]), "+f"(high[34]), "+f"(high[35]), "+f"(high[36]), "+f"(high[37]), "+f"(high[38]), "+f"(high[39]),
                "+f"(high[40]), "+f"(high[41]), "+f"(high[42]), "+f"(high[43]), "+f"(high[44]), "+f"(high[45]), "+f"(high[46]), "+f"(high[47]),
                "+f"(high[48]), "+f"(high[49]), "+f"(high[50]), "+f"(high[51]), "+f"(high[52]), "+f"(high[53]), "+f"(high[54]), "+f"(high[55]),
                "+f"(high[56]), "+f"(high[57]), "+f"(high[58]), "+f"(high[59]), "+f"(high[60]), "+f"(high[61]), "+f"(high[62]), "+f"(high[63])
                : "l"(a), "l"(b), "r"(static_cast<u32>(accumulate)), "n"(A_TRANSPOSED ? 1 : 0), "n"(B_TRANSPOSED ? 1 : 0));
    SAMTONE_EMULATED_AS(emulator::wgmma(low, high, 256, a, b, accumulate, A_TRANSPOSED, B_TRANSPOSED, site));
}
