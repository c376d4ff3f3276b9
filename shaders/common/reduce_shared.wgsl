// reduce_shared.wgsl: sums and maxima over a workgroup of 64, through workgroup memory, in an order that never changes. Every invocation
// gets the result. reduce_subgroup.wgsl does the same with exchanges within subgroups.

const LANES = 64u;

struct Lane {
    @builtin(local_invocation_index) index: u32,
}

var<workgroup> lanes: array<Pair, LANES>;
var<workgroup> lane_maxima: array<i32, LANES>;

fn reduce_sum(x: Pair, lane: Lane) -> Pair {
    lanes[lane.index] = x;
    workgroupBarrier();
    for (var step = LANES / 2u; step > 0u; step >>= 1u) {
        if lane.index < step {
            lanes[lane.index] = pair_sum(lanes[lane.index], lanes[lane.index + step]);
        }
        workgroupBarrier();
    }
    let all = lanes[0];
    workgroupBarrier();
    return all;
}

fn reduce_max(x: i32, lane: Lane) -> i32 {
    lane_maxima[lane.index] = x;
    workgroupBarrier();
    for (var step = LANES / 2u; step > 0u; step >>= 1u) {
        if lane.index < step {
            lane_maxima[lane.index] = max(lane_maxima[lane.index], lane_maxima[lane.index + step]);
        }
        workgroupBarrier();
    }
    let all = lane_maxima[0];
    workgroupBarrier();
    return all;
}
