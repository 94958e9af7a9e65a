// As Intel's Software Developer's Manual defines them (volume 2, "Intel AMX instructions", exception classes AMX-E1 to E6).
#include "tiles.h"

#include <immintrin.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

const char* const tile_names[TILE_KINDS] = {"ldtilecfg", "tilerelease", "tilezero", "tileloadd", "tilestored", "tdpbsud", "tdpbf16ps"};

static __thread struct tile_state state;
static __thread int seen;  // this thread is counted
static __thread char reason[160];
static uint64_t counts[TILE_KINDS], threads;
static int64_t configured;
static int broken = -1;

struct tile_state* tile_state(void) { return &state; }
void tile_break(int kind) { broken = kind; }
void tile_counts(uint64_t* kinds, uint64_t* of_threads, int64_t* still_configured) {
    for (int i = 0; i < TILE_KINDS; ++i) kinds[i] = __atomic_load_n(&counts[i], __ATOMIC_RELAXED);
    *of_threads = __atomic_load_n(&threads, __ATOMIC_RELAXED);
    *still_configured = __atomic_load_n(&configured, __ATOMIC_RELAXED);
}

#define REFUSE(...) return snprintf(reason, sizeof reason, __VA_ARGS__), (const char*)reason

// Memory operand at ModRM. is_tile_memory: base + displacement and, apart from it, index * scale as a stride.
static const char* decode_memory(const uint8_t* code, int at, int x, int b, const uint64_t* registers, int is_tile_memory, struct tile_instruction* out) {
    const int mod = code[at] >> 6, rm = code[at] & 7;
    ++at;
    uint64_t address = 0, index = 0;
    int wide = mod == 2, relative = 0;
    if (rm == 4) {
        const int sib = code[at++], i = (sib >> 3 & 7) | x << 3, base = sib & 7;
        if (i != 4) index = registers[i] << (sib >> 6);
        if (base == 5 && mod == 0) wide = 1;
        else address = registers[base | b << 3];
    } else if (is_tile_memory) {
        REFUSE("#UD: tile memory without a SIB byte");
    } else if (rm == 5 && mod == 0) {
        wide = relative = 1;
    } else {
        address = registers[rm | b << 3];
    }
    if (wide) {
        int32_t displacement;
        memcpy(&displacement, code + at, 4);
        at += 4;
        address += (int64_t)displacement;
    } else if (mod == 1) {
        address += (int64_t)(int8_t)code[at++];
    }
    if (relative) address += registers[16] + (uint64_t)at;
    out->address = is_tile_memory ? address : address + index;
    out->stride = is_tile_memory ? index : 0;
    out->length = at;
    return NULL;
}

// VEX with three bytes, map 0F38: C4, then inverted R X B and the map, then W, inverted vvvv, L and the prefix.
const char* tile_decode(const uint8_t* code, const uint64_t* registers, struct tile_instruction* out) {
    enum { NONE, P66, PF3, PF2 };
    memset(out, 0, sizeof *out);
    out->kind = -1;
    if (code[0] != 0xc4 || (code[1] & 0x1f) != 2) REFUSE("no tile instruction");
    const int r = !(code[1] & 0x80), x = !(code[1] & 0x40), b = !(code[1] & 0x20);
    const int w = code[2] >> 7, v = ~code[2] >> 3 & 15, l = code[2] >> 2 & 1, prefix = code[2] & 3;
    const int opcode = code[3], modrm = code[4], in_memory = modrm >> 6 != 3, reg = modrm >> 3 & 7, rm = modrm & 7;
    if (opcode == 0x49 && prefix == NONE && in_memory && reg == 0) out->kind = LDTILECFG;
    else if (opcode == 0x49 && prefix == NONE && modrm == 0xc0) out->kind = TILERELEASE;
    else if (opcode == 0x49 && prefix == PF2 && !in_memory && rm == 0) out->kind = TILEZERO;
    else if (opcode == 0x4b && prefix == PF2 && in_memory) out->kind = TILELOADD;
    else if (opcode == 0x4b && prefix == PF3 && in_memory) out->kind = TILESTORED;
    else if (opcode == 0x5e && prefix == PF3 && !in_memory) out->kind = TDPBSUD;
    else if (opcode == 0x5c && prefix == PF3 && !in_memory) out->kind = TDPBF16PS;
    else REFUSE("no tile instruction that is known here");
    const int product = out->kind == TDPBSUD || out->kind == TDPBF16PS;
    if (w || l) REFUSE("#UD: VEX.W and VEX.L must be 0");
    if (!product && v != 0) REFUSE("#UD: VEX.vvvv must be 1111");
    if (out->kind >= TILEZERO && r) REFUSE("#UD: there are no tiles beyond 7");
    if (product && (b || v > 7)) REFUSE("#UD: there are no tiles beyond 7");
    out->tile = reg;
    out->length = 5;
    if (product) {
        out->left = rm;
        out->right = v;
    }
    return in_memory ? decode_memory(code, 4, x, b, registers, out->kind != LDTILECFG, out) : NULL;
}

