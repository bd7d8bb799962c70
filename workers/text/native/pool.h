// A few threads that share one loop at a time. Above: every kernel. Below: the system's threads.
//
// A region is complete when its chunks are, not when its threads are: whoever is awake claims the next chunk, so a
// thread that lost its core to another process delays at most the chunk it holds, and nobody waits at a barrier.
// A region may be cut into parts. Each thread begins with the chunks of its own part, the same in every region, and finds
// what it wrote there in its core's cache; when none are left, it helps with the others'.
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
    size_.store(1, std::memory_order_relaxed);
    closing_.store(false, std::memory_order_release);
  }

  // Sets how many threads may take part from the next region on, the caller always one of them, and into how many parts
  // regions are cut.
  void limit(int num_threads, int parts = 1) {
    while (int(threads_.size()) < std::min(num_threads, most_) - 1) threads_.emplace_back([this] { serve(); });
    size_.store(std::min(int(threads_.size()), num_threads - 1) + 1, std::memory_order_relaxed);
    parts_.store(std::clamp(parts, 1, std::min(size(), kMostParts)), std::memory_order_relaxed);
  }

  // How many threads take part.
  int size() const { return size_.load(std::memory_order_relaxed); }

  int parts() const { return parts_.load(std::memory_order_relaxed); }

  // Calls body(i) once for each i in [0, count), on any thread; returns when all are done. One caller at a time.
  template <class Body>
  void run(int count, const Body& body) {
    if (count <= 0) return;
    if (size() == 1 || count == 1) {
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
    for (int p = 0; p < parts(); ++p) {
      const uint64_t first = uint64_t(chunks) * p / parts(), end = uint64_t(chunks) * (p + 1) / parts();
      part_[p].word.store(uint64_t(epoch_) << 32 | first << 16 | end, std::memory_order_seq_cst);
    }
    if (sleeping_.load(std::memory_order_seq_cst) > 0) wake_sleepers();
    while (claim_and_run(0)) {
    }
    for (int spins = 0; finished_.load(std::memory_order_acquire) != chunks; ++spins) {
      // A chunk takes microseconds; yielding hands the core to others for milliseconds. So yield only when the holder
      // of the last chunk must have lost its own core.
      if (spins < kWaitSpins) relax(); else sched_yield();
    }
  }

 private:
  static constexpr int kMostParts = 8;
  static constexpr int kSpins = 4000;       // of an idle thread: about 0.1 ms
  static constexpr int kYields = 20;        // before it sleeps
  static constexpr int kWaitSpins = 20000;  // of the caller, for the last chunk

  // A part's word: epoch (32 bits) | next chunk (16) | end of its chunks (16). A claim that succeeds proves that its
  // region is still open, hence that call_ and context_ are this region's.
  struct alignas(64) Part {
    std::atomic<uint64_t> word{0};
    static int next(uint64_t word) { return int(word >> 16 & 0xffff); }
    static int end(uint64_t word) { return int(word & 0xffff); }
  };

  // Of thread number `self`, the caller's being 0.
  bool claim_and_run(int self) {
    const int parts = this->parts(), own = self * parts / size();
    for (int p = 0; p < parts; ++p) {
      std::atomic<uint64_t>& of_part = part_[(own + p) % parts].word;
      uint64_t word = of_part.load(std::memory_order_acquire);
      while (Part::next(word) < Part::end(word)) {
        if (!of_part.compare_exchange_weak(word, word + 0x10000, std::memory_order_acq_rel)) continue;
        call_(context_, Part::next(word));
        finished_.fetch_add(1, std::memory_order_release);
        return true;
      }
    }
    return false;
  }

  bool has_work() const {
    return std::any_of(part_, part_ + parts(), [](const Part& part) {
      const uint64_t word = part.word.load(std::memory_order_seq_cst);
      return Part::next(word) < Part::end(word);
    });
  }

  void serve() {
    const int self = joined_.fetch_add(1, std::memory_order_relaxed) + 1;
    int idle = 0;
    while (!closing_.load(std::memory_order_acquire)) {
      if (self < size() && claim_and_run(self)) {
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

  Part part_[kMostParts];
  alignas(64) std::atomic<int> finished_{0};
  alignas(64) std::atomic<uint32_t> bell_{0};
  std::atomic<int> sleeping_{0};
  std::atomic<int> size_{1};
  std::atomic<int> parts_{1};
  std::atomic<int> joined_{0};
  std::atomic<bool> closing_{false};
  void (*call_)(const void*, int) = nullptr;
  const void* context_ = nullptr;
  uint32_t epoch_ = 0;
  const int most_;
  std::vector<std::thread> threads_;
};

}  // namespace hostler
