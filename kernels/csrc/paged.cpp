#include "paged.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "xxh3.hpp"

namespace lmcache {
namespace {

// Below this many bytes a call's result is likely to be read from the cache soon, and a second
// thread takes longer to wake than it saves. Tuned with bench/kernels.py.
constexpr int64_t kStreamFrom = 4 << 20;
constexpr int64_t kParallelFrom = 256 << 10;

// Rearranged tokens are put together here, then written out in one go. Fits the second-level cache
// beside its source.
constexpr int64_t kScratch = 128 << 10;

// Most bytes of a chunk that are hashed first and then rearranged into a block.
constexpr int64_t kTile = 512 << 10;

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

uint8_t* scratch() {
  struct Free {
    void operator()(uint8_t* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<uint8_t, Free> memory(
      static_cast<uint8_t*>(std::aligned_alloc(kLine, kScratch)));
  return memory.get();
}

// One layer of one span.
class Mover {
 public:
  Mover(const Transfer& transfer, const Span& span, const Layer& layer, bool sum, Store store)
      : layout_(transfer.layout),
        simd_(transfer.simd),
        span_(span),
        layer_(layer),
        store_(store),
        row_(layout_.row_bytes()),
        chunk_(span.chunk + layer.position * layout_.layer_bytes(span.chunk_tokens)),
        whole_(span.tokens == span.chunk_tokens),
        sum_(sum),
        cursor_(chunk_, static_cast<size_t>(layout_.layer_bytes(span.chunk_tokens)), simd_) {}

  uint64_t gather() {
    each_plane([&](const Plane& plane, const Inner& inner, uint8_t* rows) {
      each_run(plane, inner, [&](uint8_t* paged, int64_t at, int64_t tokens) {
        uint8_t* canonical = rows + at * row_;
        if (inner.order == Order::canonical) {
          emit(canonical, paged, tokens * row_, canonical);
          return;
        }
        const int64_t most = tile_tokens();
        for (int64_t t = 0; t < tokens; t += most) {
          const int64_t n = std::min(most, tokens - t);
          uint8_t* tile = n * row_ <= kScratch && scratch() ? scratch() : canonical + t * row_;
          collect(plane, inner, paged + t * plane.token, tile, n);
          if (tile == canonical + t * row_)
            note(canonical + (t + n) * row_);
          else
            emit(canonical + t * row_, tile, n * row_, canonical + t * row_);
        }
      });
    });
    return finish();
  }

  uint64_t scatter() {
    // A part of a chunk is moved, but all of it is checked.
    if (sum_ && !whole_) cursor_.catch_up(static_cast<size_t>(-1));
    each_plane([&](const Plane& plane, const Inner& inner, uint8_t* rows) {
      each_run(plane, inner, [&](uint8_t* paged, int64_t at, int64_t tokens) {
        uint8_t* canonical = rows + at * row_;
        if (inner.order == Order::canonical) {
          emit(paged, canonical, tokens * row_, canonical);
          return;
        }
        const int64_t most = tokens * row_ <= kTile ? tokens : tile_tokens();
        for (int64_t t = 0; t < tokens; t += most) {
          const int64_t n = std::min(most, tokens - t);
          const uint8_t* tile = canonical + t * row_;
          note(tile + n * row_);  // brings the tile into the cache
          distribute(plane, inner, paged + t * plane.token, tile, n);
        }
      });
    });
    return finish();
  }

  uint64_t hash() { return cursor_.finish(); }

 private:
  template <class F>
  void each_plane(F take) {
    for (size_t p = 0; p < layout_.planes.size(); ++p) {
      const Plane& plane = layout_.planes[p];
      const int64_t before = static_cast<int64_t>(p) * span_.chunk_tokens + span_.chunk_offset;
      take(plane, Inner(layout_, plane), chunk_ + before * row_);
    }
  }

  // Calls `take(paged, at, tokens)` for every run of tokens, as long as their order allows.
  template <class F>
  void each_run(const Plane& plane, const Inner& inner, F take) {
    uint8_t* base = layer_.base + plane.offset;
    const bool joins = inner.order == Order::canonical;
    uint8_t* start = nullptr;
    int64_t at = 0, tokens = 0;
    each_piece(layout_, span_, [&](const Piece& piece) {
      uint8_t* paged = base + piece.block * plane.block + piece.offset * plane.token;
      if (joins && tokens > 0 && paged == start + tokens * row_) {
        tokens += piece.tokens;
        return;
      }
      if (tokens > 0) {
        // The next block may be anywhere: no hardware prefetcher will have guessed it.
        for (size_t i = 0; i < 8; ++i) __builtin_prefetch(paged + i * kLine);
        take(start, at, tokens);
      }
      start = paged, at = piece.at, tokens = piece.tokens;
    });
    if (tokens > 0) take(start, at, tokens);
  }

  // A whole number of lines of a transposed element, so that no line is read twice.
  int64_t tile_tokens() const {
    const int64_t line = static_cast<int64_t>(kLine) / layout_.itemsize;
    const int64_t most = kScratch / row_;
    return most >= line ? most - most % line : std::max<int64_t>(most, 1);
  }

  // Copy a canonical run, hashing it in passing. `canonical` is `dst` or `src`.
  void emit(uint8_t* dst, const uint8_t* src, int64_t bytes, const uint8_t* canonical) {
    if (sum_ && whole_)
      cursor_.copy(dst, src, static_cast<size_t>(bytes), static_cast<size_t>(canonical - chunk_),
                   store_);
    else if (store_ == Store::streaming)
      simd_.stream(dst, src, static_cast<size_t>(bytes));
    else
      std::memcpy(dst, src, static_cast<size_t>(bytes));
  }

  // The chunk is there up to `end`.
  void note(const uint8_t* end) {
    if (sum_ && whole_) cursor_.catch_up(static_cast<size_t>(end - chunk_));
  }

  uint64_t finish() { return sum_ ? cursor_.finish() : 0; }

  // `tokens` tokens from a block into canonical order.
  void collect(const Plane& plane, const Inner& inner, const uint8_t* paged, uint8_t* canonical,
               int64_t tokens) {
    if (inner.order == Order::rows) {
      for (int64_t p = 0; p < inner.pieces; ++p)
        for (int64_t t = 0; t < tokens; ++t)
          std::memcpy(canonical + t * row_ + p * inner.piece_bytes,
                      paged + t * plane.token + p * inner.piece_stride,
                      static_cast<size_t>(inner.piece_bytes));
      return;
    }
    const int64_t item = layout_.itemsize;
    for (int64_t h = 0; h < layout_.heads; ++h) {
      const uint8_t* from = paged + h * plane.head;
      uint8_t* to = canonical + h * layout_.head_size * item;
      if (inner.order == Order::transposed)
        transpose()(to, static_cast<size_t>(row_ / item), from,
                    static_cast<size_t>(plane.dim / item), static_cast<size_t>(layout_.head_size),
                    static_cast<size_t>(tokens));
      else
        for (int64_t t = 0; t < tokens; ++t)
          for (int64_t d = 0; d < layout_.head_size; ++d)
            element(to + t * row_ + d * item, from + t * plane.token + d * plane.dim);
    }
  }

  // `tokens` tokens from canonical order into a block.
  void distribute(const Plane& plane, const Inner& inner, uint8_t* paged,
                  const uint8_t* canonical, int64_t tokens) {
    if (inner.order == Order::rows) {
      for (int64_t p = 0; p < inner.pieces; ++p)
        for (int64_t t = 0; t < tokens; ++t) {
          uint8_t* to = paged + t * plane.token + p * inner.piece_stride;
          const uint8_t* from = canonical + t * row_ + p * inner.piece_bytes;
          if (store_ == Store::streaming)
            simd_.stream(to, from, static_cast<size_t>(inner.piece_bytes));
          else
            std::memcpy(to, from, static_cast<size_t>(inner.piece_bytes));
        }
      return;
    }
    const int64_t item = layout_.itemsize;
    const int64_t head_bytes = layout_.head_size * tokens * item;
    // Whole blocks of one head are contiguous: they can be put together in the cache first.
    const bool through = inner.order == Order::transposed && plane.dim == tokens * item &&
                         head_bytes <= kScratch && store_ == Store::streaming && scratch();
    for (int64_t h = 0; h < layout_.heads; ++h) {
      uint8_t* to = paged + h * plane.head;
      const uint8_t* from = canonical + h * layout_.head_size * item;
      if (inner.order == Order::transposed) {
        transpose()(through ? scratch() : to, static_cast<size_t>(plane.dim / item), from,
                    static_cast<size_t>(row_ / item), static_cast<size_t>(tokens),
                    static_cast<size_t>(layout_.head_size));
        if (through) simd_.stream(to, scratch(), static_cast<size_t>(head_bytes));
      } else {
        for (int64_t t = 0; t < tokens; ++t)
          for (int64_t d = 0; d < layout_.head_size; ++d)
            element(to + t * plane.token + d * plane.dim, from + t * row_ + d * item);
      }
    }
  }

  auto transpose() const -> decltype(Simd::transpose[0]) {
    return simd_.transpose[layout_.itemsize == 4 ? 2 : layout_.itemsize - 1];
  }

  void element(uint8_t* to, const uint8_t* from) const {
    switch (layout_.itemsize) {
      case 1: *to = *from; break;
      case 2: std::memcpy(to, from, 2); break;
      default: std::memcpy(to, from, 4);
    }
  }

  const Layout& layout_;
  const Simd& simd_;
  const Span& span_;
  const Layer& layer_;
  const Store store_;
  const int64_t row_;
  uint8_t* const chunk_;
  const bool whole_, sum_;
  Xxh3Cursor cursor_;
};

}  // namespace

void Transfer::gather(Pool& pool, uint64_t* sums) const { run(pool, sums, Way::gather); }
void Transfer::scatter(Pool& pool, uint64_t* sums) const { run(pool, sums, Way::scatter); }
void Transfer::hash(Pool& pool, uint64_t* sums) const { run(pool, sums, Way::hash); }

void Transfer::run(Pool& pool, uint64_t* sums, Way way) const {
  int64_t bytes = 0;
  for (const Span& span : spans)
    bytes += layout.layer_bytes(span.tokens) * static_cast<int64_t>(layers.size());
  const Store store = bytes >= kStreamFrom ? Store::streaming : Store::cached;
  const auto task = [&](size_t i) {
    const Span& span = spans[i / layers.size()];
    Mover mover(*this, span, layers[i % layers.size()], sums != nullptr, store);
    const uint64_t sum = way == Way::gather    ? mover.gather()
                         : way == Way::scatter ? mover.scatter()
                                               : mover.hash();
    if (sums != nullptr) sums[i] = sum;
    // The threads' streamed stores must be seen before the pool says that the task is done.
    if (store == Store::streaming) simd.fence();
  };
  const size_t tasks = spans.size() * layers.size();
  if (bytes >= kParallelFrom) {
    pool.run(tasks, task);
  } else {
    for (size_t i = 0; i < tasks; ++i) task(i);
  }
}

}  // namespace lmcache
