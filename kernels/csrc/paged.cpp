#include "paged.hpp"

#include "layer_mover.hpp"

namespace lmcache {
namespace {

// Below this many bytes a call's result is likely to be read from the cache soon, and a second
// thread takes longer to wake than it saves. Tuned with bench/block_copies.py.
constexpr int64_t kStreamFrom = 4 << 20;
constexpr int64_t kParallelFrom = 256 << 10;

}  // namespace

void Transfer::gather(Pool& pool, uint64_t* sums) const { run(pool, sums, Way::gather); }

void Transfer::scatter(Pool& pool, uint64_t* sums) const { run(pool, sums, Way::scatter); }

int64_t Transfer::bytes() const {
  int64_t tokens = 0;
  for (const Span& span : spans) tokens += span.tokens;
  return layout.layer_bytes(tokens) * static_cast<int64_t>(layers.size());
}

void Transfer::run(Pool& pool, uint64_t* sums, Way way) const {
  const int64_t moved = bytes();
  const size_t tasks = spans.size() * layers.size();
  const Store store = moved >= kStreamFrom ? Store::streaming : Store::cached;
  const auto task = [&](size_t i) {
    LayerMover mover(*this, spans[i / layers.size()], layers[i % layers.size()], sums != nullptr,
                     store);
    const uint64_t sum = way == Way::gather ? mover.gather() : mover.scatter();
    if (sums != nullptr) sums[i] = sum;
    // The threads' streamed stores must be seen before the pool says that the task is done.
    if (store == Store::streaming) simd.fence();
  };
  if (moved >= kParallelFrom) {
    pool.run(tasks, task);
  } else {
    for (size_t i = 0; i < tasks; ++i) task(i);
  }
}

void hash_pieces(Pool& pool, const Simd& simd, const uint8_t* data, size_t piece_bytes,
                 size_t pieces, uint64_t* sums) {
  const auto task = [&](size_t i) {
    sums[i] = xxh3_64(data + i * piece_bytes, piece_bytes, simd);
  };
  if (static_cast<int64_t>(pieces * piece_bytes) >= kParallelFrom) {
    pool.run(pieces, task);
  } else {
    for (size_t i = 0; i < pieces; ++i) task(i);
  }
}

}  // namespace lmcache
