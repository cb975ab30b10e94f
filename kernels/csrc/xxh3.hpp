// XXH3-64 with seed 0 and the default secret, after xxHash's doc/xxhash_spec.md.
#pragma once

#include "simd.hpp"

namespace lmcache {

uint64_t xxh3_64(const uint8_t* data, size_t bytes, const Simd& simd);

// Hashes an input of known length that comes piece by piece, in whole stripes where it can.
//
// `memory` is where the whole input will lie once it is there: what wasn't hashed in passing is
// read from it.
class Xxh3Cursor {
 public:
  Xxh3Cursor(const uint8_t* memory, size_t bytes, const Simd& simd);

  // Copy `bytes` bytes from `src` to `dst` and hash them. They are bytes `at` ... of the input,
  // which come in order; `dst` or `src` is their place in `memory`. `fetch`: see there.
  void copy(uint8_t* dst, const uint8_t* src, size_t bytes, size_t at, Store store,
            Fetch fetch);

  // Hash bytes `at` ... of the input, which are in `memory` already, from a copy of them.
  void read(const uint8_t* src, size_t bytes, size_t at, Fetch fetch);

  // The accumulators, for somebody who takes the input's bytes `at` ... `at + bytes` into them
  // before anything else is called; nullptr: they aren't whole blocks that come next.
  uint64_t* lend(size_t at, size_t bytes);

  // Hash what lies in `memory` up to byte `end` and isn't hashed yet.
  void catch_up(size_t end);

  // The hash. Everything is in `memory` now.
  uint64_t finish();

 private:
  const uint8_t* memory_;
  size_t bytes_;
  size_t stripes_;  // of the input but for its last one, which is hashed in another way
  size_t done_ = 0;
  const Simd& simd_;
  alignas(kLine) uint64_t acc_[8];
};

}  // namespace lmcache
