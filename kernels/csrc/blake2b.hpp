// BLAKE2b without a key (RFC 7693), for digests of up to 64 bytes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lmcache {

class Blake2b {
 public:
  explicit Blake2b(size_t digest_bytes);

  void update(const uint8_t* data, size_t bytes);

  // Write `digest_bytes` bytes. The object is used up.
  void finish(uint8_t* digest);

 private:
  void compress(const uint8_t* block, bool last);

  uint64_t h_[8];
  uint64_t count_ = 0;  // no input here is longer than 2^64 bytes
  uint8_t buffer_[128];
  size_t filled_ = 0;
  size_t digest_bytes_;
};

}  // namespace lmcache
