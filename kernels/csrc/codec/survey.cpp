// What a chunk's sections must agree on.
#include <algorithm>
#include <cmath>

#include "section.hpp"

namespace lmcache::codec {
namespace {

constexpr size_t kSample = 32;  // tokens that a survey looks at

}  // namespace

Survey::Survey(uint32_t layers) : key_rms(layers), drained(layers) {}

// What a layer's sections must agree on, from tokens spread over the chunk.
void Survey::look(const Job& job, uint32_t layer, const uint8_t* chunk) {
  const Shape& shape = job.plan.shape;
  const size_t channels = size_t{shape.heads} * shape.head_size, rows = shape.tokens;
  const size_t sample = std::min(kSample, rows);
  std::vector<float> row(channels), sums(channels), squares(channels);
  const uint8_t* plane = chunk + layer * shape.layer_bytes();
  if (shape.planes == 2) {
    for (size_t i = 0; i < sample; ++i) {
      const size_t t = (i + 1) * rows / sample - 1;
      job.codec.widen(shape.dtype, plane + t * shape.row_bytes(), row.data(), channels);
      if (job.plan.pairs != 0)
        job.codec.rotate(row.data(), shape.heads, shape.head_size, job.rotation(), t, true);
      for (size_t c = 0; c < channels; ++c) {
        sums[c] += row[c];
        squares[c] += row[c] * row[c];
      }
    }
    const float count = static_cast<float>(sample);
    float variance = 0;
    for (size_t c = 0; c < channels; ++c) {
      const float mean = sums[c] / count;
      variance += std::max(squares[c] / count - mean * mean, 0.0f);
    }
    key_rms[layer] = std::sqrt(variance / static_cast<float>(channels));
  }
  plane += (shape.planes - 1) * rows * shape.row_bytes();
  const auto energy = [&](size_t t) {
    job.codec.widen(shape.dtype, plane + t * shape.row_bytes(), row.data(), channels);
    return job.codec.energy(row.data(), channels);
  };
  float others = 0;
  for (size_t i = 0; i < sample; ++i) others += energy((i + 1) * rows / sample - 1);
  drained[layer] = 4 * energy(0) < others / static_cast<float>(sample);
}

// The first token of a sequence draws attention that means nothing (arXiv 2309.17453), and so has
// small values nearly everywhere. Whatever is wrong with it weighs heavily: it is stored as it is.
void Survey::conclude(int wish) {
  const auto many = std::count(drained.begin(), drained.end(), uint8_t{1});
  first_raw = wish >= 0 ? wish == 1 : 2 * static_cast<size_t>(many) >= drained.size();
}

}  // namespace lmcache::codec
