// instructions.cu: instructions one at a time, with results that are known. A test of the emulator, or of a device. Each kernel is one
// warp, unless it says otherwise. Thread i reads and writes element i of its vectors.
#include "../../common/instructions.cuh"

// For each element: x as bf16 and f16, pairs in both orders, and back.
KERNEL(conversions, 256, const float* x, u16* to_bf16, u16* to_f16, u32* pairs_bf16, u32* pairs_f16, float* from_bf16, float* from_f16,
       u32 n) {
    for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
        const float value = ld_global_nc_f32(x + i), next = ld_global_nc_f32(x + (i + 1) % n);
        const bf16 b = cvt_rn_bf16_f32(value);
        const f16 h = cvt_rn_f16_f32(value);
        st_global_u16(to_bf16 + i, b.bits);
        st_global_u16(to_f16 + i, h.bits);
        st_global_u32(pairs_bf16 + i, cvt_rn_bf16x2_f32(value, next));
        st_global_u32(pairs_f16 + i, cvt_rn_f16x2_f32(value, next));
        st_global_f32(from_bf16 + i, cvt_f32(b));
        st_global_f32(from_f16 + i, cvt_f32(h));
    }
}

// For each element: eight results in f32 and two in f64.
KERNEL(arithmetic, 256, const float* x, float* results, double* doubles, u32 n) {
    for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
        const float value = ld_global_nc_f32(x + i), next = ld_global_nc_f32(x + (i + 1) % n);
        st_global_f32(results + 8 * i, ex2_approx(value));
        st_global_f32(results + 8 * i + 1, lg2_approx(value));
        st_global_f32(results + 8 * i + 2, rcp_approx(value));
        st_global_f32(results + 8 * i + 3, sqrt_rn(value));
        st_global_f32(results + 8 * i + 4, fma_rn(value, next, -value));
        st_global_f32(results + 8 * i + 5, max_f32(value, next));
        st_global_f32(results + 8 * i + 6, min_f32(value, next));
        st_global_f32(results + 8 * i + 7, mul_rn(value, next));
        st_global_f64(doubles + 2 * i, sqrt_rn(static_cast<double>(value)));
        st_global_f64(doubles + 2 * i + 1, fma_rn(static_cast<double>(value), static_cast<double>(next), 1.0));
    }
}

// Four exchanges for each lane: from lane 5 i, with lane ^ 9, from lane + 3, and a ballot of odd values.
KERNEL(exchanges, 32, const u32* x, u32* results) {
    const u32 lane = lane_id(), value = ld_global_u32(x + lane);
    st_global_u32(results + 4 * lane, shfl_sync_idx(ALL_LANES, value, 5 * lane));
    st_global_u32(results + 4 * lane + 1, shfl_sync_bfly(ALL_LANES, value, 9));
    st_global_u32(results + 4 * lane + 2, shfl_sync_down(ALL_LANES, value, 3));
    st_global_u32(results + 4 * lane + 3, vote_sync_ballot(ALL_LANES, value % 2 == 1));
}

// Loads four 8x8 matrices of u16 (x: 256 elements) into fragments, each kind after the other: 1 + 2 + 4, then transposed.
KERNEL(matrix_loads, 32, const u16* x, u32* results) {
    const u32 lane = lane_id();
    st_shared_u32x4(shared_base() + 16 * lane, ld_global_nc_u32x4(x + 8 * lane));
    bar_warp_sync(ALL_LANES);
    u32 one[1], two[2], four[4];
    u32* to = results + 14 * lane;
    const shared_address row = shared_base() + 16 * lane;
    ldmatrix_x1(one, lane < 8 ? row : 0);
    ldmatrix_x2(two, lane < 16 ? row : 0);
    ldmatrix_x4(four, row);
    st_global_u32(to, one[0]);
    for (u32 i = 0; i < 2; ++i) st_global_u32(to + 1 + i, two[i]);
    for (u32 i = 0; i < 4; ++i) st_global_u32(to + 3 + i, four[i]);
    ldmatrix_x1_trans(one, lane < 8 ? row : 0);
    ldmatrix_x2_trans(two, lane < 16 ? row : 0);
    ldmatrix_x4_trans(four, row);
    st_global_u32(to + 7, one[0]);
    for (u32 i = 0; i < 2; ++i) st_global_u32(to + 8 + i, two[i]);
    for (u32 i = 0; i < 4; ++i) st_global_u32(to + 10 + i, four[i]);
}

