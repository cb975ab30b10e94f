// Moves tokens between paged blocks of any strides and canonical chunks.
//
// Knows layouts, spans and addresses that have been checked. Knows nothing about Python.
#pragma once

#include <cstdint>
#include <vector>

#include "pool.hpp"
#include "simd.hpp"

namespace lmcache {

// See lmcache_core.contracts.connector.PlaneStrides; here in bytes.
struct Plane {
  int64_t offset, block, token, head, dim;
};

// See lmcache_core.contracts.connector.PagedLayout.
struct Layout {
  int64_t itemsize, blocks, block_tokens, heads, head_size;
  std::vector<Plane> planes;

  int64_t row_bytes() const { return heads * head_size * itemsize; }
  int64_t layer_bytes(int64_t tokens) const {
    return static_cast<int64_t>(planes.size()) * tokens * row_bytes();
  }
};

// One layer's engine memory, and its position in the chunk.
struct Layer {
  uint8_t* base;
  int64_t position;
};

// See lmcache_core.contracts.connector.BlockSpan. `blocks` begins with the block of the first token, so
// `first` is less than a block.
struct Span {
  int64_t first, tokens, chunk_tokens, chunk_offset;
  const int64_t* blocks;
  uint8_t* chunk;
};

// One call: every span, in every layer.
struct Transfer {
  const Layout& layout;
  const std::vector<Layer>& layers;
  const std::vector<Span>& spans;
  const Simd& simd;

  // Write the chunks. With `sums`, also the XXH3-64 of each layer of each chunk:
  // sums[span * layers + layer].
  void gather(Pool& pool, uint64_t* sums) const;

  // Read the chunks. With `sums` as above.
  void scatter(Pool& pool, uint64_t* sums) const;

 private:
  enum class Way { gather, scatter };
  void run(Pool& pool, uint64_t* sums, Way way) const;
  int64_t bytes() const;
};

// The XXH3-64 of each of `pieces` pieces, which lie one after the other.
void hash_pieces(Pool& pool, const Simd& simd, const uint8_t* data, size_t piece_bytes,
                 size_t pieces, uint64_t* sums);

}  // namespace lmcache
