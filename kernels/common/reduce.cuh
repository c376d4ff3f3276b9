// reduce.cuh: sums and maxima over a thread block of 256 threads, in f64 and in an order that never changes.
//
// Shared   from 0 on: 8 bytes for each warp and value
// Sync     R1 every warp has written its values
//          R2 all threads have read the result, so that shared memory is free
#pragma once
#include "problem.cuh"

constexpr u32 REDUCE_THREADS = 256, REDUCE_BYTES = REDUCE_THREADS / WARP * 8;

struct Sum {
    SAMTONE_MEMBER static double of(double a, double b) { return a + b; }
};
struct Largest {
    SAMTONE_MEMBER static double of(double a, double b) { return a > b ? a : b; }
};

template <class Operation> SAMTONE_DEVICE double reduce_warp(double x SAMTONE_SITE) {
    for (u32 bit = 1; bit < WARP; bit *= 2) x = Operation::of(x, shfl_sync_bfly(ALL_LANES, x, bit SAMTONE_EMULATED_AS(, site)));
    return x;
}

// Every thread gets the result.
template <class Operation> SAMTONE_DEVICE double reduce_block(double x SAMTONE_SITE) {
    x = reduce_warp<Operation>(x SAMTONE_EMULATED_AS(, site));
    if (lane_id() == 0) st_shared_f64(shared_base() + 8 * warp_id(), x);
    SYNC(R1, bar_sync(SAMTONE_EMULATED_AS(site)));
    double all = ld_shared_f64(shared_base());
    for (u32 warp = 1; warp < REDUCE_THREADS / WARP; ++warp) all = Operation::of(all, ld_shared_f64(shared_base() + 8 * warp));
    SYNC(R2, bar_sync(SAMTONE_EMULATED_AS(site)));
    return all;
}

// Several reductions at once. Lane k of every warp gets the result of value k: the sum for k < SUMS, else the maximum. The order is that of
// `reduce_block`. Here shared memory is not free at the end: only after another barrier have all threads read the results.
template <u32 SUMS, u32 COUNT> SAMTONE_DEVICE double reduce_block_to_lanes(const double (&x)[COUNT] SAMTONE_SITE) {
    static_assert(COUNT <= WARP, "a lane for each");
    const shared_address mine = shared_base() + 8 * COUNT * warp_id();
    UNROLL
    for (u32 k = 0; k < COUNT; ++k) {
        const double all =
            k < SUMS ? reduce_warp<Sum>(x[k] SAMTONE_EMULATED_AS(, site)) : reduce_warp<Largest>(x[k] SAMTONE_EMULATED_AS(, site));
        if (lane_id() == k) st_shared_f64(mine + 8 * k, all);
    }
    SYNC(R1, bar_sync(SAMTONE_EMULATED_AS(site)));
    const u32 k = lane_id();
    double all = minus_infinity();
    if (k < COUNT) {
        all = ld_shared_f64(shared_base() + 8 * k);
        for (u32 warp = 1; warp < REDUCE_THREADS / WARP; ++warp) {
            const double other = ld_shared_f64(shared_base() + 8 * (COUNT * warp + k));
            all = k < SUMS ? all + other : Largest::of(all, other);
        }
    }
    return all;
}