// d += a · b on the fragments of each lane: 4 + 2 words, and 4 accumulators.
KERNEL(matrix_product, 32, const u32* a, const u32* b, float* d, u32 is_bf16) {
    const u32 lane = lane_id();
    const u32x4 words_a = ld_global_nc_u32x4(a + 4 * lane);
    const u32x2 words_b = ld_global_nc_u32x2(b + 2 * lane);
    const f32x4 start = ld_global_f32x4(d + 4 * lane);
    const u32 fragment_a[4] = {words_a.x, words_a.y, words_a.z, words_a.w}, fragment_b[2] = {words_b.x, words_b.y};
    float sums[4] = {start.x, start.y, start.z, start.w};
    if (is_bf16 != 0) mma_m16n8k16_bf16(sums, fragment_a, fragment_b);
    else mma_m16n8k16_f16(sums, fragment_a, fragment_b);
    st_global_f32x4(d + 4 * lane, f32x4{sums[0], sums[1], sums[2], sums[3]});
}

// Every load and store. x goes through shared memory to y, in pieces of each type: 32 bytes for each lane and each of 11 types. The pieces
// of the last type go once more, by st.global.cs.
KERNEL(loads_and_stores, 32, const unsigned char* x, unsigned char* y) {
    const u32 lane = lane_id();
    const shared_address at = shared_base() + 32 * lane;
    u32 type = 0;
#define THROUGH(name, bytes)                                                                                           \
    for (u32 i = 0; i < 32; i += bytes) {                                                                              \
        const u64 offset = (type * WARP + lane) * 32 + i;                                                              \
        st_shared_##name(at + i, i / bytes % 2 == 0 ? ld_global_##name(x + offset) : ld_global_nc_##name(x + offset)); \
        st_global_##name(y + offset, ld_shared_##name(at + i));                                                        \
    }                                                                                                                  \
    ++type;
    THROUGH(u16, 2)
    THROUGH(u32, 4)
    THROUGH(i32, 4)
    THROUGH(f32, 4)
    THROUGH(u64, 8)
    THROUGH(i64, 8)
    THROUGH(f64, 8)
    THROUGH(u32x2, 8)
    THROUGH(f32x2, 8)
    THROUGH(u32x4, 16)
    THROUGH(f32x4, 16)
#undef THROUGH
    for (u32 i = 0; i < 32; i += 16) {
        const u64 offset = (type * WARP + lane) * 32 + i;
        st_global_cs_f32x4(y + offset, ld_global_f32x4(x + offset));
    }
}

// Copies of 4, 8 and 16 bytes with every length of zero fill in steps of two: 2 + 4 + 8 pieces of 16 bytes for each lane.
KERNEL(copies, 32, const unsigned char* x, unsigned char* y) {
    const u32 lane = lane_id();
    const shared_address at = shared_base() + 256 * lane;
    u32 piece = 0;
    for (u32 source = 0; source <= 4; source += 2, ++piece) cp_async_ca_4(at + 16 * piece, x + 16 * lane, source);
    for (u32 source = 0; source <= 8; source += 4, ++piece) cp_async_ca_8(at + 16 * piece, x + 16 * lane, source);
    cp_async_commit_group();
    for (u32 source = 0; source <= 16; source += 4, ++piece) cp_async_cg_16(at + 16 * piece, x + 16 * lane, source);
    cp_async_commit_group();
    cp_async_wait_group<0>();
    for (u32 i = 0; i < 11; ++i) {
        const u32 words = i < 3 ? 1 : i < 6 ? 2 : 4;
        for (u32 w = 0; w < words; ++w) st_global_u32(y + (11 * lane + i) * 16 + 4 * w, ld_shared_u32(at + 16 * i + 4 * w));
    }
}

// Blocks add, take minima and set bits in one word each. Nobody knows which block comes first, but the results are known.
KERNEL(atomics, 64, u32* words) {
    const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    atom_global_add_u32(words, i);
    atom_global_min_u32(words + 1, 1000 - i);
    atom_global_or_u32(words + 2, 1u << (i % 32));
    fence_acq_rel_gpu();
}
