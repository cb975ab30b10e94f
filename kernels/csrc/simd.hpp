// The inner loops, once per instruction set, chosen at run time.
//
// Knows bytes and strides. Knows nothing about layouts, threads or Python. The per-level files
// are compiled with that level's compiler flags and include nothing that could emit shared inline
// code, so that no instruction leaks to a CPU that doesn't have it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lmcache {

constexpr size_t kLine = 64;  // bytes of a cache line, and of one stripe of XXH3

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "checksums and digests are little-endian");

enum class Store { cached, streaming };

// What to ask memory for while something else is copied, a group of lines for each group copied:
// pieces of `groups` groups, `stride` bytes from the start of one to the start of the next. `near`:
// into the first-level cache, else the second. Only ever prefetched, so it may point anywhere.
struct Fetch {
  const uint8_t* at;
  size_t groups = 0;  // endless
  ptrdiff_t stride = 0;
  bool near = false;
};

constexpr size_t kGroup = 16 * kLine;  // also a block of XXH3 with its default secret

// Rows in paged memory. Each consists of `pieces` pieces of `piece_bytes`. Strides in bytes.
struct Rows {
  uint8_t* at;
  size_t pieces, piece_bytes;
  ptrdiff_t piece_stride, row_stride;

  // Whether join() and split() can move them: their pieces are whole lines, and a power of two.
  bool in_lines() const {
    return piece_bytes % kLine == 0 && (piece_bytes & (piece_bytes - 1)) == 0 &&
           piece_bytes <= kGroup;
  }
  bool aligned() const {
    return (reinterpret_cast<uintptr_t>(at) | static_cast<size_t>(piece_stride | row_stride)) %
               kLine == 0;
  }
};

struct Simd {
  const char* name;

  // XXH3's long-input loop: take `stripes` stripes of 64 bytes into the eight accumulators. The
  // first of them is stripe number `at` of the input.
  void (*hash)(uint64_t* acc, const uint8_t* src, size_t stripes, size_t at, Fetch fetch);

  // The same, and copy what is hashed. For Store::streaming, `dst` is aligned to a line.
  void (*copy_hash)(uint64_t* acc, uint8_t* dst, const uint8_t* src, size_t stripes, size_t at,
                    Store store, Fetch fetch);

  // Copy past the caches, whatever the alignment.
  void (*stream)(uint8_t* dst, const uint8_t* src, size_t bytes, Fetch fetch);

  // Copy `groups` groups from rows to where they are contiguous, and back, and hash them as the
  // input's stripes from a multiple of 16 on. Without `acc`, they aren't hashed. Only rows that are
  // `in_lines()`. For Store::streaming, what is written is aligned to a line.
  void (*join)(uint64_t* acc, uint8_t* dst, const Rows& src, size_t groups, Store store,
               Fetch fetch);
  void (*split)(uint64_t* acc, const Rows& dst, const uint8_t* src, size_t groups, Store store,
                Fetch fetch);

  // Copy `rows` rows of `bytes` bytes. Strides in bytes.
  void (*copy_rows)(uint8_t* dst, size_t dst_stride, const uint8_t* src, size_t src_stride,
                    size_t rows, size_t bytes, Store store);

  // dst[c * dst_stride + r] = src[r * src_stride + c] for elements of 1, 2 and 4 bytes
  // (`transpose[0]`, `[1]`, `[2]`). Strides in elements.
  void (*transpose[3])(uint8_t* dst, size_t dst_stride, const uint8_t* src, size_t src_stride,
                       size_t rows, size_t cols);

  // The same for 2-byte elements, in tiles of 32 x 16, so that each line of `dst` is written at
  // once: to `dst` past the caches, and to `near` too, if that isn't null. Strides in bytes. Null
  // where registers are too small.
  void (*transpose_lines)(uint8_t* dst, uint8_t* near, size_t dst_stride, const uint8_t* src,
                          size_t src_stride, size_t rows, size_t cols, Fetch fetch);

  // Make streamed stores visible before any later store.
  void (*fence)();
};

extern const Simd simd_base;
#if defined(LMCACHE_X86)
extern const Simd simd_avx2;
extern const Simd simd_avx512;
#endif

// The best level that this CPU has, or the one called `name`; nullptr if it hasn't got that.
const Simd* simd(const char* name = nullptr);

}  // namespace lmcache
