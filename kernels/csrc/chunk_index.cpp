#include "chunk_index.hpp"

#include <algorithm>
#include <cstring>

namespace lmcache {
namespace {

// Of the places, this share is used when the index is full: 20 bytes / 0.75 = 26.7 bytes a chunk,
// and a miss looks at 8 places on average (Knuth vol. 3, 6.4: (1 + 1/(1 - 0.75)^2) / 2).
constexpr double kLoad = 0.75;

// Keys ahead whose places are asked for while one is compared.
constexpr size_t kAhead = 8;

uint64_t multiply_high(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>((static_cast<unsigned __int128>(a) * b) >> 64);
}

Digest digest_at(const uint8_t* p) {
  Digest key;
  std::memcpy(key.data(), p, key.size());
  return key;
}

}  // namespace

ChunkIndex::ChunkIndex(size_t chunks, uint64_t seed) : chunks_(chunks), seed_(seed) {
  const size_t places = static_cast<size_t>(static_cast<double>(chunks) / kLoad) + 2;
  keys_.resize(places);
  values_.assign(places, kEmpty);
}

size_t ChunkIndex::home(const Digest& key) const {
  uint64_t low, high;
  std::memcpy(&low, key.data(), 8);
  std::memcpy(&high, key.data() + 8, 8);
  const unsigned __int128 product = static_cast<unsigned __int128>(low ^ seed_) *
                                    (high ^ 0x9E3779B97F4A7C15u);
  const uint64_t mixed =
      (static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64)) *
      0xD6E8FEB86659FD93u;
  return multiply_high(mixed, keys_.size());
}

size_t ChunkIndex::position(const Digest& key) const {
  size_t place = home(key);
  while (values_[place] != kEmpty && keys_[place] != key) place = after(place);
  return place;
}

ChunkIndex::Inserted ChunkIndex::insert(const Digest& key, uint32_t slot, uint32_t state) {
  std::lock_guard lock(mutex_);
  const size_t place = position(key);
  if (values_[place] != kEmpty) return Inserted::exists;
  if (size_ == chunks_) return Inserted::full;
  keys_[place] = key;
  values_[place] = slot * kStates + state;
  ++size_;
  return Inserted::yes;
}

int64_t ChunkIndex::find(const Digest& key) const {
  std::lock_guard lock(mutex_);
  const uint32_t value = values_[position(key)];
  return value == kEmpty ? kAbsent : value / kStates;
}

int64_t ChunkIndex::state(const Digest& key) const {
  std::lock_guard lock(mutex_);
  const uint32_t value = values_[position(key)];
  return value == kEmpty ? kAbsent : value % kStates;
}

bool ChunkIndex::set_state(const Digest& key, uint32_t state) {
  std::lock_guard lock(mutex_);
  uint32_t& value = values_[position(key)];
  if (value == kEmpty) return false;
  value = value / kStates * kStates + state;
  return true;
}

int64_t ChunkIndex::erase(const Digest& key) {
  std::lock_guard lock(mutex_);
  size_t hole = position(key);
  const uint32_t value = values_[hole];
  if (value == kEmpty) return kAbsent;
  // Close the hole with every later key of the run that may lie there, so that no search ends early.
  for (size_t place = after(hole); values_[place] != kEmpty; place = after(place)) {
    const size_t n = keys_.size(), from = home(keys_[place]);
    if ((place + n - from) % n >= (place + n - hole) % n) {
      keys_[hole] = keys_[place];
      values_[hole] = values_[place];
      hole = place;
    }
  }
  values_[hole] = kEmpty;
  --size_;
  return value / kStates;
}

void ChunkIndex::clear() {
  std::lock_guard lock(mutex_);
  std::fill(values_.begin(), values_.end(), kEmpty);
  size_ = 0;
}

size_t ChunkIndex::prefix(const uint8_t* keys, size_t count, uint32_t ready,
                          std::vector<uint32_t>* slots) const {
  std::lock_guard lock(mutex_);
  const auto ask_for = [&](size_t i) {
    const size_t place = home(digest_at(keys + 16 * i));
    __builtin_prefetch(&keys_[place]);
    __builtin_prefetch(&values_[place]);
  };
  for (size_t i = 1; i < std::min(count, kAhead); ++i) ask_for(i);
  for (size_t i = 0; i < count; ++i) {
    if (i + kAhead < count) ask_for(i + kAhead);
    const uint32_t value = values_[position(digest_at(keys + 16 * i))];
    if (value == kEmpty || value % kStates != ready) return i;
    if (slots != nullptr) slots->push_back(value / kStates);
  }
  return count;
}

size_t ChunkIndex::size() const {
  std::lock_guard lock(mutex_);
  return size_;
}

size_t ChunkIndex::nbytes() const {
  return keys_.size() * (sizeof(Digest) + sizeof(uint32_t)) + sizeof *this;
}

}  // namespace lmcache
