// How tokens may lie inside an engine's block. Knows layouts only.
#pragma once

#include <algorithm>

#include "paged.hpp"

namespace lmcache {

// How one plane's tokens lie inside a block.
enum class Order {
  canonical,   // token after token, as in a chunk
  rows,        // pieces of a token are contiguous
  transposed,  // tokens of one element are contiguous: vLLM's keys on CPU
  any,
};

struct Inner {
  Order order;
  int64_t pieces, piece_stride, piece_bytes;  // of a token, for Order::rows

  Inner(const Layout& layout, const Plane& p) {
    const bool dims = layout.head_size == 1 || p.dim == layout.itemsize;
    const int64_t head_bytes = layout.head_size * layout.itemsize;
    const bool heads = layout.heads == 1 || p.head == head_bytes;
    pieces = dims && heads ? 1 : layout.heads;
    piece_stride = pieces == 1 ? 0 : p.head;
    piece_bytes = layout.row_bytes() / pieces;
    if (dims && heads && (layout.block_tokens == 1 || p.token == layout.row_bytes()))
      order = Order::canonical;
    else if (dims)
      order = Order::rows;
    else if (p.token == layout.itemsize && p.dim % layout.itemsize == 0)
      order = Order::transposed;
    else
      order = Order::any;
  }
};

// Tokens of one span that are contiguous in one block: `at` of the span, `tokens` of them.
struct Piece {
  int64_t block, offset, at, tokens;
};

template <class F>
void each_piece(const Layout& layout, const Span& span, F take) {
  int64_t offset = span.first;
  for (int64_t at = 0, i = 0; at < span.tokens; ++i) {
    const int64_t tokens = std::min(layout.block_tokens - offset, span.tokens - at);
    take(Piece{span.blocks[i], offset, at, tokens});
    at += tokens;
    offset = 0;
  }
}

}  // namespace lmcache
