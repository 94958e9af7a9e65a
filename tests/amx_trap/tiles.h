// The tile instructions of Intel AMX that the native kernels use, in plain C.
#pragma once
#include <stdint.h>

#define TILES 8
#define TILE_ROWS 16
#define TILE_BYTES 64  // of a row

enum tile_kind { LDTILECFG, TILERELEASE, TILEZERO, TILELOADD, TILESTORED, TDPBSUD, TDPBF16PS, TILE_KINDS };
extern const char* const tile_names[TILE_KINDS];

struct tile_instruction {
    int32_t kind, length;      // length: bytes of code
    int32_t tile, left, right; // destination (or what is stored); the products' sources
    uint64_t address, stride;  // of memory, where there is any
};

// What a thread has. All zeros: the state before LDTILECFG and after TILERELEASE.
struct tile_state {
    uint8_t palette, start_row;
    uint8_t rows[TILES];
    uint16_t bytes[TILES];
    uint8_t data[TILES][TILE_ROWS][TILE_BYTES];
};

// registers: rax rcx rdx rbx rsp rbp rsi rdi r8 .. r15 rip. Both return null, or why a processor would refuse.
const char* tile_decode(const uint8_t* code, const uint64_t* registers, struct tile_instruction* out);
const char* tile_execute(const struct tile_instruction* i);

struct tile_state* tile_state(void);  // of the thread that calls
void tile_counts(uint64_t* kinds, uint64_t* threads, int64_t* configured);
void tile_break(int kind);  // that instruction leaves its last row as it was; -1: none does
