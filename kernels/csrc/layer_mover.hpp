// Moves one layer of one span. Only `paged.cpp` includes this.
//
// Knows the fastest way for each order of tokens inside a block. Knows nothing about threads.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>

#include "block_order.hpp"
#include "paged.hpp"
#include "xxh3.hpp"

namespace lmcache {

// Rearranged tokens are put together in a buffer of kScratch bytes, then written out in one go:
// about kTogether bytes at a time, which the first-level cache holds, and kTokens tokens at least.
constexpr int64_t kScratch = 256 << 10;
constexpr int64_t kTogether = 32 << 10;
constexpr int64_t kTokens = 16;

// Most bytes of a chunk that are hashed first and then rearranged into a block.
constexpr int64_t kTile = 512 << 10;

// Memory is asked for so many bytes ahead. Hardware prefetchers stop at each 4 KiB page, and don't
// know where the next block lies. Tuned with bench/block_copies.py on Zen 4.
constexpr int64_t kAhead = 4 * kGroup;

inline uint8_t* scratch() {
  struct Free {
    void operator()(uint8_t* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<uint8_t, Free> memory(
      static_cast<uint8_t*>(std::aligned_alloc(kLine, kScratch)));
  return memory.get();
}

// One layer of one span.
class LayerMover {
 public:
  LayerMover(const Transfer& transfer, const Span& span, const Layer& layer, bool sum, Store store)
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
          emit(canonical, paged, tokens * row_, canonical,
               straight(paged, tokens * row_));
          return;
        }
        const int64_t joined = join(plane, inner, paged, canonical, tokens);
        const int64_t most = gather_tile();
        if (most == 0 || scratch() == nullptr) {
          collect(plane, inner, paged + joined * plane.token, canonical + joined * row_,
                  tokens - joined);
          note(canonical + tokens * row_);
          return;
        }
        for (int64_t t = joined; t < tokens; t += most) {
          const int64_t n = std::min(most, tokens - t);
          uint8_t* to = canonical + t * row_;
          if (by_lines(inner, to, n)) {
            write_lines(plane, paged + t * plane.token, to, n, block_ahead(plane, inner, t, tokens));
            continue;
          }
          collect(plane, inner, paged + t * plane.token, scratch(), n);
          emit(to, scratch(), n * row_, to, block_ahead(plane, inner, t, tokens));
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
          emit(paged, canonical, tokens * row_, canonical,
               {canonical + kAhead, 0, 0, sum_});
          return;
        }
        const int64_t most = tokens * row_ <= kTile ? tokens : std::max<int64_t>(kTile / row_, 1);
        for (int64_t t = split(plane, inner, paged, canonical, tokens); t < tokens; t += most) {
          const int64_t n = std::min(most, tokens - t);
          const uint8_t* tile = canonical + t * row_;
          into_cache(tile, n * row_);
          distribute(plane, inner, paged + t * plane.token, tile, n);
        }
      });
    });
    return finish();
  }

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
        next_ = paged;
        __builtin_prefetch(paged);  // so that its address is translated when it is read
        take(start, at, tokens);
      }
      start = paged, at = piece.at, tokens = piece.tokens;
    });
    next_ = after_plane(plane, start);
    if (tokens > 0) take(start, at, tokens);
  }

  // Where the next plane's first run begins, or `otherwise`.
  const uint8_t* after_plane(const Plane& plane, const uint8_t* otherwise) const {
    const Plane* next = &plane + 1;
    if (next == layout_.planes.data() + layout_.planes.size()) return otherwise;
    return layer_.base + next->offset + span_.blocks[0] * next->block + span_.first * next->token;
  }

  // How many tokens are put together at a time; 0 if so many don't fit.
  int64_t gather_tile() const {
    const int64_t most = std::max(kTogether / row_ / kTokens, int64_t{1}) * kTokens;
    return most * row_ <= kScratch ? most : 0;
  }

  // Copy a canonical run, hashing it in passing. `canonical` is `dst` or `src`.
  void emit(uint8_t* dst, const uint8_t* src, int64_t bytes, const uint8_t* canonical,
            Fetch fetch) {
    if (sum_ && whole_)
      cursor_.copy(dst, src, static_cast<size_t>(bytes), static_cast<size_t>(canonical - chunk_),
                   store_, fetch);
    else if (store_ == Store::streaming)
      simd_.stream(dst, src, static_cast<size_t>(bytes), fetch);
    else
      std::memcpy(dst, src, static_cast<size_t>(bytes));
  }

  // Tokens whose pieces are whole lines are copied and hashed in one go. How many were.
  int64_t join(const Plane& plane, const Inner& inner, uint8_t* paged, uint8_t* canonical,
               int64_t tokens) {
    const Rows rows = rows_at(plane, inner, paged);
    const auto [count, acc] = direct(inner, rows, canonical, tokens);
    if (count > 0)
      simd_.join(acc, canonical, rows, static_cast<size_t>(count * row_) / kGroup,
                 is_aligned(canonical) ? store_ : Store::cached,
                 block_ahead(plane, inner, 0, tokens));
    return count;
  }

  int64_t split(const Plane& plane, const Inner& inner, uint8_t* paged, const uint8_t* canonical,
                int64_t tokens) {
    const Rows rows = rows_at(plane, inner, paged);
    const auto [count, acc] = direct(inner, rows, canonical, tokens);
    if (count > 0)
      simd_.split(acc, rows, canonical, static_cast<size_t>(count * row_) / kGroup,
                  rows.aligned() ? store_ : Store::cached, {canonical + kAhead, 0, 0, sum_});
    return count;
  }

  static Rows rows_at(const Plane& plane, const Inner& inner, uint8_t* paged) {
    return {paged, static_cast<size_t>(inner.pieces), static_cast<size_t>(inner.piece_bytes),
            static_cast<ptrdiff_t>(inner.piece_stride), static_cast<ptrdiff_t>(plane.token)};
  }

  static bool is_aligned(const uint8_t* p) { return reinterpret_cast<uintptr_t>(p) % kLine == 0; }

  // How many of `tokens` tokens are whole groups, and what hashes them, if anything does.
  std::pair<int64_t, uint64_t*> direct(const Inner& inner, const Rows& rows,
                                       const uint8_t* canonical, int64_t tokens) {
    if (inner.order != Order::rows || !rows.in_lines()) return {0, nullptr};
    for (; tokens > 0; --tokens) {
      const size_t bytes = static_cast<size_t>(tokens * row_);
      if (bytes % kGroup != 0) continue;
      if (!sum_ || !whole_) return {tokens, nullptr};
      uint64_t* acc = cursor_.lend(static_cast<size_t>(canonical - chunk_), bytes);
      if (acc != nullptr) return {tokens, acc};
    }
    return {0, nullptr};
  }

  // While a run is copied: what is ahead in it, then the run after it. Into the first-level cache
  // where it is hashed, the second where it is only copied: 1.05 and 1.2 times as fast, on Zen 4.
  Fetch straight(const uint8_t* src, int64_t bytes) const {
    const int64_t groups = (bytes - kAhead) / static_cast<int64_t>(kGroup);
    if (groups <= 0) return {next_, 0, 0, sum_};
    return {src + kAhead, static_cast<size_t>(groups), next_ - (src + kAhead), sum_};
  }

  // While the tokens from `t` on of a block are written out: as big a part of the next one, as far
  // as its order allows to say that in one `Fetch`.
  Fetch block_ahead(const Plane& plane, const Inner& inner, int64_t t, int64_t tokens) const {
    int64_t bytes = 0, stride = 0, pieces = 0;
    if (inner.order == Order::rows && plane.token == inner.piece_bytes) {
      bytes = tokens * inner.piece_bytes;
      stride = inner.piece_stride;
      pieces = inner.pieces;
    } else if (inner.order == Order::transposed && plane.dim == tokens * layout_.itemsize) {
      bytes = layout_.head_size * plane.dim;
      stride = plane.head;
      pieces = layout_.heads;
    }
    return {next_ + t * pieces / tokens * stride, static_cast<size_t>(bytes) / kGroup,
            static_cast<ptrdiff_t>(stride), false};
  }

  // Whether so many transposed tokens can be written line by line, past the caches.
  bool by_lines(const Inner& inner, const uint8_t* canonical, int64_t tokens) const {
    return inner.order == Order::transposed && store_ == Store::streaming &&
           simd_.transpose_lines != nullptr && layout_.itemsize == 2 && tokens % 16 == 0 &&
           layout_.head_size % 32 == 0 && is_aligned(canonical);
  }

  // Transposed tokens into canonical order. While they are written, memory has time to take lines;
  // while a copy of them is hashed, to deliver what comes next.
  void write_lines(const Plane& plane, const uint8_t* paged, uint8_t* canonical, int64_t tokens,
                   Fetch fetch) {
    const bool hashes = sum_ && whole_;
    const int64_t head_bytes = layout_.head_size * layout_.itemsize;
    const auto groups = static_cast<int64_t>(fetch.groups);
    for (int64_t h = 0; h < layout_.heads; ++h) {
      const int64_t at = h * head_bytes * tokens / static_cast<int64_t>(kGroup);
      const int64_t ahead = groups == 0 ? at * static_cast<int64_t>(kGroup)
                                        : at / groups * fetch.stride +
                                              at % groups * static_cast<int64_t>(kGroup);
      simd_.transpose_lines(canonical + h * head_bytes,
                            hashes ? scratch() + h * head_bytes : nullptr,
                            static_cast<size_t>(row_), paged + h * plane.head,
                            static_cast<size_t>(plane.dim),
                            static_cast<size_t>(layout_.head_size), static_cast<size_t>(tokens),
                            {fetch.at + ahead});
    }
    if (hashes)
      cursor_.read(scratch(), static_cast<size_t>(tokens * row_),
                   static_cast<size_t>(canonical - chunk_), {scratch() + kAhead, 0, 0, true});
  }

  // The chunk is there up to `end`.
  void note(const uint8_t* end) {
    if (sum_ && whole_) cursor_.catch_up(static_cast<size_t>(end - chunk_));
  }

  // Tiles are read in another order than they lie: first come their bytes, as they lie. Hashing does
  // that by the way.
  void into_cache(const uint8_t* tile, int64_t bytes) {
    if (sum_ && whole_)
      note(tile + bytes);
    else
      for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(tile + i, 0, 2);
  }

  uint64_t finish() { return sum_ ? cursor_.finish() : 0; }

  // `tokens` tokens from a block into canonical order.
  void collect(const Plane& plane, const Inner& inner, const uint8_t* paged, uint8_t* canonical,
               int64_t tokens) {
    if (inner.order == Order::rows) {
      for (int64_t p = 0; p < inner.pieces; ++p)
        simd_.copy_rows(canonical + p * inner.piece_bytes, static_cast<size_t>(row_),
                        paged + p * inner.piece_stride, static_cast<size_t>(plane.token),
                        static_cast<size_t>(tokens), static_cast<size_t>(inner.piece_bytes),
                        Store::cached);
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
        simd_.copy_rows(paged + p * inner.piece_stride, static_cast<size_t>(plane.token),
                        canonical + p * inner.piece_bytes, static_cast<size_t>(row_),
                        static_cast<size_t>(tokens), static_cast<size_t>(inner.piece_bytes),
                        store_);
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
        if (through)
          simd_.stream(to, scratch(), static_cast<size_t>(head_bytes),
                       {canonical + tokens * row_ + h * head_bytes});
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
  const uint8_t* next_ = nullptr;  // the run after this one
  Xxh3Cursor cursor_;
};

}  // namespace lmcache
