#include "pool.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <set>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace appliance {
namespace {

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// How long a thread spins for the next operation before it sleeps: between two operations of a step there are some microseconds of
// Python. Longer would take the core from others, on this machine's smallest sizes from the server itself.
constexpr std::chrono::microseconds kSpin(100);

// Spins until done() or until the time is over.
template <class Done> bool spin(Done done) {
    const auto end = std::chrono::steady_clock::now() + kSpin;
    do {
        for (int i = 0; i < 32; ++i) {
            if (done()) return true;
            relax();
        }
    } while (std::chrono::steady_clock::now() < end);
    return false;
}

// Spin a while, then let others run: a waiting thread must not hold the core that the awaited one needs.
template <class Done> void await(Done done) {
    for (int i = 0; !done(); ++i) {
        relax();
        if (i >= 4096) {
            i = 0;
            std::this_thread::yield();
        }
    }
}

void pin_to(int core) {
#if defined(__linux__)
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(core, &set);
    pthread_setaffinity_np(pthread_self(), sizeof set, &set);  // refused in some containers: then the scheduler decides
#else
    (void)core;
#endif
}

int first_sibling(int cpu) {
    char path[96];
    std::snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu);
    int first = cpu;
    if (FILE* file = std::fopen(path, "r")) {
        if (std::fscanf(file, "%d", &first) != 1) first = cpu;
        std::fclose(file);
    }
    return first;
}

}  // namespace

std::vector<int> physical_cores() {
    std::vector<int> cores;
#if defined(__linux__)
    cpu_set_t set;
    CPU_ZERO(&set);
    if (sched_getaffinity(0, sizeof set, &set) == 0) {
        std::set<int> seen;
        for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
            if (CPU_ISSET(cpu, &set) && seen.insert(first_sibling(cpu)).second) cores.push_back(cpu);
    }
#endif
    if (cores.empty())
        for (unsigned cpu = 0; cpu < std::max(1u, std::thread::hardware_concurrency()); ++cpu) cores.push_back(int(cpu));
    return cores;
}

Pool::Pool(int threads, bool pin) : size_(std::max(1, threads)), shares_(new Share[size_t(size_) + 2]) {
    // The caller's thread is not pinned: its affinity would pass to every thread that Python starts later.
    const std::vector<int> cores = physical_cores();
    const bool fits = pin && size_ > 1 && size_t(size_) <= cores.size();
    for (int thread = 1; thread < size_; ++thread)
        threads_.emplace_back([this, thread, core = fits ? cores[size_t(thread)] : -1] { work(thread, core); });
}

Pool::~Pool() {
    stop_.store(true);
    generation_.fetch_add(1);
    generation_.notify_all();
    for (auto& thread : threads_) thread.join();
    for (int i = 0; i < size_ + 2; ++i) std::free(shares_[size_t(i)].memory);
}

void Pool::dispatch(Call call, void* context) {
    if (size_ == 1) return call(context, 0);
    call_ = call;
    context_ = context;
    busy_.store(size_ - 1, std::memory_order_relaxed);
    generation_.fetch_add(1);  // sequentially consistent with the workers' count of sleepers
    if (sleeping_.load() > 0) generation_.notify_all();
    call(context, 0);
    await([this] { return busy_.load(std::memory_order_acquire) == 0; });
}

void Pool::work(int thread, int core) {
    if (core >= 0) pin_to(core);
    uint32_t seen = 0;
    while (true) {
        if (!spin([&] { return generation_.load(std::memory_order_acquire) != seen; })) {
            sleeping_.fetch_add(1);
            generation_.wait(seen);
            sleeping_.fetch_sub(1);
        }
        if (generation_.load(std::memory_order_acquire) == seen) continue;
        ++seen;
        if (stop_.load()) return;
        call_(context_, thread);
        busy_.fetch_sub(1, std::memory_order_release);
    }
}

void Pool::barrier() {
    if (size_ == 1) return;
    const uint32_t phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == uint32_t(size_)) {
        arrived_.store(0, std::memory_order_relaxed);
        phase_.fetch_add(1, std::memory_order_release);
    } else {
        await([&] { return phase_.load(std::memory_order_acquire) != phase; });
    }
}

void Pool::reset(int64_t count) {
    for (int64_t t = 0; t < size_; ++t) {
        Share& share = shares_[size_t(t)];
        share.next.store(count * t / size_, std::memory_order_relaxed);
        share.end = count * (t + 1) / size_;
        share.victim = 0;
    }
}

bool Pool::next(int thread, int64_t& item) {
    Share& own = shares_[size_t(thread)];
    for (; own.victim < size_; ++own.victim) {
        Share& share = shares_[size_t((thread + own.victim) % size_)];
        if (share.next.load(std::memory_order_relaxed) >= share.end) continue;
        item = share.next.fetch_add(1, std::memory_order_relaxed);
        if (item < share.end) return true;
    }
    return false;
}

uint8_t* Pool::scratch(int index, size_t bytes) {
    Share& share = shares_[size_t(index)];
    if (share.bytes < bytes) {
        constexpr size_t kHuge = size_t(2) << 20;
        const size_t align = bytes >= kHuge ? kHuge : 64;
        const size_t rounded = (bytes + align - 1) / align * align;
        void* memory = std::aligned_alloc(align, rounded);
        if (memory == nullptr) throw std::bad_alloc();
#if defined(__linux__)
        if (align == kHuge) madvise(memory, rounded, MADV_HUGEPAGE);
#endif
        std::free(share.memory);
        share.memory = static_cast<uint8_t*>(memory);
        share.bytes = rounded;
    }
    return share.memory;
}

size_t Pool::scratch_bytes() const {
    size_t total = 0;
    for (int i = 0; i < size_ + 2; ++i) total += shares_[size_t(i)].bytes;
    return total;
}

void spread_memory() {
#if defined(__linux__) && defined(SYS_set_mempolicy)
    unsigned long nodes = 0;
    for (int node = 0; node < 64; ++node) {
        char path[64];
        std::snprintf(path, sizeof path, "/sys/devices/system/node/node%d", node);
        if (access(path, F_OK) == 0) nodes |= 1ul << node;
    }
    constexpr int kInterleave = 3;  // MPOL_INTERLEAVE
    if ((nodes & (nodes - 1)) != 0) syscall(SYS_set_mempolicy, kInterleave, &nodes, 65ul);  // refused in some containers: then not
#endif
}

}  // namespace appliance
