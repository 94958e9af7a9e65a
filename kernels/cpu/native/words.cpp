#include "words.h"

#include <algorithm>
#include <cstring>

namespace appliance {
namespace {

constexpr int kColumns[8] = {0, 2, 4, 6, 1, 3, 5, 7};  // of a word's nibbles, the lowest first
constexpr int kWide = 16, kDeep = 16;                  // words, and blocks of eight inputs, of a tile: an output's are a cache line

typedef uint32_t Words __attribute__((vector_size(4 * kWide)));

template <int kBits> inline void exchange(Words& above, Words& below, uint32_t mask) {
    const Words moved = (above >> kBits ^ below) & mask;
    below ^= moved;
    above ^= moved << kBits;
}

// Of eight words the nibbles i become one word, for each i and each of the words beside: nibble i of row j changes places with
// nibble j of row i, by halves of words, then bytes, then nibbles.
inline void exchange(Words (&rows)[8]) {
    for (int j = 0; j < 4; ++j) exchange<16>(rows[j], rows[j + 4], 0x0000ffff);
    for (int j : {0, 1, 4, 5}) exchange<8>(rows[j], rows[j + 2], 0x00ff00ff);
    for (int j : {0, 2, 4, 6}) exchange<4>(rows[j], rows[j + 1], 0x0f0f0f0f);
}

// Words first .. first + wide of blocks of eight inputs from `block` on; kFull: as many as a tile has, of inputs that are all there.
template <bool kFull> void turn_tile(const uint32_t* words, int64_t inputs, int64_t width, int64_t first, int64_t wide, int64_t block, int64_t deep,
                                     uint8_t* to, int64_t bytes) {
    alignas(64) uint32_t tile[8 * kWide][kDeep];  // by output
    for (int b = 0; b < (kFull ? kDeep : deep); ++b) {
        Words rows[8] = {};
        const int64_t k = (block + b) * 8;
        for (int j = 0; j < 8; ++j) {
            const uint32_t* from = words + (k + j) * width + first;
            if (kFull) std::memcpy(&rows[j], from, sizeof(Words));
            else if (k + j < inputs) std::memcpy(&rows[j], from, size_t(wide) * 4);
        }
        exchange(rows);
        for (int nibble = 0; nibble < 8; ++nibble)
            for (int i = 0; i < kWide; ++i) tile[8 * i + kColumns[nibble]][b] = rows[nibble][i];
    }
    uint8_t* out = to + first * 8 * bytes + block * 4;
    for (int n = 0; n < 8 * (kFull ? kWide : wide); ++n) std::memcpy(out + n * bytes, tile[n], kFull ? sizeof tile[n] : size_t(deep) * 4);
}

}  // namespace

void turn_awq(const uint32_t* words, int64_t inputs, int64_t width, uint8_t* to) {
    const int64_t blocks = (inputs + 7) / 8;
    for (int64_t first = 0; first < width; first += kWide)
        for (int64_t block = 0; block < blocks; block += kDeep) {
            const int64_t wide = std::min<int64_t>(kWide, width - first), deep = std::min<int64_t>(kDeep, blocks - block);
            const bool full = wide == kWide && (block + kDeep) * 8 <= inputs;
            (full ? turn_tile<true> : turn_tile<false>)(words, inputs, width, first, wide, block, deep, to, blocks * 4);
        }
}

}  // namespace appliance
