// Which chunk lies in which slot: an open-addressing table of 16-byte digests.
//
// Knows keys, slots and one small state. Knows nothing about bytes, leases or eviction.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

namespace lmcache {

using Digest = std::array<uint8_t, 16>;

// Linear probing with backward-shift deletion: no tombstones, so a long life doesn't slow it. Has
// room for a fixed number of chunks: an arena has a fixed number of slots. All methods may be
// called from any thread.
class ChunkIndex {
 public:
  static constexpr uint32_t kStates = 8;
  static constexpr uint32_t kMostSlots = 1u << 29;
  static constexpr int64_t kAbsent = -1;

  // `seed` keeps whoever can choose keys from choosing collisions.
  ChunkIndex(size_t chunks, uint64_t seed);

  enum class Inserted { yes, exists, full };
  Inserted insert(const Digest& key, uint32_t slot, uint32_t state);
  int64_t find(const Digest& key) const;   // the slot, or kAbsent
  int64_t state(const Digest& key) const;  // the state, or kAbsent
  bool set_state(const Digest& key, uint32_t state);
  int64_t erase(const Digest& key);  // the slot, or kAbsent
  void clear();

  // How many keys from the first on have state `ready`; their slots go to `slots`, if given.
  size_t prefix(const uint8_t* keys, size_t count, uint32_t ready,
                std::vector<uint32_t>* slots) const;

  size_t size() const;
  size_t capacity() const { return chunks_; }
  size_t nbytes() const;

 private:
  static constexpr uint32_t kEmpty = ~0u;

  size_t home(const Digest& key) const;
  size_t position(const Digest& key) const;  // where it is, or the empty place where it would go
  size_t after(size_t place) const { return ++place == keys_.size() ? 0 : place; }

  mutable std::mutex mutex_;
  size_t chunks_, size_ = 0;
  uint64_t seed_;
  std::vector<Digest> keys_;
  std::vector<uint32_t> values_;  // slot << 3 | state, or kEmpty
};

}  // namespace lmcache
