// Memory for weights, from the system in large pieces and back to it at once. Above: pack.h, model.h.
//
// The allocator of the C library keeps what it gets back; a model that goes to sleep must give its memory to others. Huge
// pages, where the system has them, make filling and reading cheaper.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

namespace hostler {

class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  ~Arena() {
    for (const Piece& piece : pieces_) munmap(piece.data, piece.bytes);
  }

  // Returns zeroed memory on a cache line of its own, which lives as long as the arena.
  uint8_t* take(size_t bytes) {
    bytes = (bytes + kLine - 1) / kLine * kLine;
    if (pieces_.empty() || pieces_.back().bytes - pieces_.back().used < bytes) grow(bytes);
    Piece& piece = pieces_.back();
    uint8_t* out = piece.data + piece.used;
    piece.used += bytes;
    return out;
  }

 private:
  static constexpr size_t kLine = 64, kHuge = size_t(2) << 20, kPiece = size_t(64) << 20;
  struct Piece {
    uint8_t* data;
    size_t bytes, used;
  };

  // Address space only: the system commits pages as they are filled.
  void grow(size_t bytes) {
    bytes = std::max(kPiece, (bytes + kHuge - 1) / kHuge * kHuge);
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    madvise(p, bytes, MADV_HUGEPAGE);
    pieces_.push_back({static_cast<uint8_t*>(p), bytes, 0});
  }

  std::vector<Piece> pieces_;
};

}  // namespace hostler
