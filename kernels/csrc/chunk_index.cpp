#include "chunk_index.hpp"

#include <algorithm>
#include <cstring>
#include <new>

namespace lmcache {
namespace {

// Of the places, this share is used when every slot is: 32 + 8 / 0.75 = 42.7 bytes a slot, and a
// miss looks at 8 places on average (Knuth vol. 3, 6.4: (1 + 1/(1 - 0.75)^2) / 2).
constexpr double kLoad = 0.75;

// Keys ahead whose places, and then records, are asked for while one is compared.
constexpr size_t kPlacesAhead = 12, kRecordsAhead = 6;

uint64_t multiply_high(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>((static_cast<unsigned __int128>(a) * b) >> 64);
}

Digest digest_at(const uint8_t* p) {
  Digest key;
  std::memcpy(key.data(), p, key.size());
  return key;
}

}  // namespace

template <class T>
Lazy<T>::Lazy(size_t count) : count_(count), data_(static_cast<T*>(std::calloc(count, sizeof(T)))) {
  if (data_ == nullptr) throw std::bad_alloc();
}

ChunkIndex::ChunkIndex(size_t slots, uint64_t seed)
    : seed_(seed),
      records_(slots),
      table_(static_cast<size_t>(static_cast<double>(slots) / kLoad) + 2) {}

ChunkIndex::Hash ChunkIndex::hash(const Digest& key) const {
  uint64_t low, high;
  std::memcpy(&low, key.data(), 8);
  std::memcpy(&high, key.data() + 8, 8);
  const unsigned __int128 product =
      static_cast<unsigned __int128>(low ^ seed_) * (high ^ 0x9E3779B97F4A7C15u);
  const uint64_t mixed =
      (static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64)) *
      0xD6E8FEB86659FD93u;
  return {multiply_high(mixed, table_.size()), static_cast<uint32_t>(mixed)};
}

size_t ChunkIndex::position(const Digest& key) const {
  const Hash hashed = hash(key);
  size_t place = hashed.place;
  for (;; place = after(place)) {
    const Place& there = table_[place];
    if (there.link == 0) return place;
    if (there.tag == hashed.tag && records_[there.link - 1].key == key) return place;
  }
}

ChunkIndex::Inserted ChunkIndex::insert(const Digest& key, uint32_t slot, int64_t parent,
                                        uint32_t state) {
  std::lock_guard lock(mutex_);
  const size_t place = position(key);
  if (table_[place].link != 0) return Inserted::exists;
  Record& record = records_[slot];
  if (record.state != kAbsent) return Inserted::occupied;
  if (parent != kNone && records_[static_cast<size_t>(parent)].state == kAbsent)
    return Inserted::orphan;
  record = {key, 0, state, 0, 0, 0};
  table_[place] = {slot + 1, hash(key).tag};
  if (parent != kNone) adopt(static_cast<uint32_t>(parent), slot);
  ++size_;
  return Inserted::yes;
}

int64_t ChunkIndex::find(const Digest& key) const {
  std::lock_guard lock(mutex_);
  return static_cast<int64_t>(table_[position(key)].link) - 1;
}

bool ChunkIndex::key(uint32_t slot, Digest* key) const {
  std::lock_guard lock(mutex_);
  *key = records_[slot].key;
  return records_[slot].state != kAbsent;
}

uint32_t ChunkIndex::state(uint32_t slot) const {
  std::lock_guard lock(mutex_);
  return records_[slot].state;
}

bool ChunkIndex::set_state(uint32_t slot, uint32_t state) {
  std::lock_guard lock(mutex_);
  if (records_[slot].state == kAbsent) return false;
  records_[slot].state = state;
  return true;
}

bool ChunkIndex::remove(uint32_t slot) {
  std::lock_guard lock(mutex_);
  Record& record = records_[slot];
  if (record.state == kAbsent) return false;
  forget_place(position(record.key));
  while (record.first != 0) unlink(record.first - 1);
  unlink(slot);
  record = {};
  --size_;
  return true;
}

