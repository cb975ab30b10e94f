// Sections in a profile's basis: channels' numbers become components, and components are coded.
//
// Tokens go through the basis a tile at a time, column by column, so that each sum over channels is
// made in one order whatever the registers' width.
#include <algorithm>

#include "section.hpp"

namespace lmcache::codec {
namespace {

// Columns of `to` are rows of `from`: `rows` of `count` numbers, `stride` apart.
void turn_in(const float* from, size_t stride, size_t rows, size_t count, float* to) {
  for (size_t c = 0; c < count; ++c) {
    for (size_t t = 0; t < rows; ++t) to[c * kTile + t] = from[t * stride + c];
    std::fill(to + c * kTile + rows, to + (c + 1) * kTile, 0.0f);
  }
}

void turn_out(const float* from, size_t rows, size_t count, float* to, size_t stride) {
  for (size_t t = 0; t < rows; ++t)
    for (size_t c = 0; c < count; ++c) to[t * stride + c] = from[c * kTile + t];
}

}  // namespace

bool Coder::quantise_components() {
  const Block& b = *block_;
  const CodecSimd& codec = job_->codec;
  float* before = tile_.get(2 * b.channels * kTile);
  float* after = before + b.channels * kTile;
  std::vector<uint32_t> all(b.channels);
  for (size_t c = 0; c < b.channels; ++c) all[c] = static_cast<uint32_t>(c);
  const std::vector<float> nothing(b.channels, 0.0f), one(b.channels, 1.0f);
  int16_t* q = q_.get(stream_rows() * b.width);
  for (size_t first = 0; first < stream_rows(); first += kTile) {
    const size_t count = std::min(kTile, stream_rows() - first);
    float* rows = rows_ + (first_ + first) * b.width;
    for (size_t t = 0; t < count; ++t)
      for (size_t h = 0, c = 0; h < b.heads; ++h, c += b.head_size)
        codec.centre(rows + t * b.width + c, means_.data() + c, inverse_.data() + c,
                     flags_ & kTokenSteps ? by_[(first + t) * b.heads + h] : 1.0f, b.head_size);
    turn_in(rows, b.width, count, b.channels, before);
    codec.project(basis_, b.channels, 1, all.data(), b.channels, before, after, b.channels);
    turn_out(after, count, b.channels, rows, b.width);
    for (size_t t = 0; t < count; ++t, q += b.width) {
      if (!codec.quantise(rows + t * b.width, nothing.data(), one.data(), 1.0f, q, b.channels))
        return false;
      std::fill(q + b.channels, q + b.width, int16_t{0});
    }
  }
  return true;
}

void Coder::restore_components(const std::vector<Escape>& escapes, uint8_t* chunk) {
  const Block& b = *block_;
  const CodecSimd& codec = job_->codec;
  float* before = tile_.get(2 * b.channels * kTile);
  float* after = before + b.channels * kTile;
  float* rows = x_.get(kTile * b.width);
  const std::vector<float> nothing(b.channels, 0.0f), one(b.channels, 1.0f);
  // Table 0 has no symbol but for 0, and escapes. Adding what is 0 changes nothing.
  std::vector<uint8_t> some(b.width);
  for (size_t c = 0; c < b.channels; ++c) some[c] = tables_[c] != 0;
  for (const Escape& escape : escapes) some[escape.channel] = 1;
  std::vector<uint32_t> used;
  for (size_t c = 0; c < b.channels; ++c)
    if (some[c]) used.push_back(static_cast<uint32_t>(c));
  const uint8_t* symbols = symbols_.get(0);
  size_t next = 0;
  const Ahead ahead(b, chunk);
  for (size_t first = 0; first < stream_rows(); first += kTile) {
    const size_t count = std::min(kTile, stream_rows() - first);
    for (size_t t = 0; t < count; ++t, symbols += b.width) {
      codec.dequantise(symbols, one.data(), nothing.data(), 1.0f, rows + t * b.width, b.channels);
      for (; next < escapes.size() && escapes[next].row == first + t; ++next)
        if (escapes[next].channel < b.channels)
          rows[t * b.width + escapes[next].channel] = static_cast<float>(escapes[next].value);
    }
    turn_in(rows, b.width, count, b.channels, before);
    codec.project(basis_, 1, b.channels, used.data(), used.size(), before, after, b.channels);
    turn_out(after, count, b.channels, rows, b.width);
    for (size_t t = 0; t < count; ++t) {
      ahead.at(first_ + first + t);
      float* row = rows + t * b.width;
      for (size_t h = 0, c = 0; h < b.heads; ++h, c += b.head_size)
        codec.scale(row + c, inverse_.data() + c, means_.data() + c,
                    flags_ & kTokenSteps ? by_[(first + t) * b.heads + h] : 1.0f, b.head_size);
      finish_row(row, first + t, chunk);
    }
  }
}

}  // namespace lmcache::codec
