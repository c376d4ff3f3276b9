// logarithms.cuh: sums of exponentials as logarithms, and the common factor of a gradient. All of it is f64.
#pragma once
#include "problem.cuh"

constexpr double LN_2 = 0.693147180559945309417232121458;

SAMTONE_DEVICE double ln_of(const ExpSum& x) { return x.sum == 0 ? minus_infinity() : log_f64(x.sum) + x.exponent * LN_2; }

// SHIFT of a call, from the logarithm of the largest share that a row has in its gradient. A share of that size becomes about 2^13 in units
// of 2^SHIFT. So gradients of logits use the range of f16, and none leaves it.
SAMTONE_DEVICE double shift_of(double log_share) {
    constexpr double TARGET = 13;
    return log_share == minus_infinity() ? 0 : round_f64(log_share / LN_2) - TARGET;
}
