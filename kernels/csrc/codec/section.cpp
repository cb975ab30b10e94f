#include "section.hpp"

#include <algorithm>

namespace lmcache::codec {

const uint8_t* Reader::take(size_t bytes) {
  if (bytes > left_) throw BadStream("a section is shorter than what it should hold");
  const uint8_t* taken = at_;
  at_ += bytes;
  left_ -= bytes;
  return taken;
}

bool Coder::prepare(const Job& job, const Block& block, Mode mode, const uint8_t* chunk) {
  job_ = &job;
  block_ = &block;
  mode_ = mode;
  flags_ = 0;
  first_ = 0;
  escapes_.clear();
  patches_.clear();
  // Positions and numbers of channels have 32 bits, and sums of 16-bit symbols must fit, too.
  if (block.channels > 65535 || block.rows * block.width > (size_t{1} << 30)) return false;
  switch (mode) {
    case Mode::values:
      return prepare_values(chunk);
    case Mode::lossless:
      return prepare_lossless(chunk);
    case Mode::int8:
    case Mode::e4m3:
      return prepare_bytes(chunk);
    case Mode::raw:
      break;
  }
  return false;
}

bool Coder::side_by_side(const Coder& other) const {
  if (mode_ != other.mode_ || stream.count != other.stream.count) return false;
  for (size_t i = 0; i < stream.count; ++i)
    if (stream.passes[i].rows != other.stream.passes[i].rows) return false;
  return true;
}

// One number for each token and head; none if steps aren't tokens'.
size_t Coder::step_rows() const {
  if (!(flags_ & kTokenSteps)) return 0;
  return (stream_rows() * block_->heads + kLanes - 1) / kLanes;
}

// The tokens' steps come first: 32 of them are a row. Then 32 channels at a time, token by token.
void Coder::lay_out_passes() {
  const size_t width = block_->width;
  uint8_t* symbols = symbols_.get(stream_rows() * width);
  passes_.clear();
  if (flags_ & kTokenSteps)
    passes_.push_back({step_symbols_.get(step_rows() * kLanes), step_rows(), kLanes,
                       step_tables_.data()});
  for (size_t g = 0; g < block_->passes(); ++g)
    passes_.push_back({symbols + g * kLanes, stream_rows(), width, tables_.data() + g * kLanes});
  stream.passes = passes_.data();
  stream.count = passes_.size();
}

void Coder::open_words() {
  const size_t most = step_rows() * kLanes + stream_rows() * block_->width;
  stream.words = words_.get(most + kSlack) + most + kSlack;
  stream.end = stream.words;
}

// States and words, with room behind them for what a decoder reads ahead.
void Coder::read_stream(const Section& section, Reader& reader) {
  const size_t bytes = size_t{section.words} * 2;
  uint16_t* words = words_.get(section.words + kPadding / 2);
  std::memcpy(words, reader.take(bytes), bytes);
  std::memset(words + section.words, 0, kPadding);
  stream.words = words;
  stream.end = words + section.words;
}

bool Coder::finish(uint8_t* to, Section& section) {
  section.words = has_stream() ? static_cast<uint32_t>(stream.end - stream.words) : 0;
  section.escapes = static_cast<uint32_t>(escapes_.size());
  section.patches = static_cast<uint32_t>(patches_.size());
  section.mode = static_cast<uint8_t>(mode_);
  section.flags = flags_;
  if (mode_ == Mode::values) return finish_values(to, section);
  if (mode_ == Mode::lossless) return finish_lossless(to, section);
  const size_t scales = block_->rows * block_->heads * 2, values = block_->rows * block_->channels;
  const size_t bytes = scales + values + patches_.size() * sizeof(Patch);
  if (bytes >= block_->bytes()) return false;
  std::memcpy(to, means16_.data(), scales);
  std::memcpy(to + scales, bytes_.get(values), values);
  if (!patches_.empty())
    std::memcpy(to + scales + values, patches_.data(), patches_.size() * sizeof(Patch));
  section.bytes = static_cast<uint32_t>(bytes);
  return true;
}

void Coder::parse(const Job& job, const Block& block, const Section& section,
                  const uint8_t* from) {
  job_ = &job;
  block_ = &block;
  mode_ = static_cast<Mode>(section.mode);
  flags_ = section.flags;
  first_ = 0;
  stream.count = 0;
  escape_count_ = section.escapes;
  patch_count_ = section.patches;
  if (section.reserved != 0) throw BadStream("a section has bits of a later format");
  // What a decoder makes must not be larger than the chunk that it was asked for allows.
  if (mode_ != Mode::raw &&
      (block.channels > 65535 || block.rows * block.width > (size_t{1} << 30) ||
       section.words > block.rows * (block.width + kLanes * block.heads) + kLanes))
    throw BadStream("a section is larger than its elements");
  const Reader reader(from, section.bytes);
  switch (mode_) {
    case Mode::raw:
      if (flags_ != 0 || section.words || section.escapes || section.patches ||
          section.bytes != block.bytes())
        throw BadStream("a raw section isn't as long as its elements");
      raw_row_ = from;
      return;
    case Mode::values:
      return parse_values(section, reader);
    case Mode::lossless:
      return parse_lossless(section, reader);
    case Mode::int8:
    case Mode::e4m3:
      return parse_bytes(section, reader);
  }
  throw BadStream("a section has a mode that this reader doesn't know");
}

void Coder::restore(uint8_t* chunk) {
  if (mode_ == Mode::values) return restore_values(chunk);
  if (mode_ == Mode::lossless) return restore_lossless(chunk);
  if (mode_ != Mode::raw) return restore_bytes(chunk);
  const size_t row = block_->row_bytes();
  for (size_t t = 0; t < block_->rows; ++t)
    std::memcpy(chunk + block_->offset + t * block_->stride, raw_row_ + t * row, row);
}

// Coded token t, whose symbols have no escapes among them.
void Coder::restore_row(const uint8_t* symbols, size_t t, uint8_t* chunk) const {
  const Block& b = *block_;
  Rotation turn = job_->rotation();
  if (!(flags_ & kRotated)) turn.pairs = 0;
  uint8_t* to = chunk + b.offset + (first_ + t) * b.stride;
  for (size_t h = 0, c = 0; h < b.heads; ++h, c += b.head_size)
    job_->codec.restore(job_->plan.shape.dtype, symbols + c, inverse_.data() + c, means_.data() + c,
                        flags_ & kTokenSteps ? by_[t * b.heads + h] : 1.0f, b.head_size, turn,
                        first_ + t, to + c * b.itemsize);
}

void Coder::apply_patches(uint8_t* chunk) const {
  for (size_t i = 0; i < patch_count_; ++i) {
    Patch patch;
    std::memcpy(&patch, patches_at_ + i * sizeof(Patch), sizeof(Patch));
    const size_t row = patch.position / block_->channels, c = patch.position % block_->channels;
    if (row >= block_->rows) throw BadStream("a patch lies outside of its section");
    std::memcpy(chunk + block_->offset + row * block_->stride + c * block_->itemsize, &patch.bits,
                block_->itemsize);
  }
}

// Where a stream's symbols are escapes, and what for: in order of passes, rows and lanes. `values_`
// are taken from `escapes_at_`. The answer is in order of rows.
std::vector<Coder::Escape> Coder::resolve(uint8_t escape, size_t taken) {
  std::vector<Escape> found;
  if (escape_count_ == taken) {
    for (size_t t = 0; t < stream_rows(); ++t)
      if (job_->codec.contains(symbols_.get(0) + t * block_->width, block_->width, escape))
        throw BadStream("a section has more escapes than it says");
    return found;
  }
  const size_t width = block_->width;
  const uint8_t* symbols = symbols_.get(0);
  std::vector<uint32_t> rows;
  for (size_t t = 0; t < stream_rows(); ++t)
    if (job_->codec.contains(symbols + t * width, width, escape))
      rows.push_back(static_cast<uint32_t>(t));
  found.reserve(escape_count_ - taken);
  for (size_t g = 0; g < block_->passes(); ++g)
    for (const uint32_t t : rows)
      for (size_t i = 0; i < kLanes; ++i) {
        const size_t c = g * kLanes + i;
        if (symbols[t * width + c] != escape) continue;
        if (taken == escape_count_) throw BadStream("a section has more escapes than it says");
        int16_t value;
        std::memcpy(&value, escapes_at_ + 2 * taken++, 2);
        found.push_back({t, static_cast<uint32_t>(c), value});
      }
  if (taken != escape_count_) throw BadStream("a section has fewer escapes than it says");
  std::stable_sort(found.begin(), found.end(),
                   [](const Escape& a, const Escape& b) { return a.row < b.row; });
  return found;
}

}  // namespace lmcache::codec
