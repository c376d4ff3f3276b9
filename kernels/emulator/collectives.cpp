// collectives.cpp: what the lanes of a warp do together: exchanges, ldmatrix, stmatrix, mma.sync.
#include "block.hpp"
#include <algorithm>

namespace emulator {

namespace {
bool takes_part(const Thread& thread, u32 mask) { return (mask >> thread.lane() & 1) != 0; }

struct Exchange {
    u32 value, parameter, result;
};

template <class T> T& operand(Thread* const* warp, u32 lane) { return *static_cast<T*>(warp[lane]->operand); }

// Every lane of the mask that now.running shares gets the value of the lane that `source` names.
template <u32 (*source)(u32 lane, u32 parameter)> void exchange(Thread* const* warp) {
    const Thread& last = *now.running;
    for (u32 lane = 0; lane < WARP; ++lane) {
        if ((last.mask >> lane & 1) == 0) continue;
        Exchange& mine = operand<Exchange>(warp, lane);
        u32 from = source(lane, mine.parameter);
        if (!takes_part(*warp[from], last.mask))
            fail(*warp[lane], std::string(last.operation) + " reads lane " + std::to_string(from) + ", which is not in its mask (" +
                                  place(last.site) + ")");
        mine.result = operand<Exchange>(warp, from).value;
    }
}

u32 indexed(u32, u32 source) { return source % WARP; }
u32 butterfly(u32 lane, u32 lane_mask) { return lane ^ (lane_mask % WARP); }
u32 down(u32 lane, u32 delta) { return lane + delta % WARP < WARP ? lane + delta % WARP : lane; }

u32 exchanged(const char* operation, u32 mask, u32 value, u32 parameter, Site site, void (*complete)(Thread* const*)) {
    Exchange exchange{value, parameter, 0};
    rendezvous(operation, mask, site, &exchange, complete);
    return exchange.result;
}

void ballot(Thread* const* warp) {
    u32 mask = now.running->mask, bits = 0;
    for (u32 lane = 0; lane < WARP; ++lane)
        if ((mask >> lane & 1) != 0 && operand<Exchange>(warp, lane).value != 0) bits |= 1u << lane;
    for (u32 lane = 0; lane < WARP; ++lane)
        if ((mask >> lane & 1) != 0) operand<Exchange>(warp, lane).result = bits;
}

void join(Thread* const* warp) {
    std::array<Thread*, WARP> lanes;
    u32 count = 0;
    for (u32 lane = 0; lane < WARP; ++lane)
        if ((now.running->mask >> lane & 1) != 0) lanes[count++] = warp[lane];
    meet(lanes.data(), count);
}

struct Fragments {
    u32* r;
    u32 matrices;
    bool transposed;
    shared_address row;
};

void load_matrices(Thread* const* warp) {
    const Thread& last = *now.running;
    const u32 matrices = operand<Fragments>(warp, 0).matrices;
    for (u32 i = 0; i < matrices; ++i) {
        u16 matrix[8][8];
        for (u32 row = 0; row < 8; ++row) {
            const Thread& reader = *warp[8 * i + row];
            check_read_shared(reader, operand<Fragments>(warp, 8 * i + row).row, matrix[row], 16, last.operation, last.site);
        }
        for (u32 lane = 0; lane < WARP; ++lane) {
            const Fragments& mine = operand<Fragments>(warp, lane);
            u32 g = lane / 4, t = lane % 4;
            u32 low = mine.transposed ? matrix[2 * t][g] : matrix[g][2 * t];
            u32 high = mine.transposed ? matrix[2 * t + 1][g] : matrix[g][2 * t + 1];
            mine.r[i] = low | high << 16;
        }
    }
}

struct Stored {
    const u32* r;
    u32 matrices;
    bool transposed;
    shared_address row;
};

void store_matrices(Thread* const* warp) {
    const Thread& last = *now.running;
    const u32 matrices = operand<Stored>(warp, 0).matrices;
    for (u32 i = 0; i < matrices; ++i) {
        u16 matrix[8][8];
        for (u32 lane = 0; lane < WARP; ++lane) {
            const Stored& mine = operand<Stored>(warp, lane);
            u32 g = lane / 4, t = lane % 4;
            for (u32 k = 0; k < 2; ++k)
                (mine.transposed ? matrix[2 * t + k][g] : matrix[g][2 * t + k]) = static_cast<u16>(mine.r[i] >> 16 * k);
        }
        for (u32 row = 0; row < 8; ++row)
            check_write_shared(*warp[8 * i + row], operand<Stored>(warp, 8 * i + row).row, matrix[row], 16, last.operation, last.site);
    }
}

struct Product {
    float* d;
    const u32* a;
    const u32* b;
    Half type;
};

float element(u32 pair, u32 upper, Half type) {
    u16 bits = static_cast<u16>(pair >> (16 * upper));
    return type == Half::bf16 ? float_of(static_cast<u32>(bits) << 16) : f32_of_f16(bits);
}

// Adds the accumulator and eight products along k, then the next eight, as devices of 8.0 to 8.9 do. Devices of 9.0 add all sixteen at
// once.
void multiply(Thread* const* warp) {
    double a[16][16], b[8][16]; // b is by columns
    i32 a_exponents[16][16], b_exponents[8][16];
    auto put = [](double& number, i32& exponent, u32 pair, u32 upper, Half type) {
        const float x = element(pair, upper, type);
        number = x;
        exponent = exponent_of_factor(x, type == Half::bf16 ? -126 : -14);
    };
    for (u32 lane = 0; lane < WARP; ++lane) {
        const Product& p = operand<Product>(warp, lane);
        u32 g = lane / 4, t = lane % 4;
        for (u32 r = 0; r < 4; ++r)
            for (u32 i = 0; i < 2; ++i) {
                const u32 row = g + 8 * (r % 2), k = 2 * t + 8 * (r / 2) + i;
                put(a[row][k], a_exponents[row][k], p.a[r], i, p.type);
            }
        for (u32 r = 0; r < 2; ++r)
            for (u32 i = 0; i < 2; ++i) put(b[g][2 * t + 8 * r + i], b_exponents[g][2 * t + 8 * r + i], p.b[r], i, p.type);
    }
    // Most rows and columns of small problems are padding. Products with zeros leave a sum as it is, except for the sign of a zero.
    auto all_of = [](const double(&numbers)[16], auto is) { return std::all_of(numbers, numbers + 16, is); };
    auto is_zero = [](double x) { return x == 0; };
    auto is_finite = [](double x) { return std::isfinite(x); };
    bool row_is_zero[16], column_is_zero[8], all_finite = true;
    for (u32 row = 0; row < 16; ++row) {
        row_is_zero[row] = all_of(a[row], is_zero);
        all_finite = all_finite && all_of(a[row], is_finite);
    }
    for (u32 column = 0; column < 8; ++column) {
        column_is_zero[column] = all_of(b[column], is_zero);
        all_finite = all_finite && all_of(b[column], is_finite);
    }
    for (u32 lane = 0; lane < WARP; ++lane) {
        const Product& p = operand<Product>(warp, lane);
        u32 g = lane / 4, t = lane % 4;
        for (u32 r = 0; r < 4; ++r) {
            u32 row = g + 8 * (r / 2), column = 2 * t + r % 2;
            if (all_finite && (row_is_zero[row] || column_is_zero[column]) && std::isfinite(p.d[r])) {
                p.d[r] += 0.0f;
                continue;
            }
            for (u32 half = 0; half < 16; half += 8) {
                double products[8];
                i32 exponents[8];
                for (u32 k = 0; k < 8; ++k) {
                    products[k] = a[row][half + k] * b[column][half + k];
                    exponents[k] = a_exponents[row][half + k] + b_exponents[column][half + k];
                }
                p.d[r] = fused_sum(p.d[r], products, exponents, 8, MMA_FRACTION_BITS);
            }
        }
    }
}
} // namespace

void bar_warp_sync(u32 mask, Site site) { rendezvous("bar.warp.sync", mask, site, nullptr, join); }

u32 shfl_sync_idx(u32 mask, u32 value, u32 source, Site site) {
    return exchanged("shfl.sync.idx", mask, value, source, site, exchange<indexed>);
}

u32 shfl_sync_bfly(u32 mask, u32 value, u32 lane_mask, Site site) {
    return exchanged("shfl.sync.bfly", mask, value, lane_mask, site, exchange<butterfly>);
}

u32 shfl_sync_down(u32 mask, u32 value, u32 delta, Site site) {
    return exchanged("shfl.sync.down", mask, value, delta, site, exchange<down>);
}

u32 vote_sync_ballot(u32 mask, bool predicate, Site site) {
    return exchanged("vote.sync.ballot", mask, predicate ? 1 : 0, 0, site, ballot);
}

void ldmatrix(u32* fragment, u32 matrices, bool transposed, shared_address row, Site site) {
    constexpr const char* NAMES[2][3] = {{"ldmatrix.x1", "ldmatrix.x2", "ldmatrix.x4"},
                                         {"ldmatrix.x1.trans", "ldmatrix.x2.trans", "ldmatrix.x4.trans"}};
    Fragments fragments{fragment, matrices, transposed, row};
    rendezvous(NAMES[transposed ? 1 : 0][matrices / 2], ALL_LANES, site, &fragments, load_matrices);
}

void stmatrix(shared_address row, const u32* fragment, u32 matrices, bool transposed, Site site) {
    Stored stored{fragment, matrices, transposed, row};
    rendezvous(transposed ? "stmatrix.x4.trans" : "stmatrix.x4", ALL_LANES, site, &stored, store_matrices);
}

void mma_m16n8k16(float* d, const u32* a, const u32* b, Half type, Site site) {
    Product product{d, a, b, type};
    rendezvous(type == Half::bf16 ? "mma.sync.m16n8k16.bf16" : "mma.sync.m16n8k16.f16", ALL_LANES, site, &product, multiply);
}

} // namespace emulator
