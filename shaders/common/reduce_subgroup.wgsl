// reduce_subgroup.wgsl: sums and maxima over a workgroup of 64, by exchanges within subgroups and then through workgroup memory. The order
// never changes on one device. Every invocation gets the result. The alternative is reduce_shared.wgsl.

const LANES = 64u;

struct Lane {
    @builtin(local_invocation_index) index: u32,
    @builtin(subgroup_invocation_id) within: u32,
    @builtin(subgroup_size) size: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(num_subgroups) subgroups: u32,
}

var<workgroup> lanes: array<Pair, LANES>;
var<workgroup> lane_maxima: array<i32, LANES>;

// Every invocation has the same `size`. Browsers do not see that of a member of a struct.
@diagnostic(off, subgroup_uniformity)
fn reduce_sum(x: Pair, lane: Lane) -> Pair {
    var sum = x;
    for (var step = 1u; step < min(lane.size, LANES); step <<= 1u) {
        sum = pair_sum(sum, Pair(subgroupShuffleXor(sum.high, step), subgroupShuffleXor(sum.low, step)));
    }
    if lane.within == 0u {
        lanes[lane.subgroup] = sum;
    }
    workgroupBarrier();
    var all = lanes[0];
    for (var k = 1u; k < lane.subgroups; k += 1u) {
        all = pair_sum(all, lanes[k]);
    }
    workgroupBarrier();
    return all;
}

@diagnostic(off, subgroup_uniformity)
fn reduce_max(x: i32, lane: Lane) -> i32 {
    var top = x;
    for (var step = 1u; step < min(lane.size, LANES); step <<= 1u) {
        top = max(top, subgroupShuffleXor(top, step));
    }
    if lane.within == 0u {
        lane_maxima[lane.subgroup] = top;
    }
    workgroupBarrier();
    var all = lane_maxima[0];
    for (var k = 1u; k < lane.subgroups; k += 1u) {
        all = max(all, lane_maxima[k]);
    }
    workgroupBarrier();
    return all;
}
