// outputs.cuh: where the sums of the gradient products go. In this file a block is a block of rows.
#pragma once
#include "problem.cuh"

ABI_STRUCT(Outputs, {
    u32 count, blocks;         // how many cuts; how many blocks. A space without gradients has no blocks
    u32 cuts[MAX_CUTS];        // where the parts of the space begin. The last cut is the end of the space
    u32 first_block[MAX_CUTS]; // the first block of each part
    float* sums;
    u64 stride; // from row to row, in elements
});
ABI_STRUCT(Product, {
    Outputs of[2];
    u32 dim, tiles_along_dim;
    u32 accumulate; // whether to add to what is there
    u32 padding;
    const u32x4* columns;  // with prefixes, of each tile along the dimension: see `Columns`; else null
    u64 prefix_gradients;  // bytes from the gradients of logits of one prefix to those of the next
});

// The columns of one tile: from `begin` on. It ends at `end` or before. Their segment is that of a prefix.
struct Columns {
    u32 begin, end, prefix;
};
template <u32 COLUMNS> SAMTONE_DEVICE Columns columns_of(const Product& product, u32 tile SAMTONE_SITE) {
    if (product.columns == nullptr) return {tile * COLUMNS, product.dim, 0};
    const u32x4 columns = ld_global_nc_u32x4(product.columns + tile SAMTONE_EMULATED_AS(, site));
    return {columns.x, columns.y, columns.z};
}

// One block: rows of one space, from `begin` on. It ends at `end` or before.
struct OutputRows {
    u32 space, begin, end;
};

template <u32 ROWS> SAMTONE_DEVICE OutputRows rows_of(const Product& product, u32 row_block) {
    const u32 space = row_block < product.of[0].blocks ? 0 : 1;
    if (space == 1) row_block -= product.of[0].blocks;
    const Outputs& outputs = product.of[space];
    u32 part = 0;
    while (part + 2 < outputs.count && row_block >= outputs.first_block[part + 1]) ++part;
    return {space, outputs.cuts[part] + (row_block - outputs.first_block[part]) * ROWS, outputs.cuts[part + 1]};
}

// Stores or adds the sums of the columns c and c + 1 of a row, if they are before `end`. c is even.
SAMTONE_DEVICE void store_sums(const Product& product, float* row, u32 c, u32 end, float first, float second SAMTONE_SITE) {
    if (c + 1 < end) {
        f32x2 sum{first, second};
        if (product.accumulate != 0) {
            const f32x2 before = ld_global_f32x2(row + c SAMTONE_EMULATED_AS(, site));
            sum = {before.x + sum.x, before.y + sum.y};
        }
        st_global_f32x2(row + c, sum SAMTONE_EMULATED_AS(, site));
    } else if (c < end) {
        const float before = product.accumulate != 0 ? ld_global_f32(row + c SAMTONE_EMULATED_AS(, site)) : 0.0f;
        st_global_f32(row + c, before + first SAMTONE_EMULATED_AS(, site));
    }
}
