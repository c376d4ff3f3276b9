// logit.wgsl: exponentials of cosines times β. Needs numbers.wgsl, and `params` with β·log2 e as the sum of three numbers: beta_head, which
// has 12 bits, beta_middle and beta_tail.

// s·β·log2 e − k for a whole k. The product of the heads is exact, and so is the difference of that and k. So 1/τ costs no digit of a logit
// near 100.
fn logits_minus(s: vec4<f32>, k: vec4<f32>) -> vec4<f32> {
    let s0 = vec4<f32>(head(s.x), head(s.y), head(s.z), head(s.w));
    let s1 = s - s0;
    let rest = s0 * params.beta_middle + (s1 * params.beta_head + (s1 * params.beta_middle + s * params.beta_tail));
    return (s0 * params.beta_head - k) + rest;
}

fn logit_minus(s: f32, k: f32) -> f32 {
    return logits_minus(vec4<f32>(s), vec4<f32>(k)).x;
}

// The whole number nearest to s·β·log2 e, give or take one. With it, logits_minus leaves a small rest of the largest logit at every
// temperature. With the head alone it would be off by up to 2^-12 of the logit. At τ = 1e-6 that is beyond the exponents of f32.
fn whole_logit(s: f32) -> f32 {
    return round((params.beta_head + params.beta_middle) * s);
}

// exp(β s) for a cosine of more than 24 bits.
fn exponential_of(s: Pair) -> Scaled {
    let k = whole_logit(s.high);
    let rest = logit_minus(s.high, k) + s.low * (params.beta_head + params.beta_middle);
    let whole = round(rest);
    return scaled(exp2_of(rest - whole), i32(k) + i32(whole));
}
