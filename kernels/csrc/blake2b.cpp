#include "blake2b.hpp"

#include <algorithm>
#include <cstring>

namespace lmcache {
namespace {

constexpr uint64_t kIV[8] = {0x6a09e667f3bcc908u, 0xbb67ae8584caa73bu, 0x3c6ef372fe94f82bu,
                             0xa54ff53a5f1d36f1u, 0x510e527fade682d1u, 0x9b05688c2b3e6c1fu,
                             0x1f83d9abfb41bd6bu, 0x5be0cd19137e2179u};

constexpr uint8_t kSigma[10][16] = {
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
    {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
    {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4},
    {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
    {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13},
    {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
    {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11},
    {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
    {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5},
    {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0},
};

inline uint64_t rotr(uint64_t x, int bits) { return (x >> bits) | (x << (64 - bits)); }

inline __attribute__((always_inline)) void mix(uint64_t& a, uint64_t& b, uint64_t& c, uint64_t& d,
                                               uint64_t x, uint64_t y) {
  a += b + x;
  d = rotr(d ^ a, 32);
  c += d;
  b = rotr(b ^ c, 24);
  a += b + y;
  d = rotr(d ^ a, 16);
  c += d;
  b = rotr(b ^ c, 63);
}

}  // namespace

Blake2b::Blake2b(size_t digest_bytes) : digest_bytes_(digest_bytes) {
  std::memcpy(h_, kIV, sizeof h_);
  h_[0] ^= 0x01010000u ^ digest_bytes;
}

void Blake2b::update(const uint8_t* data, size_t bytes) {
  while (bytes > 0) {
    // The last block is compressed in another way, so a full one waits until more comes.
    if (filled_ == sizeof buffer_) {
      count_ += sizeof buffer_;
      compress(buffer_, false);
      filled_ = 0;
    }
    if (filled_ == 0) {
      for (; bytes > sizeof buffer_; data += sizeof buffer_, bytes -= sizeof buffer_) {
        count_ += sizeof buffer_;
        compress(data, false);
      }
    }
    const size_t part = std::min(bytes, sizeof buffer_ - filled_);
    std::memcpy(buffer_ + filled_, data, part);
    filled_ += part, data += part, bytes -= part;
  }
}

void Blake2b::finish(uint8_t* digest) {
  count_ += filled_;
  std::memset(buffer_ + filled_, 0, sizeof buffer_ - filled_);
  compress(buffer_, true);
  std::memcpy(digest, h_, digest_bytes_);
}

void Blake2b::compress(const uint8_t* block, bool last) {
  uint64_t m[16], v[16];
  std::memcpy(m, block, sizeof m);
  std::memcpy(v, h_, sizeof h_);
  std::memcpy(v + 8, kIV, sizeof kIV);
  v[12] ^= count_;
  if (last) v[14] = ~v[14];
#pragma GCC unroll 12
  for (int round = 0; round < 12; ++round) {
    const uint8_t* s = kSigma[round % 10];
    mix(v[0], v[4], v[8], v[12], m[s[0]], m[s[1]]);
    mix(v[1], v[5], v[9], v[13], m[s[2]], m[s[3]]);
    mix(v[2], v[6], v[10], v[14], m[s[4]], m[s[5]]);
    mix(v[3], v[7], v[11], v[15], m[s[6]], m[s[7]]);
    mix(v[0], v[5], v[10], v[15], m[s[8]], m[s[9]]);
    mix(v[1], v[6], v[11], v[12], m[s[10]], m[s[11]]);
    mix(v[2], v[7], v[8], v[13], m[s[12]], m[s[13]]);
    mix(v[3], v[4], v[9], v[14], m[s[14]], m[s[15]]);
  }
  for (int i = 0; i < 8; ++i) h_[i] ^= v[i] ^ v[8 + i];
}

}  // namespace lmcache
