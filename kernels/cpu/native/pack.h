// From canonical weights to panels.
//
//   int4   [panel][segment][unit / 8][4][64 bytes]: 64 bytes are 16 outputs by 8 inputs; byte 4 i + b of them holds input b of output
//          i in its low nibble, and input b + 4 in its high one; fp4 likewise
//   int8   [panel][segment][unit / 4][4][64 bytes]: byte 4 i + b is input b of output i
//   f8     [panel][K][64]
//   bf16   [panel][ceil(K / 2)][64][2]: pairs of inputs
//   f16    [panel][K][64], f32 likewise
//   scales [panel][groups][64], zeros likewise
//
// Outputs beyond N and inputs beyond a segment's end are zero codes; their scales are zero.
#pragma once
#include "pool.h"
#include "types.h"

namespace appliance {

struct PackArgs {
    const uint8_t* codes;   // int4: [N, ceil(K / 2)], low nibble = even input; int8, f8: [N, K]; dense: [N, K] in its type
    const void* scales;     // [groups, N]
    const uint8_t* zeros;   // [groups, N] or null
    uint8_t* to_codes;
    void* to_scales;
    uint8_t* to_zeros;
};

// Derives panels, per_group, segments and unit from N, K, group, codes and gated.
void finish(Linear& w);
int64_t code_bytes(const Linear& w);
void pack(Pool& pool, const Linear& w, const PackArgs& args);

}  // namespace appliance
