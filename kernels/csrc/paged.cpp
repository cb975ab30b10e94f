#include "paged.hpp"

#include <algorithm>

#include "layer_mover.hpp"

namespace lmcache {
namespace {

// Below this many bytes a call's result is likely to be read from the cache soon, and a second
// thread takes longer to wake than it saves. Tuned with bench/block_copies.py.
constexpr int64_t kStreamFrom = 4 << 20;
constexpr int64_t kParallelFrom = 256 << 10;

// Most bytes of chunks that are verified before they are scattered, unless one alone is bigger: so
// much may still be in the last-level cache then.
constexpr int64_t kVerified = 8 << 20;

}  // namespace

void Transfer::gather(Pool& pool, uint64_t* sums) const {
  run(pool, sums, Way::gather, {0, spans.size(), nullptr, false});
}

void Transfer::scatter(Pool& pool, uint64_t* sums) const {
  run(pool, sums, Way::scatter, {0, spans.size(), nullptr, false});
}

std::vector<size_t> Transfer::scatter_good(Pool& pool,
                                           const std::vector<uint64_t>& expected) const {
  std::vector<uint64_t> sums(spans.size() * layers.size());
  std::vector<size_t> bad;
  for (size_t first = 0, last; first < spans.size(); first = last) {
    for (last = first + 1; last < spans.size() && bytes(first, last + 1) <= kVerified;) ++last;
    run(pool, sums.data(), Way::hash, {first, last, nullptr, false});
    for (size_t i = first; i < last; ++i)
      if (!is_good(sums.data() + i * layers.size(), expected[i])) bad.push_back(i);
    // What was read last is in the cache still, so that is what is moved first.
    run(pool, nullptr, Way::scatter, {first, last, &bad, true});
  }
  return bad;
}

std::vector<size_t> Transfer::bad(const uint64_t* sums,
                                  const std::vector<uint64_t>& expected) const {
  std::vector<size_t> bad;
  for (size_t i = 0; i < spans.size(); ++i)
    if (!is_good(sums + i * layers.size(), expected[i])) bad.push_back(i);
  return bad;
}

bool Transfer::is_good(const uint64_t* sums, uint64_t expected) const {
  const auto* bytes = reinterpret_cast<const uint8_t*>(sums);
  return xxh3_64(bytes, layers.size() * sizeof *sums, simd) == expected;
}

int64_t Transfer::bytes(size_t first, size_t last) const {
  int64_t tokens = 0;
  for (size_t i = first; i < last; ++i) tokens += spans[i].tokens;
  return layout.layer_bytes(tokens) * static_cast<int64_t>(layers.size());
}

void Transfer::run(Pool& pool, uint64_t* sums, Way way, const Part& part) const {
  const int64_t moved = bytes(part.first, part.last);
  const size_t tasks = (part.last - part.first) * layers.size();
  const Store store = moved >= kStreamFrom ? Store::streaming : Store::cached;
  const auto task = [&](size_t number) {
    const size_t i = part.first * layers.size() + (part.backwards ? tasks - 1 - number : number);
    const size_t span = i / layers.size();
    if (part.skip != nullptr &&
        std::find(part.skip->begin(), part.skip->end(), span) != part.skip->end())
      return;
    LayerMover mover(*this, spans[span], layers[i % layers.size()], sums != nullptr, store);
    const uint64_t sum = way == Way::gather    ? mover.gather()
                         : way == Way::scatter ? mover.scatter()
                                               : mover.hash();
    if (sums != nullptr) sums[i] = sum;
    // The threads' streamed stores must be seen before the pool says that the task is done.
    if (store == Store::streaming) simd.fence();
  };
  if (moved >= kParallelFrom) {
    pool.run(tasks, task);
  } else {
    for (size_t number = 0; number < tasks; ++number) task(number);
  }
}

}  // namespace lmcache
