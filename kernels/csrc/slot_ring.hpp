// Slots in an order, for eviction policies: eight bytes for each.
//
// Knows numbers only. A linked ring over arrays, whose sentinel is place 0.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace lmcache {

class SlotRing {
 public:
  static constexpr uint32_t kMostSlots = (1u << 29) - 1;
  static constexpr int64_t kNone = -1;

  SlotRing() { clear(); }

  bool contains(uint32_t slot) const {
    return slot + 1 < links_.size() && links_[slot + 1].next != kOut;
  }

  // Put a slot last; false: it is in the ring already.
  bool add(uint32_t slot) {
    if (contains(slot)) return false;
    if (slot + 1 >= links_.size()) links_.resize(slot + 2, {kOut, kOut});
    put_last(slot + 1);
    ++size_;
    return true;
  }

  // Make a slot the last; false: it isn't in the ring.
  bool touch(uint32_t slot) {
    if (!contains(slot)) return false;
    take(slot + 1);
    put_last(slot + 1);
    return true;
  }

  bool remove(uint32_t slot) {
    if (!contains(slot)) return false;
    take(slot + 1);
    links_[slot + 1] = {kOut, kOut};
    --size_;
    return true;
  }

  void clear() {
    links_.assign(1, {0, 0});
    size_ = 0;
  }

  // The slot after `slot`, or the first one after kNone; kNone: there are no more.
  int64_t after(int64_t slot) const { return int64_t{links_[place(slot)].next} - 1; }
  int64_t before(int64_t slot) const { return int64_t{links_[place(slot)].previous} - 1; }

  size_t size() const { return size_; }
  size_t nbytes() const { return links_.capacity() * sizeof(Links); }

 private:
  struct Links {
    uint32_t next, previous;
  };
  static constexpr uint32_t kOut = ~0u;

  static size_t place(int64_t slot) { return static_cast<size_t>(slot + 1); }

  void take(uint32_t at) {
    links_[links_[at].previous].next = links_[at].next;
    links_[links_[at].next].previous = links_[at].previous;
  }

  void put_last(uint32_t at) {
    const uint32_t last = links_[0].previous;
    links_[at] = {0, last};
    links_[last].next = at;
    links_[0].previous = at;
  }

  std::vector<Links> links_;
  size_t size_;
};

}  // namespace lmcache
