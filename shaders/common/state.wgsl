// state.wgsl: where things lie in the buffer `state`, in words. src/wgpu/layout.rs lays it out. Numbers are those of a prefix. Those of the
// next prefix lie `prefix_words` further on. Sums are apart: those of all prefixes follow each other.

// Of an index of a tower: n = 2^12/‖packed‖ as a Pair, the power t of two in packed = x·2^t, and 2^(t − t of the shorter prefix), which is
// 1 for the shortest. The norm is that of the entries that the prefix has, under its t. n is 0 for a row without direction.
const NORM_WORDS = 4u;
const NORM_POWER = 2u;
const NORM_STEP = 3u;

// Of a row as an anchor: query key, passage key, and as f32 the highest cosine that it keeps and s⁺ with a slack. A negative above the
// latter outranks the positive.
const ANCHOR_WORDS = 4u;

// Of a row in a block of loss.md: Σ exp(β s) = (high + low)·2^exponent, and the number of negatives above the positive.
const SUM_WORDS = 4u;

// Of a row: s⁺ as a Pair.
const POSITIVE_WORDS = 2u;

// Of an index of a tower: its radial sum, in units of 2^SHIFT, as a Pair. prefixes.wgsl makes R of it.
const RADIAL_WORDS = 2u;

// Scaled numbers: of each row in each block the coefficient, of each row the diagonal and the loss, and two that positives add to the
// radial sums: for the query, for the positive.
const SCALED_WORDS = 2u;

// Results. First come those in f32, for whoever reads them on the device, and then what the host reads.
const LOSS = 0u;
const PRECISION_QP = 1u;
const MRR_QP = 2u;
const PRECISION_PQ = 3u;
const MRR_PQ = 4u;
const GRAD_TAU = 5u;
const GRAD_LOG_BETA = 6u;
const SHIFT = 8u;           // a whole number: gradients of logits are in units of 2^SHIFT
const ACCEPTED = 9u;        // 1 after a forward call that was not refused. Without it gradients are NaN
const UPSTREAM = 10u;       // Scaled, or NOT_A_NUMBER for one that is not finite
const BETA_SUM = 12u;       // Σ G (s − s⁺) in units of 2^SHIFT, as a Pair
const LOSS_SUM = 14u;       // the loss as a Pair
const NOT_A_NUMBER = 0x7fc00000u;

// What a call found wrong with its inputs, in the buffer `status`: for each kind of fault the lowest row that has it, or NONE.
const NON_FINITE = 0u; // + 1 for passages
const ZERO_NORM = 2u;  // + 1 for passages
const NO_NEGATIVE = 4u;
const NO_NEGATIVE_GROUP = 5u;
const NO_NEGATIVE_PREFIX = 6u; // the shortest prefix in which a row has none; the row is one of that prefix
const RAN = 7u; // NONE after any forward call
const STATUS_WORDS = 8u;
