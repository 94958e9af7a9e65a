// The threads that all kernels share: one pool, made once, woken for each operation.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

namespace appliance {

class Pool {
public:
    explicit Pool(int threads, bool pin);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int size() const { return size_; }

    // f(thread) on every thread, the caller's being 0; returns when all are done.
    template <class F> void run(F&& f) {
        using Fn = std::remove_reference_t<F>;
        dispatch([](void* context, int thread) { (*static_cast<Fn*>(context))(thread); }, const_cast<void*>(static_cast<const void*>(&f)));
    }

    // Inside run: waits until every thread has come here.
    void barrier();

    // Inside run: items 0 .. count - 1, each taken once. Every thread first takes its own contiguous share, then helps others.
    // reset() is called before run, or by one thread between two barriers.
    void reset(int64_t count);
    bool next(int thread, int64_t& item);

    // Scratch of at least `bytes` for the caller alone (index < size) or for all (index = size, and another one: size + 1); 64-byte
    // aligned; old contents are lost when it grows.
    uint8_t* scratch(int index, size_t bytes);
    size_t scratch_bytes() const;

private:
    using Call = void (*)(void*, int);
    struct alignas(128) Share {
        std::atomic<int64_t> next{0};
        int64_t end = 0;
        uint8_t* memory = nullptr;
        size_t bytes = 0;
        int victim = 0;
    };

    void dispatch(Call call, void* context);
    void work(int thread, int core);

    int size_;
    Call call_ = nullptr;
    void* context_ = nullptr;
    std::unique_ptr<Share[]> shares_;
    alignas(128) std::atomic<uint32_t> generation_{0};
    alignas(128) std::atomic<int> sleeping_{0};
    alignas(128) std::atomic<int> busy_{0};
    alignas(128) std::atomic<uint32_t> arrived_{0};
    alignas(128) std::atomic<uint32_t> phase_{0};
    std::atomic<bool> stop_{false};
    std::vector<std::thread> threads_;
};

// Physical cores this process may use: one CPU number each.
std::vector<int> physical_cores();

// Where memory is attached to several nodes: what the caller's thread touches first lies on all of them in turn. What a pool's
// threads touch first (weights) stays near them. To be called after the pool was made, as threads inherit it.
void spread_memory();

}  // namespace appliance
