// Sections of quantised values: steps, means, symbols, escapes.
#include <algorithm>
#include <cmath>

#include "choice.hpp"
#include "section.hpp"

namespace lmcache::codec {
namespace {

// 2^-60 and 2^60: steps that are trusted, and means. With levels of at most 2^30 nothing overflows,
// and so nothing becomes a NaN, of which instruction sets, and compilers, choose the sign.
constexpr float kLeast = 0x1p-60f, kMost = 0x1p60f;
constexpr int kLevels = 120;                           // of token steps, either way: 2^30
constexpr int kFiner = 24, kCoarser = 12;              // than the middle one: by 2^6 and 2^3

constexpr float kFinest = 0.25f, kCoarsest = 4.0f;     // a head's step, by what it would be alone

uint32_t bits(float value) {
  uint32_t u;
  std::memcpy(&u, &value, 4);
  return u;
}

float number(uint32_t u) {
  float value;
  std::memcpy(&value, &u, 4);
  return value;
}

uint16_t to_bf16(float value) {
  const uint32_t u = bits(value);
  return static_cast<uint16_t>((u + 0x7FFF + (u >> 16 & 1)) >> 16);
}

// 2^(level / 4).
float power(int level) {
  static constexpr uint32_t quarters[4] = {0x3F800000, 0x3F9837F0, 0x3FB504F3, 0x3FD744FD};
  const int whole = (level + 4 * kLevels) / 4 - kLevels;
  return number(quarters[(level + 4 * kLevels) % 4] + static_cast<uint32_t>(whole) * (1u << 23));
}

// The level nearest to the root of `square`, by comparing its bits: 2 log2(square), rounded.
int level_of(float square) {
  const uint32_t u = bits(square), mantissa = u & 0x7FFFFF;
  const int exponent = static_cast<int>(u >> 23 & 0xFF) - 127;
  return 2 * exponent + (mantissa >= 0x1837F0) + (mantissa >= 0x5744FD);
}

bool trusted(float step) { return step >= kLeast && step <= kMost; }

}  // namespace

// Elements as numbers. What isn't finite is 0 here, and a patch.
bool Coder::widen_rows(const uint8_t* chunk) {
  const Block& b = *block_;
  rows_ = x_.get(b.rows * b.width);
  const Ahead ahead(b, chunk);
  for (size_t t = 0; t < b.rows; ++t) {
    ahead.at(t);
    float* row = rows_ + t * b.width;
    const uint8_t* source = chunk + b.offset + t * b.stride;
    std::fill(row + b.channels, row + b.width, 0.0f);
    if (!job_->codec.widen(job_->plan.shape.dtype, source, row, b.channels)) continue;
    const uint32_t exponent = job_->plan.shape.dtype == DType::bf16  ? 0x7F80
                              : job_->plan.shape.dtype == DType::f16 ? 0x7C00
                                                                     : 0x7F800000;
    for (size_t c = 0; c < b.channels; ++c) {
      uint32_t element = 0;
      std::memcpy(&element, source + c * b.itemsize, b.itemsize);
      if ((element & exponent) == exponent)
        patches_.push_back({static_cast<uint32_t>(t * b.channels + c), element});
    }
    if (patches_.size() > b.rows * b.channels / 32) return false;
  }
  return true;
}

// A step for each head: the layer's share, but neither too coarse nor too fine for the head. Or a
// profile's for each channel.
bool Coder::key_steps() {
  const Block& b = *block_;
  if (flags_ & kProfileSteps) {
    const float* from = job_->profile->steps.data() +
                        (size_t{b.layer} * job_->plan.shape.heads + b.first_head) * b.head_size;
    for (size_t c = 0; c < b.channels; ++c) {
      inverse_[c] = from[c] * job_->options->key_step;
      if (!trusted(inverse_[c])) return false;
    }
  } else {
    const float count = static_cast<float>(stream_rows());
    for (size_t h = 0; h < b.heads; ++h) {
      float variance = 0;
      for (size_t c = h * b.head_size; c < (h + 1) * b.head_size; ++c) {
        const float mean = sums_[c] / count;
        variance += std::max(squares_[c] / count - mean * mean, 0.0f);
      }
      variance /= static_cast<float>(b.head_size);
      const float own = job_->options->key_step * std::sqrt(variance);
      const float layer = job_->options->key_step * job_->survey->key_rms[b.layer];
      float step = std::min(std::max(layer, own * kFinest), own * kCoarsest);
      if (variance == 0) step = 1.0f;
      if (!trusted(step)) return false;
      steps_.push_back(step);
      std::fill_n(inverse_.begin() + static_cast<ptrdiff_t>(h * b.head_size), b.head_size, step);
    }
  }
  for (size_t c = 0; c < b.channels; ++c) inverse_[c] = 1.0f / inverse_[c];
  return true;
}

// A step for each token and head: the same share of its size, to a quarter of a power of two.
bool Coder::token_steps() {
  const Block& b = *block_;
  const size_t count = stream_rows() * b.heads;
  energies_.resize(count);
  by_.resize(count);
  for (size_t t = 0; t < stream_rows(); ++t)
    for (size_t h = 0; h < b.heads; ++h)
      energies_[t * b.heads + h] =
          job_->codec.energy(rows_ + (first_ + t) * b.width + h * b.head_size, b.head_size) /
          static_cast<float>(b.head_size);
  int16_t* levels = step_q_.get(step_rows() * kLanes);
  centres_.clear();
  for (size_t h = 0; h < b.heads; ++h) {
    float mean = 0;
    for (size_t t = 0; t < stream_rows(); ++t) mean += energies_[t * b.heads + h];
    const int centre = level_of(mean / static_cast<float>(stream_rows()));
    if (!(mean < kMost) || centre > kLevels - kCoarser) return false;
    centres_.push_back(static_cast<int8_t>(std::max(centre, kFiner - kLevels)));
  }
  for (size_t i = 0; i < count; ++i) {
    const int centre = centres_[i % b.heads];
    const int level = std::clamp(level_of(energies_[i]) - centre, -kFiner, kCoarser);
    levels[i] = static_cast<int16_t>(level);
    by_[i] = 1.0f / power(centre + level);
  }
  std::fill(levels + count, levels + step_rows() * kLanes, int16_t{0});
  const Profile* profile = job_->profile;
  const bool gain = (flags_ & kProfileMeans) && !profile->value_gains.empty();
  const float step = job_->options->value_step * (gain ? profile->value_gains[b.layer] : 1.0f);
  if (!trusted(step)) return false;
  steps_.assign(b.heads, step);
  std::fill_n(inverse_.begin(), b.channels, 1.0f / step);
  return true;
}

bool Coder::quantise_rows() {
  const Block& b = *block_;
  int16_t* q = q_.get(stream_rows() * b.width);
  for (size_t t = 0; t < stream_rows(); ++t, q += b.width) {
    const float* row = rows_ + (first_ + t) * b.width;
    bool fits = true;
    if (flags_ & kTokenSteps)
      for (size_t h = 0, c = 0; h < b.heads; ++h, c += b.head_size)
        fits &= job_->codec.quantise(row + c, means_.data() + c, inverse_.data() + c,
                                     by_[t * b.heads + h], q + c, b.head_size);
    else
      fits = job_->codec.quantise(row, means_.data(), inverse_.data(), 1.0f, q, b.channels);
    if (!fits) return false;
    std::fill(q + b.channels, q + b.width, int16_t{0});
  }
  return true;
}

void Coder::choose_tables() {
  const Block& b = *block_;
  counts_.resize(b.width);
  tables_.resize(b.width);
  radius_.resize(b.width);
  job_->codec.magnitudes(q_.get(0), stream_rows(), b.width, counts_.data());
  for (size_t c = 0; c < b.width; ++c) {
    tables_[c] = value_table(counts_[c], stream_rows());
    radius_[c] = value_radius(tables_[c]);
  }
  if (!(flags_ & kTokenSteps)) return;
  uint32_t sums[kLanes];
  job_->codec.magnitudes(step_q_.get(0), step_rows(), kLanes, sums);
  uint64_t total = 0;
  for (const uint32_t sum : sums) total += sum;
  step_tables_.assign(kLanes, value_table(total, stream_rows() * b.heads));
}

// Symbols, and in the order of coding what none stands for.
void Coder::collect_escapes() {
  const Block& b = *block_;
  if (flags_ & kTokenSteps) {
    const std::vector<uint8_t> radius(kLanes, value_radius(step_tables_[0]));
    const int16_t* q = step_q_.get(0);
    uint8_t* to = step_symbols_.get(0);
    for (size_t row = 0; row < step_rows(); ++row, q += kLanes, to += kLanes)
      if (job_->codec.symbols(q, radius.data(), to, kLanes))
        for (size_t i = 0; i < kLanes; ++i)
          if (to[i] == 0) escapes_.push_back(q[i]);
  }
  const int16_t* q = q_.get(0);
  uint8_t* to = symbols_.get(0);
  std::vector<uint32_t> rows;
  for (size_t t = 0; t < stream_rows(); ++t)
    if (job_->codec.symbols(q + t * b.width, radius_.data(), to + t * b.width, b.width))
      rows.push_back(static_cast<uint32_t>(t));
  for (size_t g = 0; g < b.width; g += kLanes)
    for (const uint32_t t : rows)
      for (size_t c = g; c < g + kLanes; ++c)
        if (to[t * b.width + c] == 0) escapes_.push_back(q[t * b.width + c]);
}

// What is taken from a profile. A basis of keys is of absolute positions.
void Coder::choose_profile() {
  const Profile* profile = job_->profile;
  if (profile == nullptr || job_->plan.shape.planes != 2) return;
  const bool keys = block_->keys, placed = job_->options->start.has_value() && (flags_ & kRotated);
  flags_ |= keys ? kProfileSteps : kProfileMeans;
  if (profile->basis_heads == 0 || (keys && !placed)) return;
  flags_ |= kBasis | kProfileMeans;
  basis_ = profile->basis(keys, job_->plan.shape, block_->layer, block_->number);
}

// A profile's means of this section's channels.
const uint16_t* Coder::known_means() const {
  const Block& b = *block_;
  const auto& means = b.keys ? job_->profile->key_means : job_->profile->means;
  return means.data() + (size_t{b.layer} * job_->plan.shape.heads + b.first_head) * b.head_size;
}

bool Coder::prepare_values(const uint8_t* chunk) {
  const Block& b = *block_;
  if (job_->plan.shape.dtype == DType::u8 || !widen_rows(chunk)) return false;
  if (b.keys && job_->plan.pairs != 0) {
    flags_ |= kRotated;
    const Rotation rotation = job_->rotation();
    for (size_t t = 0; t < b.rows; ++t)
      job_->codec.rotate(rows_ + t * b.width, b.heads, b.head_size, rotation, t, true);
  }
  if (!b.keys) flags_ |= kTokenSteps;
  choose_profile();
  for (auto* each : {&sums_, &squares_, &means_, &inverse_}) each->resize(b.width);
  means16_.resize(b.channels);
  job_->codec.columns(rows_, b.rows, b.width, sums_.data(), squares_.data());
  if (b.rows > 1 && job_->survey->first_raw) {
    flags_ |= kFirstRaw;
    first_ = 1;
    raw_row_ = chunk + b.offset;
    job_->codec.columns(rows_ + b.width, b.rows - 1, b.width, sums_.data(), squares_.data());
  }
  const uint16_t* known = flags_ & kProfileMeans ? known_means() : nullptr;
  for (size_t c = 0; c < b.channels; ++c) {
    means16_[c] = known ? known[c] : to_bf16(sums_[c] / static_cast<float>(stream_rows()));
    means_[c] = number(static_cast<uint32_t>(means16_[c]) << 16);
    if (!(std::fabs(means_[c]) < kMost)) return false;
  }
  steps_.clear();
  if (!(b.keys ? key_steps() : token_steps())) return false;
  if (!(flags_ & kBasis ? quantise_components() : quantise_rows())) return false;
  choose_tables();
  lay_out_passes();
  collect_escapes();
  open_words();
  return true;
}

bool Coder::finish_values(uint8_t* to, Section& section) {
  const Block& b = *block_;
  struct Part {
    const void* from;
    size_t bytes;
  };
  const bool scaled = flags_ & kTokenSteps;
  const Part parts[] = {
      {stream.states, sizeof(stream.states)},
      {steps_.data(), flags_ & kProfileSteps ? 0 : b.heads * sizeof(float)},
      {means16_.data(), flags_ & kProfileMeans ? 0 : b.channels * 2},
      {tables_.data(), b.channels},
      {centres_.data(), scaled ? b.heads : 0},
      {step_tables_.data(), scaled ? size_t{1} : 0},
      {raw_row_, first_ * b.row_bytes()},
      {escapes_.data(), escapes_.size() * 2},
      {patches_.data(), patches_.size() * sizeof(Patch)},
      {stream.words, size_t{section.words} * 2},
  };
  size_t bytes = 0;
  for (const Part& part : parts) bytes += part.bytes;
  if (bytes >= b.bytes()) return false;
  section.bytes = static_cast<uint32_t>(bytes);
  for (const Part& part : parts) {
    if (part.bytes != 0) std::memcpy(to, part.from, part.bytes);
    to += part.bytes;
  }
  return true;
}

void Coder::parse_values(const Section& section, Reader reader) {
  const Block& b = *block_;
  const DType dtype = job_->plan.shape.dtype;
  if ((flags_ & ~kSectionFlags) || dtype == DType::u8)
    throw BadStream("a section of values has flags or elements that it can't have");
  const Profile* profile = job_->profile;
  if ((flags_ & (kProfileSteps | kProfileMeans | kBasis)) && profile == nullptr)
    throw BadStream("a section needs a profile");
  if ((flags_ & kProfileMeans) && b.keys && profile->key_means.empty())
    throw BadStream("a section needs means of keys, which its profile hasn't got");
  if (flags_ & kBasis) {
    if (profile->basis_heads != job_->plan.block_heads)
      throw BadStream("a section has other heads than its profile's basis");
    basis_ = profile->basis(b.keys, job_->plan.shape, b.layer, b.number);
  }
  if ((flags_ & kRotated) && job_->plan.pairs == 0)
    throw BadStream("a section was turned, but the angles aren't there");
  if ((flags_ & kFirstRaw) && b.rows < 2) throw BadStream("a section has no tokens left");
  first_ = flags_ & kFirstRaw ? 1 : 0;
  for (auto* each : {&means_, &inverse_}) each->assign(b.width, 0.0f);
  std::memcpy(stream.states, reader.take(sizeof(stream.states)), sizeof(stream.states));
  const size_t known = (size_t{b.layer} * job_->plan.shape.heads + b.first_head) * b.head_size;
  if (flags_ & kProfileSteps) {
    for (size_t c = 0; c < b.channels; ++c)
      inverse_[c] = profile->steps[known + c] * job_->options->key_step;
  } else {
    const uint8_t* from = reader.take(b.heads * sizeof(float));
    for (size_t c = 0; c < b.channels; ++c)
      std::memcpy(&inverse_[c], from + c / b.head_size * sizeof(float), sizeof(float));
  }
  for (size_t c = 0; c < b.channels; ++c)
    if (!trusted(inverse_[c])) throw BadStream("a section's steps are out of range");
  const uint8_t* means = flags_ & kProfileMeans
                             ? reinterpret_cast<const uint8_t*>(known_means())
                             : reader.take(b.channels * 2);
  for (size_t c = 0; c < b.channels; ++c) {
    uint16_t mean;
    std::memcpy(&mean, means + 2 * c, 2);
    means_[c] = number(static_cast<uint32_t>(mean) << 16);
    if (!(std::fabs(means_[c]) < kMost)) throw BadStream("a section's means are out of range");
  }
  const auto valid = [](uint8_t table) {
    if (table >= kValueTables) throw BadStream("a section names a table that isn't there");
    return table;
  };
  const uint8_t* ids = reader.take(b.channels);
  tables_.assign(b.width, 0);
  for (size_t c = 0; c < b.channels; ++c) tables_[c] = valid(ids[c]);
  if (flags_ & kTokenSteps) {
    const auto* centres = reinterpret_cast<const int8_t*>(reader.take(b.heads));
    centres_.assign(centres, centres + b.heads);
    step_tables_.assign(kLanes, valid(*reader.take(1)));
  }
  raw_row_ = reader.take(first_ * b.row_bytes());
  escapes_at_ = reader.take(escape_count_ * 2);
  patches_at_ = reader.take(patch_count_ * sizeof(Patch));
  read_stream(section, reader);
  if (reader.left() != 0) throw BadStream("a section is longer than what it holds");
  lay_out_passes();
}

// The steps of tokens' heads. How many escapes they took.
size_t Coder::read_token_steps() {
  if (!(flags_ & kTokenSteps)) return 0;
  const uint8_t* symbols = step_symbols_.get(0);
  const size_t heads = block_->heads, count = stream_rows() * heads;
  size_t taken = 0;
  by_.resize(step_rows() * kLanes);
  for (size_t i = 0; i < by_.size(); ++i) {
    int16_t level = static_cast<int16_t>(symbols[i] - 64);
    if (symbols[i] == 0) {
      if (taken == escape_count_) throw BadStream("a section has more escapes than it says");
      std::memcpy(&level, escapes_at_ + 2 * taken++, 2);
    }
    if (i >= count) continue;
    const int sum = centres_[i % heads] + level;
    if (sum < -kLevels || sum > kLevels) throw BadStream("a token's step is out of range");
    by_[i] = power(sum);
  }
  return taken;
}

void Coder::restore_values(uint8_t* chunk) {
  const Block& b = *block_;
  const CodecSimd& codec = job_->codec;
  const std::vector<Escape> escapes = resolve(0, read_token_steps());
  if (first_ != 0) std::memcpy(chunk + b.offset, raw_row_, b.row_bytes());
  if (flags_ & kBasis) {
    restore_components(escapes, chunk);
    return apply_patches(chunk);
  }
  const uint8_t* symbols = symbols_.get(0);
  float* values = x_.get(b.width);
  size_t next = 0;
  const Ahead ahead(b, chunk);
  const bool plain = b.itemsize == 2 && !((flags_ & kRotated) && job_->interleaved);
  for (size_t t = 0; t < stream_rows(); ++t, symbols += b.width) {
    ahead.at(first_ + t);
    if (plain && (next == escapes.size() || escapes[next].row != t)) {
      restore_row(symbols, t, chunk);
      continue;
    }
    if (flags_ & kTokenSteps)
      for (size_t h = 0, c = 0; h < b.heads; ++h, c += b.head_size)
        codec.dequantise(symbols + c, inverse_.data() + c, means_.data() + c,
                         by_[t * b.heads + h], values + c, b.head_size);
    else
      codec.dequantise(symbols, inverse_.data(), means_.data(), 1.0f, values, b.channels);
    for (; next < escapes.size() && escapes[next].row == t; ++next) {
      const size_t c = escapes[next].channel;
      if (c >= b.channels) continue;
      const float by = flags_ & kTokenSteps ? by_[t * b.heads + c / b.head_size] : 1.0f;
      values[c] = static_cast<float>(escapes[next].value) * (inverse_[c] * by) + means_[c];
    }
    finish_row(values, t, chunk);
  }
  apply_patches(chunk);
}

// Turn coded token t's values, and write them.
void Coder::finish_row(float* values, size_t t, uint8_t* chunk) const {
  const Block& b = *block_;
  if (flags_ & kRotated)
    job_->codec.rotate(values, b.heads, b.head_size, job_->rotation(), first_ + t, false);
  job_->codec.narrow(job_->plan.shape.dtype, values, chunk + b.offset + (first_ + t) * b.stride,
                     b.channels);
}

}  // namespace lmcache::codec