static const char* configure(const uint8_t* memory) {
    uint8_t c[64];
    memcpy(c, memory, 64);
    if (c[0] > 1) REFUSE("#GP: palette %d", c[0]);
    const int before = state.palette;
    struct tile_state* s = &state;
    static const struct tile_state initial;
    if (c[0] == 1) {
        for (int i = 2; i < 64; ++i)
            if ((i < 16 || (i >= 32 && i < 48) || i >= 56) && c[i] != 0) REFUSE("#GP: the reserved byte %d is %d", i, c[i]);
        for (int t = 0; t < TILES; ++t) {
            const int bytes = c[16 + 2 * t] | c[17 + 2 * t] << 8, rows = c[48 + t];
            if (bytes > TILE_BYTES || rows > TILE_ROWS) REFUSE("#GP: tile %d has %d rows of %d bytes", t, rows, bytes);
            if (!bytes != !rows) REFUSE("#GP: tile %d has %d rows of %d bytes", t, rows, bytes);
        }
    }
    *s = initial;  // the data too
    if (c[0] == 1) {
        s->palette = 1;
        s->start_row = c[1];
        for (int t = 0; t < TILES; ++t) {
            s->bytes[t] = (uint16_t)(c[16 + 2 * t] | c[17 + 2 * t] << 8);
            s->rows[t] = c[48 + t];
        }
    }
    __atomic_fetch_add(&configured, s->palette - before, __ATOMIC_RELAXED);
    return NULL;
}

static const char* check_tile(int t) {
    if (state.palette == 0) REFUSE("#UD: this thread has not configured tiles");
    if (state.rows[t] == 0) REFUSE("#UD: tile %d is not configured", t);
    return NULL;
}

static const char* move(const struct tile_instruction* i) {
    const char* wrong = check_tile(i->tile);
    if (wrong != NULL) return wrong;
    const int rows = state.rows[i->tile], bytes = state.bytes[i->tile];
    if (bytes % 4 != 0) REFUSE("#UD: tile %d has rows of %d bytes", i->tile, bytes);
    if (state.start_row >= rows) REFUSE("#UD: start_row is %d, tile %d has %d rows", state.start_row, i->tile, rows);
    uint8_t(*data)[TILE_BYTES] = state.data[i->tile];
    for (int r = state.start_row; r < rows; ++r) {
        uint8_t* memory = (uint8_t*)(uintptr_t)(i->address + (uint64_t)r * i->stride);
        if (i->kind == TILESTORED) {
            memcpy(memory, data[r], (size_t)bytes);
        } else {
            memcpy(data[r], memory, (size_t)bytes);
            memset(data[r] + bytes, 0, (size_t)(TILE_BYTES - bytes));
        }
    }
    if (i->kind == TILELOADD) memset(data[rows], 0, (size_t)(TILE_ROWS - rows) * TILE_BYTES);
    state.start_row = 0;
    return NULL;
}

static void dot_bytes(int32_t* c, const uint8_t* a, uint8_t (*b)[TILE_BYTES], int pairs, int columns) {
    for (int k = 0; k < pairs; ++k)
        for (int n = 0; n < columns; ++n) {
            uint32_t sum = 0;
            for (int j = 0; j < 4; ++j) sum += (uint32_t)((int8_t)a[4 * k + j] * (int)b[k][4 * n + j]);
            c[n] = (int32_t)((uint32_t)c[n] + sum);
        }
}

