#include "dispatch.h"

#include <cmath>
#include <cstdint>

#include "pack.h"
#include "pool.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace appliance {

#define DECLARE(isa) namespace isa { extern const Kernels kernels; }
DECLARE(portable)
DECLARE(avx2)
DECLARE(avx_vnni)
DECLARE(avx512_vnni)
DECLARE(avx512_bf16)
DECLARE(amx)
DECLARE(amx_emulated)

namespace {

#if defined(__x86_64__)
struct Features {
    bool avx2 = false, avx_vnni = false, avx512_vnni = false, avx512_bf16 = false, amx = false;
};

// Bits as in Intel's Software Developer's Manual, CPUID leaves 1 and 7; XCR0 says what the system saves and restores.
Features detect() {
    Features f;
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return f;
    const bool fma = c >> 12 & 1, xsave = c >> 27 & 1, f16c = c >> 29 & 1;
    if (!xsave) return f;
    unsigned low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    const bool saves_ymm = (low & 0x6) == 0x6, saves_zmm = (low & 0xe6) == 0xe6, saves_tiles = (low >> 17 & 3) == 3;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return f;
    const unsigned b7 = b, c7 = c, d7 = d;
    unsigned a71 = 0;
    if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) a71 = a;
    f.avx2 = saves_ymm && fma && f16c && (b7 >> 5 & 1);
    f.avx_vnni = f.avx2 && (a71 >> 4 & 1);
    const bool avx512 = f.avx2 && saves_zmm && (b7 >> 16 & 1) && (b7 >> 17 & 1) && (b7 >> 30 & 1) && (b7 >> 31 & 1);  // F DQ BW VL
    f.avx512_vnni = avx512 && (c7 >> 11 & 1);
    f.avx512_bf16 = f.avx512_vnni && (a71 >> 5 & 1);
    f.amx = f.avx512_bf16 && saves_tiles && (d7 >> 22 & 1) && (d7 >> 24 & 1) && (d7 >> 25 & 1);  // bf16, tile, int8
    return f;
}

#if defined(HAVE_amx)
// Linux gives a process the tile registers only when it asks (arch_prctl, ARCH_REQ_XCOMP_PERM of XTILEDATA).
bool may_use_tiles() {
#if defined(__linux__)
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
    return false;
#endif
}
#endif
#endif

#if defined(HAVE_amx)
// A product by these kernels and by the portable ones: tiles are new enough that processors, hypervisors and emulators that
// announce them deserve a test before answers depend on them.
bool agrees(const Kernels& kernels, bool quantize) {
    constexpr int64_t kRows = 33, kInputs = 256, kOutputs = 64;
    Linear w;
    w.N = kOutputs;
    w.K = w.group = kInputs;
    w.codes = Codes::int8;
    w.quantize = quantize;
    finish(w);
    std::vector<uint8_t> codes(size_t(code_bytes(w)));
    std::vector<float> scales(size_t(w.panels * kPanel), 0.01f);
    std::vector<uint16_t> x(kRows * kInputs);
    uint32_t state = 1;
    const auto random = [&] { return (state = state * 1664525u + 1013904223u) >> 16; };
    for (auto& code : codes) code = uint8_t(random());
    for (auto& item : x) item = uint16_t((random() & 0x807f) | 0x3f80);  // bfloat16 from 1 to 2, and their negatives
    w.data = codes.data();
    w.scales = scales.data();
    std::vector<float> mine(kRows * kOutputs), theirs(kRows * kOutputs);
    Pool pool(1, false);
    MatmulArgs args{&w, x.data(), kRows, kInputs, Type::bf16, nullptr, 0, 0, nullptr, mine.data(), Type::f32};
    kernels.matmul(pool, args);
    args.out = theirs.data();
    portable::kernels.matmul(pool, args);
    float largest = 0, worst = 0;
    for (size_t i = 0; i < mine.size(); ++i) {
        largest = std::fmax(largest, std::fabs(theirs[i]));
        worst = std::fmax(worst, std::isnan(mine[i]) ? INFINITY : std::fabs(mine[i] - theirs[i]));
    }
    return worst <= (quantize ? 1e-4f : 1e-2f) * largest;
}
#endif

std::vector<const Kernels*> detect_kernels() {
    std::vector<const Kernels*> found;
#if defined(__x86_64__)
    const Features f = detect();
#if defined(HAVE_amx)  // CMake leaves out what the compiler does not know
    if (f.amx && may_use_tiles() && agrees(amx::kernels, true) && agrees(amx::kernels, false)) found.push_back(&amx::kernels);
#endif
#if defined(HAVE_avx512_bf16)
    if (f.avx512_bf16) found.push_back(&avx512_bf16::kernels);
#endif
#if defined(HAVE_avx512_vnni)
    if (f.avx512_vnni) found.push_back(&avx512_vnni::kernels);
#endif
#if defined(HAVE_avx_vnni)
    if (f.avx_vnni) found.push_back(&avx_vnni::kernels);
#endif
#if defined(HAVE_avx2)
    if (f.avx2) found.push_back(&avx2::kernels);
#endif
#endif
    found.push_back(&portable::kernels);
    return found;
}

const std::vector<const Kernels*>& all() {
    static const std::vector<const Kernels*> found = detect_kernels();
    return found;
}

}  // namespace

std::vector<std::string> available() {
    std::vector<std::string> names;
    for (const Kernels* k : all()) names.emplace_back(k->name);
    return names;
}

const Kernels* find_kernels(const std::string& name) {
    for (const Kernels* k : all())
        if (name == k->name) return k;
#if defined(HAVE_amx_emulated)
    // The tile kernels on plain loops, for tests only: not in the list of what to choose from.
    if (name == "amx_emulated" && find_kernels("avx512_bf16") != nullptr) return &amx_emulated::kernels;
#endif
    return nullptr;
}

}  // namespace appliance
