#include "xxh3.hpp"

#include <algorithm>
#include <cstring>

#include "xxh3_secret.hpp"

namespace lmcache {
namespace {

constexpr size_t kLongest = 240;  // bytes that the short paths take

uint32_t read32(const uint8_t* p) {
  uint32_t value;
  std::memcpy(&value, p, 4);
  return value;
}

uint64_t read64(const uint8_t* p) {
  uint64_t value;
  std::memcpy(&value, p, 8);
  return value;
}

uint64_t rotl(uint64_t x, int bits) { return (x << bits) | (x >> (64 - bits)); }

uint64_t fold(uint64_t a, uint64_t b) {
  const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

uint64_t avalanche(uint64_t h) {
  h ^= h >> 37;
  h *= 0x165667919E3779F9u;
  return h ^ (h >> 32);
}

uint64_t avalanche_xxh64(uint64_t h) {
  h ^= h >> 33;
  h *= kPrime64_2;
  h ^= h >> 29;
  h *= kPrime64_3;
  return h ^ (h >> 32);
}

uint64_t mix16(const uint8_t* p, const uint8_t* secret) {
  return fold(read64(p) ^ read64(secret), read64(p + 8) ^ read64(secret + 8));
}

uint64_t up_to_16(const uint8_t* p, size_t n) {
  if (n > 8) {
    const uint64_t low = read64(p) ^ read64(kSecret + 24) ^ read64(kSecret + 32);
    const uint64_t high = read64(p + n - 8) ^ read64(kSecret + 40) ^ read64(kSecret + 48);
    return avalanche(n + __builtin_bswap64(low) + high + fold(low, high));
  }
  if (n >= 4) {
    uint64_t h = read32(p + n - 4) + (static_cast<uint64_t>(read32(p)) << 32);
    h ^= read64(kSecret + 8) ^ read64(kSecret + 16);
    h ^= rotl(h, 49) ^ rotl(h, 24);
    h *= 0x9FB21C651E98DF25u;
    h ^= (h >> 35) + n;
    h *= 0x9FB21C651E98DF25u;
    return h ^ (h >> 28);
  }
  if (n > 0) {
    const uint32_t combined = static_cast<uint32_t>(p[0]) << 16 |
                              static_cast<uint32_t>(p[n >> 1]) << 24 | p[n - 1] |
                              static_cast<uint32_t>(n) << 8;
    return avalanche_xxh64(combined ^ (read32(kSecret) ^ read32(kSecret + 4)));
  }
  return avalanche_xxh64(read64(kSecret + 56) ^ read64(kSecret + 64));
}

uint64_t up_to_128(const uint8_t* p, size_t n) {
  uint64_t acc = n * kPrime64_1;
  for (size_t i = (n - 1) / 32 + 1; i-- > 0;) {
    acc += mix16(p + 16 * i, kSecret + 32 * i);
    acc += mix16(p + n - 16 * (i + 1), kSecret + 32 * i + 16);
  }
  return avalanche(acc);
}

uint64_t up_to_240(const uint8_t* p, size_t n) {
  uint64_t acc = n * kPrime64_1;
  for (size_t i = 0; i < 8; ++i) acc += mix16(p + 16 * i, kSecret + 16 * i);
  acc = avalanche(acc);
  for (size_t i = 8; i < n / 16; ++i) acc += mix16(p + 16 * i, kSecret + 16 * (i - 8) + 3);
  acc += mix16(p + n - 16, kSecret + 136 - 17);
  return avalanche(acc);
}

}  // namespace

Xxh3Cursor::Xxh3Cursor(const uint8_t* memory, size_t bytes, const Simd& simd)
    : memory_(memory),
      bytes_(bytes),
      stripes_(bytes > kLongest ? (bytes - 1) / kLine : 0),
      simd_(simd),
      acc_{kPrime32_3, kPrime64_1, kPrime64_2, kPrime64_3,
           kPrime64_4, kPrime32_2, kPrime64_5, kPrime32_1} {}

void Xxh3Cursor::copy(uint8_t* dst, const uint8_t* src, size_t bytes, size_t at, Store store,
                      Fetch fetch) {
  if (at != done_ * kLine) {
    std::memcpy(dst, src, bytes);
    catch_up(at + bytes);
    return;
  }
  const bool aligned = reinterpret_cast<uintptr_t>(dst) % kLine == 0;
  const size_t stripes = std::min(bytes / kLine, stripes_ - done_);
  simd_.copy_hash(acc_, dst, src, stripes, done_, aligned ? store : Store::cached,
                  fetch);
  done_ += stripes;
  std::memcpy(dst + stripes * kLine, src + stripes * kLine, bytes - stripes * kLine);
}

void Xxh3Cursor::read(const uint8_t* src, size_t bytes, size_t at, Fetch fetch) {
  if (at != done_ * kLine) return catch_up(at + bytes);
  const size_t stripes = std::min(bytes / kLine, stripes_ - done_);
  simd_.hash(acc_, src, stripes, done_, fetch);
  done_ += stripes;
}

uint64_t* Xxh3Cursor::lend(size_t at, size_t bytes) {
  const size_t stripes = bytes / kLine;
  if (at != done_ * kLine || at % kGroup != 0 || bytes % kGroup != 0 || stripes > stripes_ - done_)
    return nullptr;
  done_ += stripes;
  return acc_;
}

void Xxh3Cursor::catch_up(size_t end) {
  const size_t until = std::min(end / kLine, stripes_);
  if (until <= done_) return;
  const uint8_t* next = memory_ + done_ * kLine;
  simd_.hash(acc_, next, until - done_, done_, {next + 4 * kGroup});
  done_ = until;
}

uint64_t Xxh3Cursor::finish() {
  if (bytes_ <= 16) return up_to_16(memory_, bytes_);
  if (bytes_ <= 128) return up_to_128(memory_, bytes_);
  if (bytes_ <= kLongest) return up_to_240(memory_, bytes_);
  catch_up(bytes_);
  const uint8_t* last = memory_ + bytes_ - kLine;
  for (int i = 0; i < 8; ++i) {
    const uint64_t data = read64(last + 8 * i);
    const uint64_t key = data ^ read64(kSecret + 192 - 64 - 7 + 8 * i);
    acc_[i ^ 1] += data;
    acc_[i] += (key & 0xFFFFFFFFu) * (key >> 32);
  }
  uint64_t hash = bytes_ * kPrime64_1;
  for (int i = 0; i < 4; ++i)
    hash += fold(acc_[2 * i] ^ read64(kSecret + 11 + 16 * i),
                 acc_[2 * i + 1] ^ read64(kSecret + 11 + 16 * i + 8));
  return avalanche(hash);
}

uint64_t xxh3_64(const uint8_t* data, size_t bytes, const Simd& simd) {
  return Xxh3Cursor(data, bytes, simd).finish();
}

}  // namespace lmcache
