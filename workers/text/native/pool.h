// A few threads that share one loop at a time. Above: every kernel. Below: the system's threads.
//
// A region is complete when its chunks are, not when its threads are: whoever is awake claims the next chunk, so a
// thread that lost its core to another process delays at most the chunk it holds, and nobody waits at a barrier.
// Idle threads pause, then yield, then sleep, so that a waiting engine costs nothing. They start when they are first
// wanted, by whoever runs the region, and have that thread's priority.
#pragma once
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdint>
#include <thread>
#include <vector>

namespace hostler {

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Pool {
 public:
  explicit Pool(int num_threads) : most_(num_threads) {}

  ~Pool() { stop(); }

  // Ends the threads; the next `limit` starts them anew.
  void stop() {
    closing_.store(true, std::memory_order_release);
    wake_sleepers();
    for (auto& thread : threads_) thread.join();
    threads_.clear();
    joined_.store(0, std::memory_order_relaxed);
    closing_.store(false, std::memory_order_release);
  }

  // Sets how many threads may take part from the next region on; the caller is always one of them.
  void limit(int num_threads) {
    while (int(threads_.size()) < std::min(num_threads, most_) - 1) threads_.emplace_back([this] { serve(); });
    helpers_.store(num_threads - 1, std::memory_order_relaxed);
  }

  // How many threads take part.
  int size() const { return std::min(int(threads_.size()), helpers_.load(std::memory_order_relaxed)) + 1; }

  // Calls body(i) once for each i in [0, count), on any thread; returns when all are done. One caller at a time.
  template <class Body>
  void run(int count, const Body& body) {
    if (count <= 0) return;
    if (threads_.empty() || helpers_.load(std::memory_order_relaxed) == 0 || count == 1) {
      for (int i = 0; i < count; ++i) body(i);
      return;
    }
    // Chunks are counted in 16 bits; a longer loop takes several indices at once.
    const int stride = (count + 0xfffe) / 0xffff;
    const int chunks = (count + stride - 1) / stride;
    auto chunk = [&](int c) {
      for (int i = c * stride; i < count && i < (c + 1) * stride; ++i) body(i);
    };
    using Chunk = decltype(chunk);
    call_ = [](const void* self, int c) { (*static_cast<const Chunk*>(self))(c); };
    context_ = &chunk;
    finished_.store(0, std::memory_order_relaxed);
    epoch_ = epoch_ + 1 == 0 ? 1 : epoch_ + 1;
    word_.store(uint64_t(epoch_) << 32 | uint64_t(chunks), std::memory_order_seq_cst);
    if (sleeping_.load(std::memory_order_seq_cst) > 0) wake_sleepers();
    while (claim_and_run()) {
    }
    for (int spins = 0; finished_.load(std::memory_order_acquire) != chunks; ++spins) {
      // A chunk takes microseconds; yielding hands the core to others for milliseconds. So yield only when the holder
      // of the last chunk must have lost its own core.
      if (spins < kWaitSpins) relax(); else sched_yield();
    }
  }

 private:
  static constexpr int kSpins = 4000;       // of an idle thread: about 0.1 ms
  static constexpr int kYields = 20;        // before it sleeps
  static constexpr int kWaitSpins = 20000;  // of the caller, for the last chunk

  // word_: epoch (32 bits) | next chunk (16) | number of chunks (16). A claim that succeeds proves that its region is
  // still open, hence that call_ and context_ are this region's.
  bool claim_and_run() {
    uint64_t word = word_.load(std::memory_order_acquire);
    for (;;) {
      const uint32_t next = uint32_t(word >> 16) & 0xffff, total = uint32_t(word) & 0xffff;
      if (next >= total) return false;
      if (word_.compare_exchange_weak(word, word + 0x10000, std::memory_order_acq_rel)) {
        call_(context_, int(next));
        finished_.fetch_add(1, std::memory_order_release);
        return true;
      }
    }
  }

  bool has_work() const {
    const uint64_t word = word_.load(std::memory_order_seq_cst);
    return (uint32_t(word >> 16) & 0xffff) < (uint32_t(word) & 0xffff);
  }

  void serve() {
    const int self = joined_.fetch_add(1, std::memory_order_relaxed);
    int idle = 0;
    while (!closing_.load(std::memory_order_acquire)) {
      if (self < helpers_.load(std::memory_order_relaxed) && claim_and_run()) {
        idle = 0;
      } else if (++idle < kSpins) {
        relax();
      } else if (idle < kSpins + kYields) {
        sched_yield();
      } else {
        const uint32_t seen = bell_.load(std::memory_order_seq_cst);
        sleeping_.fetch_add(1, std::memory_order_seq_cst);
        if (!has_work() && !closing_.load()) syscall(SYS_futex, &bell_, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
        sleeping_.fetch_sub(1, std::memory_order_seq_cst);
        idle = 0;
      }
    }
  }

  void wake_sleepers() {
    bell_.fetch_add(1, std::memory_order_seq_cst);
    syscall(SYS_futex, &bell_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
  }

  alignas(64) std::atomic<uint64_t> word_{0};
  alignas(64) std::atomic<int> finished_{0};
  alignas(64) std::atomic<uint32_t> bell_{0};
  std::atomic<int> sleeping_{0};
  std::atomic<int> helpers_{INT_MAX};
  std::atomic<int> joined_{0};
  std::atomic<bool> closing_{false};
  void (*call_)(const void*, int) = nullptr;
  const void* context_ = nullptr;
  uint32_t epoch_ = 0;
  const int most_;
  std::vector<std::thread> threads_;
};

}  // namespace hostler
