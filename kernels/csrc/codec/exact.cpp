// Sections without loss, and sections of 8 bits a value.
#include <algorithm>

#include "choice.hpp"
#include "section.hpp"

namespace lmcache::codec {
namespace {

constexpr uint8_t kEscape = 15;

// Bytes of the sign and the mantissa's upper bits of a row of binary16: three planes of bits.
size_t high_bytes(DType dtype, size_t channels) {
  return dtype == DType::f16 ? 3 * ((channels + 7) / 8) : 0;
}

}  // namespace

// Exponents vary little within a channel, mantissas are noise: the one is coded, the others are
// stored (as in ZipNN, arXiv 2411.05239, but channel by channel).
bool Coder::prepare_lossless(const uint8_t* chunk) {
  const Block& b = *block_;
  const DType dtype = job_->plan.shape.dtype;
  if (b.itemsize != 2 || b.rows > 65536) return false;
  const size_t high = high_bytes(dtype, b.channels), each = b.channels + high;
  uint8_t* exponents = exponents_.get(b.rows * b.width);
  uint8_t* planes = bytes_.get(b.rows * each);
  references_.assign(b.width, 0);
  std::vector<uint16_t> row(b.channels);
  const Ahead ahead(b, chunk);
  for (size_t t = 0; t < b.rows; ++t) {
    ahead.at(t);
    uint8_t* here = exponents + t * b.width;
    std::memcpy(row.data(), chunk + b.offset + t * b.stride, b.row_bytes());
    job_->codec.split(dtype, row.data(), here, planes + t * b.channels,
                      planes + b.rows * b.channels + t * high, b.channels);
    std::fill(here + b.channels, here + b.width, uint8_t{0});
    for (size_t c = 0; c < b.width; ++c) references_[c] = std::max(references_[c], here[c]);
  }
  tables_.resize(b.width);
  lay_out_passes();
  uint8_t* symbols = symbols_.get(0);
  std::vector<uint32_t> rows;
  for (size_t t = 0; t < b.rows; ++t)
    if (job_->codec.below(exponents + t * b.width, references_.data(), symbols + t * b.width,
                          b.width))
      rows.push_back(static_cast<uint32_t>(t));
  for (size_t g = 0; g < b.width; g += kLanes)
    for (const uint32_t t : rows)
      for (size_t c = g; c < g + kLanes; ++c)
        if (symbols[t * b.width + c] == kEscape)
          escapes_.push_back(static_cast<int16_t>(exponents[t * b.width + c]));
  counts_.assign(b.width * 16, 0);
  for (size_t t = 0; t < b.rows; ++t)
    for (size_t c = 0; c < b.width; ++c) ++counts_[c * 16 + symbols[t * b.width + c]];
  for (size_t c = 0; c < b.width; ++c)
    tables_[c] = static_cast<uint8_t>(
        kValueTables + job_->codec.cheapest(counts_.data() + c * 16, exponent_costs()));
  open_words();
  return true;
}

bool Coder::finish_lossless(uint8_t* to, Section& section) {
  const Block& b = *block_;
  const size_t planes =
      b.rows * (b.channels + high_bytes(job_->plan.shape.dtype, b.channels));
  const size_t words = size_t{section.words} * 2, escapes = escapes_.size() * 2;
  const size_t bytes = sizeof(stream.states) + 2 * b.channels + escapes + words + planes;
  if (bytes >= b.bytes()) return false;
  section.bytes = static_cast<uint32_t>(bytes);
  const auto put = [&to](const void* from, size_t count) {
    if (count != 0) std::memcpy(to, from, count);
    to += count;
  };
  put(stream.states, sizeof(stream.states));
  put(references_.data(), b.channels);
  for (size_t c = 0; c < b.channels; ++c) *to++ = static_cast<uint8_t>(tables_[c] - kValueTables);
  put(escapes_.data(), escapes);
  put(stream.words, words);
  put(bytes_.get(0), planes);
  return true;
}

void Coder::parse_lossless(const Section& section, Reader reader) {
  const Block& b = *block_;
  const DType dtype = job_->plan.shape.dtype;
  if (flags_ != 0 || patch_count_ != 0 || b.itemsize != 2)
    throw BadStream("a section without loss has flags, patches or elements that it can't have");
  std::memcpy(stream.states, reader.take(sizeof(stream.states)), sizeof(stream.states));
  const uint8_t* references = reader.take(b.channels);
  references_.assign(b.width, 0);
  std::copy(references, references + b.channels, references_.begin());
  const uint8_t* ids = reader.take(b.channels);
  // Channels that aren't there have the exponent 0, whose cheapest table is that of no symbol.
  const uint32_t none[16] = {1};
  tables_.assign(b.width, static_cast<uint8_t>(
                              kValueTables + job_->codec.cheapest(none, exponent_costs())));
  for (size_t c = 0; c < b.channels; ++c) {
    if (ids[c] >= kExponentTables) throw BadStream("a section names a table that isn't there");
    tables_[c] = static_cast<uint8_t>(kValueTables + ids[c]);
  }
  escapes_at_ = reader.take(escape_count_ * 2);
  read_stream(section, reader);
  planes_ = reader.take(b.rows * (b.channels + high_bytes(dtype, b.channels)));
  if (reader.left() != 0) throw BadStream("a section is longer than what it holds");
  lay_out_passes();
}

void Coder::restore_lossless(uint8_t* chunk) {
  const Block& b = *block_;
  const DType dtype = job_->plan.shape.dtype;
  const size_t high = high_bytes(dtype, b.channels);
  const std::vector<Escape> escapes = resolve(kEscape, 0);
  uint8_t* symbols = symbols_.get(0);
  // As a symbol, an escape is what its exponent lies below the reference.
  for (const Escape& escape : escapes)
    symbols[escape.row * b.width + escape.channel] =
        static_cast<uint8_t>(references_[escape.channel] - escape.value);
  std::vector<uint16_t> row(b.channels);
  const Ahead ahead(b, chunk);
  for (size_t t = 0; t < b.rows; ++t) {
    ahead.at(t);
    job_->codec.join(dtype, symbols + t * b.width, references_.data(), planes_ + t * b.channels,
                     planes_ + b.rows * b.channels + t * high, row.data(), b.channels);
    std::memcpy(chunk + b.offset + t * b.stride, row.data(), b.row_bytes());
  }
}

bool Coder::prepare_bytes(const uint8_t* chunk) {
  const Block& b = *block_;
  if (job_->plan.shape.dtype == DType::u8 || !widen_rows(chunk)) return false;
  uint8_t* to = bytes_.get(b.rows * b.channels);
  means16_.resize(b.rows * b.heads);
  const float most = mode_ == Mode::int8 ? 127.0f : 448.0f;
  const auto convert = mode_ == Mode::int8 ? job_->codec.to_int8 : job_->codec.to_e4m3;
  for (size_t t = 0; t < b.rows; ++t)
    for (size_t h = 0; h < b.heads; ++h, to += b.head_size) {
      const float* values = rows_ + t * b.width + h * b.head_size;
      // Rounded up to bf16, so that the largest fits. Below 2^-120 everything is 0.
      const float exact = job_->codec.largest(values, b.head_size) / most;
      uint32_t u;
      std::memcpy(&u, &exact, 4);
      u = (u + 0xFFFF) & 0xFFFF0000;
      float scale;
      std::memcpy(&scale, &u, 4);
      if (!(scale > 7.6e-37f)) scale = 0, u = 0;
      means16_[t * b.heads + h] = static_cast<uint16_t>(u >> 16);
      convert(values, scale > 0 ? 1.0f / scale : 0.0f, to, b.head_size);
    }
  return true;
}

void Coder::parse_bytes(const Section& section, Reader reader) {
  const Block& b = *block_;
  if (flags_ != 0 || section.words != 0 || escape_count_ != 0 ||
      job_->plan.shape.dtype == DType::u8)
    throw BadStream("a section of 8-bit values has flags, words or elements that it can't have");
  scales_ = reader.take(b.rows * b.heads * 2);
  planes_ = reader.take(b.rows * b.channels);
  patches_at_ = reader.take(patch_count_ * sizeof(Patch));
  if (reader.left() != 0) throw BadStream("a section is longer than what it holds");
}

void Coder::restore_bytes(uint8_t* chunk) {
  const Block& b = *block_;
  const auto convert = mode_ == Mode::int8 ? job_->codec.from_int8 : job_->codec.from_e4m3;
  float* values = x_.get(b.width);
  const uint8_t* from = planes_;
  const Ahead ahead(b, chunk);
  for (size_t t = 0; t < b.rows; ++t) {
    ahead.at(t);
    for (size_t h = 0; h < b.heads; ++h, from += b.head_size) {
      uint32_t u = 0;
      std::memcpy(&u, scales_ + 2 * (t * b.heads + h), 2);
      u <<= 16;
      float scale;
      std::memcpy(&scale, &u, 4);
      convert(from, scale, values + h * b.head_size, b.head_size);
    }
    job_->codec.narrow(job_->plan.shape.dtype, values, chunk + b.offset + t * b.stride,
                       b.channels);
  }
  apply_patches(chunk);
}

}  // namespace lmcache::codec
