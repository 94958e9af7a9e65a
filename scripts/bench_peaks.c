/* What one core can do at most: reading memory, and multiply-adds from registers. Compiled by bench_peaks.py with -march=native,
   called from one thread a core. Every arithmetic routine returns the number of operations (a multiply and an add are two). */
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))
#define CHAINS 12 /* independent sums: more than latency times units */

typedef int64_t Words __attribute__((vector_size(64)));

uint64_t read_words(const char* data, int64_t bytes) {
    Words a = {0}, b = {0}, c = {0}, d = {0};
    const Words* at = (const Words*)data;
    for (int64_t i = 0; i + 4 <= bytes / 64; i += 4) {
        __builtin_prefetch(data + 64 * i + 2048);
        a ^= at[i], b ^= at[i + 1], c ^= at[i + 2], d ^= at[i + 3];
    }
    a ^= b ^ c ^ d;
    return (uint64_t)(a[0] ^ a[1] ^ a[2] ^ a[3] ^ a[4] ^ a[5] ^ a[6] ^ a[7]);
}

/* The "+v" keeps each sum in a vector register and the loop from being folded. */
#define PEAK(name, type, each, instruction)                                                            \
    double name(int64_t rounds) {                                                                      \
        type sum[CHAINS] = {0}, a = {0}, b = {0};                                                      \
        for (int64_t r = 0; r < rounds; r++)                                                           \
            _Pragma("GCC unroll 12") for (int i = 0; i < CHAINS; i++)                                  \
                __asm__ volatile(instruction : "+v"(sum[i]) : "v"(a), "v"(b));                         \
        return (double)rounds * CHAINS * (each);                                                       \
    }

#if defined(__AVX512F__)
typedef float F __attribute__((vector_size(64)));
PEAK(fma_f32, F, 32, "vfmadd231ps %2, %1, %0")
#ifdef __AVX512VNNI__
PEAK(dot_int8, F, 128, "vpdpbusd %2, %1, %0")
#endif
#ifdef __AVX512BF16__
PEAK(dot_bf16, F, 64, "vdpbf16ps %2, %1, %0")
#endif
#elif defined(__FMA__)
typedef float F __attribute__((vector_size(32)));
PEAK(fma_f32, F, 16, "vfmadd231ps %2, %1, %0")
#ifdef __AVXVNNI__
PEAK(dot_int8, F, 64, "{vex} vpdpbusd %2, %1, %0")
#endif
#endif

#ifdef __AMX_INT8__
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
/* Needs the kernel's permission (arch_prctl ARCH_REQ_XCOMP_PERM) for the process. */
int amx_permission(void) { return (int)syscall(SYS_arch_prctl, 0x1023, 18); }
double dot_int8_amx(int64_t rounds) {
    struct { uint8_t palette, start, zero[14]; uint16_t columns[16]; uint8_t rows[16]; } shape = {1, 0, {0}, {0}, {0}};
    for (int i = 0; i < 8; i++) shape.columns[i] = 64, shape.rows[i] = 16;
    _tile_loadconfig(&shape);
    for (int64_t r = 0; r < rounds; r++) {
        _tile_dpbssd(0, 6, 7); _tile_dpbssd(1, 6, 7); _tile_dpbssd(2, 6, 7);
        _tile_dpbssd(3, 6, 7); _tile_dpbssd(4, 6, 7); _tile_dpbssd(5, 6, 7);
    }
    _tile_release();
    return (double)rounds * 6 * 16 * 16 * 64 * 2;
}
#endif