static float widen(const uint8_t* p) {
    const uint32_t bits = (uint32_t)p[0] << 16 | (uint32_t)p[1] << 24;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

// Even and odd ones are summed apart, then together, and only then onto the destination.
static void dot_pairs(float* c, const uint8_t* a, uint8_t (*b)[TILE_BYTES], int pairs, int columns) {
    float sums[2][TILE_BYTES / 4] = {{0}};
    for (int k = 0; k < pairs; ++k)
        for (int j = 0; j < 2; ++j) {
            const float x = widen(a + 4 * k + 2 * j);
            for (int n = 0; n < columns; ++n) sums[j][n] = __builtin_fmaf(x, widen(&b[k][4 * n + 2 * j]), sums[j][n]);
        }
    for (int n = 0; n < columns; ++n) c[n] += sums[0][n] + sums[1][n];
}

static const char* multiply(const struct tile_instruction* i) {
    const int c = i->tile, a = i->left, b = i->right, all[3] = {c, a, b};
    if (c == a || c == b || a == b) REFUSE("#UD: the tiles %d, %d and %d must differ", c, a, b);
    for (int t = 0; t < 3; ++t) {
        const char* wrong = check_tile(all[t]);
        if (wrong != NULL) return wrong;
        if (state.bytes[all[t]] % 4 != 0) REFUSE("#UD: tile %d has rows of %d bytes", all[t], state.bytes[all[t]]);
    }
    const int rows = state.rows[c], columns = state.bytes[c] / 4, pairs = state.bytes[a] / 4;
    if (state.rows[a] != rows || state.rows[b] != pairs || state.bytes[b] != state.bytes[c])
        REFUSE("#UD: [%d, %d bytes] += [%d, %d bytes] times [%d, %d bytes]", rows, state.bytes[c], state.rows[a], state.bytes[a], state.rows[b],
               state.bytes[b]);
    for (int r = 0; r < rows - (broken == i->kind); ++r) {
        uint8_t* row = state.data[c][r];
        if (i->kind == TDPBSUD) {
            int32_t sums[TILE_BYTES / 4];
            memcpy(sums, row, sizeof sums);
            dot_bytes(sums, state.data[a][r], state.data[b], pairs, columns);
            memcpy(row, sums, sizeof sums);
        } else {
            float sums[TILE_BYTES / 4];
            memcpy(sums, row, sizeof sums);
            dot_pairs(sums, state.data[a][r], state.data[b], pairs, columns);
            memcpy(row, sums, sizeof sums);
        }
        memset(row + 4 * columns, 0, (size_t)(TILE_BYTES - 4 * columns));
    }
    memset(state.data[c][rows], 0, (size_t)(TILE_ROWS - rows) * TILE_BYTES);
    state.start_row = 0;
    return NULL;
}

static __attribute__((noinline)) const char* execute(const struct tile_instruction* i) {
    const char* wrong = NULL;
    switch (i->kind) {
        case LDTILECFG: return configure((const uint8_t*)(uintptr_t)i->address);
        case TILERELEASE:
            __atomic_fetch_add(&configured, -state.palette, __ATOMIC_RELAXED);
            memset(&state, 0, sizeof state);
            return NULL;
        case TILEZERO:
            wrong = check_tile(i->tile);
            if (wrong != NULL) return wrong;
            memset(state.data[i->tile], 0, sizeof state.data[i->tile]);
            state.start_row = 0;
            return NULL;
        case TILELOADD: case TILESTORED: return move(i);
        default: return multiply(i);
    }
}

const char* tile_execute(const struct tile_instruction* i) {
    if (!seen) {
        seen = 1;
        __atomic_fetch_add(&threads, 1, __ATOMIC_RELAXED);
    }
    __atomic_fetch_add(&counts[i->kind], 1, __ATOMIC_RELAXED);
    const unsigned before = _mm_getcsr();
    _mm_setcsr(0x9fc0);  // denormals are zeros, to nearest, no exceptions: whatever the thread has set
    const char* wrong = execute(i);
    _mm_setcsr(before);
    return wrong;
}
