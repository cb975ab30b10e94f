// Chunks of KV to streams and back: docs/codec-format.md in C++.
//
// Knows chunks' shapes and streams' bytes. Knows nothing about Python, keys or where streams go.
// A stream is checked before it is believed: whatever its bytes are, nothing outside of the buffers
// that a caller names is read or written.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <vector>

#include "../pool.hpp"
#include "../simd.hpp"
#include "codec_simd.hpp"

namespace lmcache::codec {

enum class Kind : uint8_t { lossless = 1, values = 2, int8 = 3, e4m3 = 4 };

// A chunk: layers x planes x tokens x heads x head size. Of two planes the first holds keys.
struct Shape {
  DType dtype;
  uint32_t layers, planes, heads, head_size, tokens;

  size_t itemsize() const;
  size_t row_bytes() const { return size_t{heads} * head_size * itemsize(); }
  size_t layer_bytes() const { return size_t{planes} * tokens * row_bytes(); }
  size_t bytes() const { return layers * layer_bytes(); }
};

// What a profile knows of a model: a step for each channel of keys and a mean for each of values,
// layer by layer. What a profile needn't have is empty.
struct Profile {
  uint64_t id = 0;
  std::vector<float> steps;                // with the layers' gains
  std::vector<uint16_t> means, key_means;  // bf16; of keys before rotation
  std::vector<float> value_gains;          // of each layer
  uint32_t basis_heads = 0;                // heads that share a basis, 0 without bases
  std::vector<float> key_basis, value_basis;

  // How many numbers the bases of keys, or of values, of a chunk's layer have.
  size_t basis_size(const Shape& shape) const;
  // The square matrix of a block of heads: rows are channels, columns components.
  const float* basis(bool keys, const Shape& shape, uint32_t layer, uint32_t block) const;
};

struct Options {
  Kind kind = Kind::lossless;
  float key_step = 0.3f, value_step = 0.3f;  // by the rms of a head, and of a token's head
  std::vector<double> turns;                 // cosine and sine of each pair's angle for one token
  bool interleaved = false;
  std::optional<uint32_t> start;             // the first token's position, if it is known
  int first_raw = -1;                        // the first token: 1 raw, 0 not, -1 if it stands out
  const Profile* profile = nullptr;
};

// A stream that isn't one, or isn't of such a chunk.
struct BadStream : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Machine {
  const CodecSimd& codec;
  const Simd& simd;  // for checksums
  Pool& pool;
};

// Whatever the profile.
size_t max_encoded(const Shape& shape, size_t pairs);

// Encode `chunk` into `into`, which has `max_encoded` bytes; the answer is how many were used.
size_t encode(const Machine& machine, const Shape& shape, const Options& options,
              const uint8_t* chunk, uint8_t* into);

// Decode layers `first` ... `first + count - 1` into `into`, which begins with the first of them.
// `stream` may end behind the last of these layers' sections, unless they are all layers.
void decode(const Machine& machine, const Shape& shape, Kind kind, const Profile* profile,
            const uint8_t* stream, size_t bytes, uint8_t* into, uint32_t first, uint32_t count);

// The id of the profile that a stream was written with, 0 for none; for choosing one.
uint64_t profile_of(const uint8_t* stream, size_t bytes);

}  // namespace lmcache::codec
