// Which chunk lies in which slot, and which chunk continues which.
//
// Knows keys, slots, a small state and the tree of prefixes. Knows nothing about bytes, leases or
// the order of eviction.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <vector>

namespace lmcache {

using Digest = std::array<uint8_t, 16>;

// Memory that costs nothing before it is used: it is zero until then.
template <class T>
class Lazy {
 public:
  explicit Lazy(size_t count);
  T& operator[](size_t i) { return data_[i]; }
  const T& operator[](size_t i) const { return data_[i]; }
  size_t size() const { return count_; }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  size_t count_;
  std::unique_ptr<T[], Free> data_;
};

// For each slot a record of 32 bytes, and an open-addressing table that finds slots by key: linear
// probing with backward-shift deletion, so there are no tombstones and a long life doesn't slow it.
// All methods may be called from any thread.
class ChunkIndex {
 public:
  static constexpr uint32_t kAbsent = 0, kStates = 8;
  static constexpr uint32_t kMostSlots = (1u << 29) - 1;
  static constexpr int64_t kNone = -1;

  // `seed` keeps whoever can choose keys from choosing collisions.
  ChunkIndex(size_t slots, uint64_t seed);

  enum class Inserted { yes, exists, occupied, orphan };
  // `parent` is a slot that holds a chunk, or kNone; `state` isn't kAbsent.
  Inserted insert(const Digest& key, uint32_t slot, int64_t parent, uint32_t state);
  int64_t find(const Digest& key) const;  // the slot, or kNone
  bool key(uint32_t slot, Digest* key) const;
  uint32_t state(uint32_t slot) const;
  bool set_state(uint32_t slot, uint32_t state);
  // What continues the chunk stays, without a parent.
  bool remove(uint32_t slot);

  // Follows the first continuation of a chunk until one has none. kNone: the slot holds nothing.
  int64_t leaf(uint32_t slot) const;
  // All that continues a chunk, directly or not; a chunk comes before what it continues.
  std::vector<uint32_t> descendants(uint32_t slot) const;

  // How many keys from the first on have state `ready`; their slots go to `slots`, if given.
  size_t prefix(const uint8_t* keys, size_t count, uint32_t ready,
                std::vector<uint32_t>* slots) const;

  size_t slots() const { return records_.size(); }
  size_t size() const;
  size_t nbytes() const;

 private:
  // Links are slots plus one: 0 means none, so that zeroed memory is an empty index.
  struct Record {
    Digest key;
    uint32_t parent : 29, state : 3;
    uint32_t first;           // continuation
    uint32_t next, previous;  // continuations of the same parent, in a ring
  };
  static_assert(sizeof(Record) == 32);

  struct Place {
    uint32_t link, tag;
  };

  struct Hash {
    size_t place;
    uint32_t tag;
  };

  Hash hash(const Digest& key) const;
  size_t position(const Digest& key) const;  // where it is, or the empty place where it would go
  size_t after(size_t place) const { return ++place == table_.size() ? 0 : place; }
  void forget_place(size_t hole);
  void adopt(uint32_t parent, uint32_t child);
  void unlink(uint32_t slot);

  mutable std::mutex mutex_;
  size_t size_ = 0;
  uint64_t seed_;
  Lazy<Record> records_;
  Lazy<Place> table_;
};

}  // namespace lmcache