// Close the hole with every later place of the run that may lie there, so that no search ends early.
void ChunkIndex::forget_place(size_t hole) {
  for (size_t place = after(hole); table_[place].link != 0; place = after(place)) {
    const size_t n = table_.size(), from = hash(records_[table_[place].link - 1].key).place;
    if ((place + n - from) % n >= (place + n - hole) % n) {
      table_[hole] = table_[place];
      hole = place;
    }
  }
  table_[hole] = {};
}

// Last in the ring: the first continuation is the oldest.
void ChunkIndex::adopt(uint32_t parent, uint32_t child) {
  Record &above = records_[parent], &record = records_[child];
  record.parent = parent + 1;
  if (above.first == 0) {
    above.first = record.next = record.previous = child + 1;
    return;
  }
  Record& head = records_[above.first - 1];
  record.next = above.first;
  record.previous = head.previous;
  records_[head.previous - 1].next = child + 1;
  head.previous = child + 1;
}

void ChunkIndex::unlink(uint32_t slot) {
  Record& record = records_[slot];
  if (record.parent == 0) return;
  Record& above = records_[record.parent - 1];
  if (above.first == slot + 1) above.first = record.next == slot + 1 ? 0 : record.next;
  records_[record.next - 1].previous = record.previous;
  records_[record.previous - 1].next = record.next;
  record.parent = record.next = record.previous = 0;
}

int64_t ChunkIndex::leaf(uint32_t slot) const {
  std::lock_guard lock(mutex_);
  if (records_[slot].state == kAbsent) return kNone;
  while (records_[slot].first != 0) slot = records_[slot].first - 1;
  return slot;
}

std::vector<uint32_t> ChunkIndex::descendants(uint32_t slot) const {
  std::lock_guard lock(mutex_);
  std::vector<uint32_t> found{slot};
  for (size_t i = 0; i < found.size(); ++i) {
    const uint32_t first = records_[found[i]].first;
    for (uint32_t link = first; link != 0;) {
      found.push_back(link - 1);
      link = records_[link - 1].next;
      if (link == first) break;
    }
  }
  std::reverse(found.begin(), found.end());
  found.pop_back();
  return found;
}

size_t ChunkIndex::prefix(const uint8_t* keys, size_t count, uint32_t ready,
                          std::vector<uint32_t>* slots) const {
  std::lock_guard lock(mutex_);
  const auto place_of = [&](size_t i) { return hash(digest_at(keys + 16 * i)).place; };
  const auto ask_for_place = [&](size_t i) {
    if (i < count) __builtin_prefetch(&table_[place_of(i)]);
  };
  const auto ask_for_record = [&](size_t i) {
    if (i >= count) return;
    const uint32_t link = table_[place_of(i)].link;
    if (link != 0) __builtin_prefetch(&records_[link - 1]);
  };
  // The first key alone at first: most misses end there.
  for (size_t i = 0; i < count; ++i) {
    if (i == 1) {
      for (size_t ahead = 1; ahead < 1 + kPlacesAhead; ++ahead) ask_for_place(ahead);
      for (size_t ahead = 1; ahead < 1 + kRecordsAhead; ++ahead) ask_for_record(ahead);
    }
    if (i > 0) {
      ask_for_place(i + kPlacesAhead);
      ask_for_record(i + kRecordsAhead);
    }
    const uint32_t link = table_[position(digest_at(keys + 16 * i))].link;
    if (link == 0 || records_[link - 1].state != ready) return i;
    if (slots != nullptr) slots->push_back(link - 1);
  }
  return count;
}

size_t ChunkIndex::size() const {
  std::lock_guard lock(mutex_);
  return size_;
}

size_t ChunkIndex::nbytes() const {
  return records_.size() * sizeof(Record) + table_.size() * sizeof(Place) + sizeof *this;
}

}  // namespace lmcache
