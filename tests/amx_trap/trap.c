// Runs compiled tile instructions on a processor that has none: it refuses them, the system sends SIGILL, and the handler here does
// what they would have done. The code that runs is the installed extension's, byte by byte, but for the places where it asks what
// processor this is: those get the answers of one with AMX.
#define _GNU_SOURCE
#include <cpuid.h>
#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include "tiles.h"

#define PLACES 64
#define SITES 4096  // a power of two
enum { CPUID, XGETBV };
static struct place { const uint8_t* at; int kind; } places[PLACES];
static int place_count, standard_error = 2;
// The machine that is played: its bits beside the real ones, what the system answers, and whether it was asked.
static uint32_t leaf7_edx, xcr0;
static int permits, permitted;
static uintptr_t sites[SITES];  // hashed: where instructions were done

__attribute__((constructor)) static void keep_standard_error(void) { standard_error = dup(2); }  // pytest puts a file in its place

static void die(const uint8_t* at, const char* name, const char* why) {
    char text[512];
    Dl_info info = {0};
    dladdr(at, &info);
    int n = snprintf(text, sizeof text, "amx_trap: %s at %s+0x%lx: %s; bytes", name, info.dli_fname ? info.dli_fname : "?",
                     (unsigned long)(at - (const uint8_t*)info.dli_fbase), why);
    for (int i = 0; i < 12; ++i) n += snprintf(text + n, sizeof text - (size_t)n, " %02x", at[i]);
    text[n++] = '\n';
    if (write(standard_error, text, (size_t)n) < 0) _exit(70);
    abort();
}

static void answer(const struct place* place, greg_t* g) {
    uint32_t a = (uint32_t)g[REG_RAX], b = 0, c = (uint32_t)g[REG_RCX], d = 0;
    if (place->kind == CPUID) {
        const int seven = a == 7 && c == 0;
        __cpuid_count(a, c, a, b, c, d);
        if (seven) d |= leaf7_edx;
        g[REG_RBX] = b;
        g[REG_RCX] = c;
        g[REG_RIP] += 2;
    } else {
        __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(c));
        if (c == 0) a |= xcr0;
        g[REG_RIP] += 3;
    }
    g[REG_RAX] = a;
    g[REG_RDX] = d;
}

static void visit(uintptr_t at) {
    for (uintptr_t i = at * 2654435761u % SITES, n = 0; n < SITES; i = (i + 1) % SITES, ++n) {
        uintptr_t nothing = 0;
        if (sites[i] == at || __atomic_compare_exchange_n(&sites[i], &nothing, at, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED) || nothing == at) return;
    }
}

static void on_illegal(int signal, siginfo_t* info, void* context) {
    (void)signal, (void)info;
    static const int order[17] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI, REG_R8,
                                  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15, REG_RIP};
    greg_t* g = ((ucontext_t*)context)->uc_mcontext.gregs;
    const uint8_t* code = (const uint8_t*)g[REG_RIP];
    for (int i = 0; i < place_count; ++i)
        if (places[i].at == code) return answer(&places[i], g);
    uint64_t registers[17];
    for (int i = 0; i < 17; ++i) registers[i] = (uint64_t)g[order[i]];
    struct tile_instruction instruction;
    const char* wrong = tile_decode(code, registers, &instruction);
    if (wrong == NULL && !permitted) wrong = "#NM: the system was not asked for tiles (arch_prctl)";
    if (wrong == NULL) wrong = tile_execute(&instruction);
    if (wrong != NULL) die(code, instruction.kind < 0 ? "an instruction" : tile_names[instruction.kind], wrong);
    visit((uintptr_t)code);
    g[REG_RIP] += instruction.length;
}

// Whether the instruction at this address was ever done.
int trap_visited(const uint8_t* at) {
    for (int i = 0; i < SITES; ++i)
        if (sites[i] == (uintptr_t)at) return 1;
    return 0;
}

static long ask_system(long number, ...) {
    long a[6];
    va_list rest;
    va_start(rest, number);
    for (int i = 0; i < 6; ++i) a[i] = va_arg(rest, long);
    va_end(rest);
    if (number != SYS_arch_prctl || a[0] != 0x1023) return syscall(number, a[0], a[1], a[2], a[3], a[4], a[5]);
    if (permits && a[1] == 18) {
        permitted = 1;
        return 0;
    }
    errno = EINVAL;
    return -1;
}

static int overwrite(void* at, const void* bytes, size_t count) {
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), first = (uintptr_t)at / page * page, last = ((uintptr_t)at + count + page - 1) / page * page;
    if (mprotect((void*)first, last - first, PROT_READ | PROT_WRITE | PROT_EXEC) != 0) return -1;
    memcpy(at, bytes, count);
    return 0;
}

// From here on this process's processor has AMX. 0, or -1 where the handler cannot be had.
int trap_install(uint32_t of_leaf7_edx, uint32_t of_xcr0, int of_permits, int already_permitted) {
    leaf7_edx = of_leaf7_edx;
    xcr0 = of_xcr0;
    permits = of_permits;
    permitted = already_permitted;
    struct sigaction action = {0};
    action.sa_sigaction = on_illegal;
    action.sa_flags = SA_SIGINFO;
    return sigaction(SIGILL, &action, NULL);
}

// `at` holds a CPUID or XGETBV: the same number of bytes that raise #UD take their place.
int trap_place(uint8_t* at) {
    static const uint8_t codes[2][3] = {{0x0f, 0xa2}, {0x0f, 0x01, 0xd0}}, refused[2] = {0x0f, 0x0b};
    const int kind = memcmp(at, codes[0], 2) == 0 ? CPUID : memcmp(at, codes[1], 3) == 0 ? XGETBV : -1;
    if (kind < 0 || place_count == PLACES || overwrite(at, refused, 2) != 0) return -1;
    places[place_count++] = (struct place){at, kind};
    return 0;
}

// `slot` is where a module keeps the address of libc's syscall().
int trap_syscall(void** slot) {
    void* const ours = (void*)ask_system;
    return overwrite(slot, &ours, sizeof ours);
}
