// One section at a time: the heads of one layer and plane that share a stream.
//
// Coding goes in two halves, with rANS between them, so that two sections' streams can be coded
// side by side. Scratch memory belongs to a thread and is used again.
#pragma once

#include <memory>

#include "format.hpp"

namespace lmcache::codec {

struct Survey;

struct Job {
  const CodecSimd& codec;
  const Plan& plan;
  const Options* options;  // when encoding
  const Profile* profile;
  const Angles& angles;
  bool interleaved;
  const Survey* survey;  // when encoding values

  Rotation rotation() const {
    return {angles.cosines.data(), angles.sines.data(), plan.pairs, interleaved};
  }
};

// What is found out about a chunk before its sections are encoded.
struct Survey {
  std::vector<float> key_rms;   // of each layer, around its channels' means
  std::vector<uint8_t> drained;  // layers in which the first token's values are much smaller
  bool first_raw = false;

  explicit Survey(uint32_t layers);
  void look(const Job& job, uint32_t layer, const uint8_t* chunk);
  void conclude(int wish);
};

// Memory that keeps its size, and isn't cleared.
template <class T>
class Room {
 public:
  T* get(size_t count) {
    if (count > size_) {
      memory_.reset();
      size_ = 0;
      memory_.reset(new T[count]);
      size_ = count;
    }
    return memory_.get();
  }

 private:
  std::unique_ptr<T[]> memory_;
  size_t size_ = 0;
};

// Asks memory for a section's rows some time before they are read or written: they lie too far apart
// for a CPU to foresee.
class Ahead {
 public:
  Ahead(const Block& block, const uint8_t* chunk) : block_(block), rows_(chunk + block.offset) {
    for (size_t t = 0; t < kRows; ++t) fetch(t);
  }
  void at(size_t t) const { fetch(t + kRows); }

 private:
  static constexpr size_t kRows = 8, kLine = 64;
  void fetch(size_t t) const {
    if (t >= block_.rows) return;
    const uint8_t* row = rows_ + t * block_.stride;
    for (size_t i = 0; i < block_.row_bytes(); i += kLine) __builtin_prefetch(row + i);
  }

  const Block& block_;
  const uint8_t* rows_;
};

// What reads a section's bytes in order, and never beyond them.
class Reader {
 public:
  Reader(const uint8_t* at, size_t bytes) : at_(at), left_(bytes) {}
  const uint8_t* take(size_t bytes);
  size_t left() const { return left_; }

 private:
  const uint8_t* at_;
  size_t left_;
};

class Coder {
 public:
  // Make symbols of a section of `chunk`. False: it has to be stored raw.
  bool prepare(const Job& job, const Block& block, Mode mode, const uint8_t* chunk);
  // Write the section, once `stream` is encoded. False: raw is shorter.
  bool finish(uint8_t* to, Section& section);

  // Check a section and find its parts. Throws BadStream.
  void parse(const Job& job, const Block& block, const Section& section, const uint8_t* from);
  // Write the section's elements, once `stream` is decoded, into a chunk.
  void restore(uint8_t* chunk);

  bool has_stream() const { return mode_ == Mode::values || mode_ == Mode::lossless; }
  bool side_by_side(const Coder& other) const;

  Stream stream;

 private:
  struct Escape {
    uint32_t row, channel;
    int16_t value;
  };

  bool prepare_values(const uint8_t* chunk);
  bool widen_rows(const uint8_t* chunk);
  void choose_profile();
  const uint16_t* known_means() const;
  bool key_steps();
  bool token_steps();
  bool quantise_rows();
  bool quantise_components();
  void choose_tables();
  void collect_escapes();
  bool prepare_lossless(const uint8_t* chunk);
  bool prepare_bytes(const uint8_t* chunk);
  bool finish_values(uint8_t* to, Section& section);
  bool finish_lossless(uint8_t* to, Section& section);

  void parse_values(const Section& section, Reader reader);
  void parse_lossless(const Section& section, Reader reader);
  void parse_bytes(const Section& section, Reader reader);
  void restore_values(uint8_t* chunk);
  void restore_components(const std::vector<Escape>& escapes, uint8_t* chunk);
  size_t read_token_steps();
  void restore_row(const uint8_t* symbols, size_t t, uint8_t* chunk) const;
  void finish_row(float* values, size_t t, uint8_t* chunk) const;
  void restore_lossless(uint8_t* chunk);
  void restore_bytes(uint8_t* chunk);
  void apply_patches(uint8_t* chunk) const;
  std::vector<Escape> resolve(uint8_t escape, size_t first_row);

  size_t stream_rows() const { return block_->rows - first_; }
  size_t step_rows() const;
  void lay_out_passes();
  void open_words();
  void read_stream(const Section& section, Reader& reader);

  const Job* job_ = nullptr;
  const Block* block_ = nullptr;
  Mode mode_ = Mode::raw;
  uint8_t flags_ = 0;
  size_t first_ = 0;  // rows stored raw
  size_t escape_count_ = 0, patch_count_ = 0;
  const uint8_t *escapes_at_ = nullptr, *patches_at_ = nullptr, *raw_row_ = nullptr,
                *planes_ = nullptr, *scales_ = nullptr;
  std::vector<Pass> passes_;
  std::vector<int16_t> escapes_;
  std::vector<Patch> patches_;
  std::vector<float> steps_, means_, inverse_, sums_, squares_, energies_, by_;
  std::vector<uint16_t> means16_;
  std::vector<uint8_t> tables_, radius_, references_, step_tables_;
  std::vector<int8_t> centres_;
  std::vector<uint32_t> counts_;
  const float* basis_ = nullptr;
  Room<float> x_, tile_;
  Room<int16_t> q_;
  Room<uint8_t> symbols_, step_symbols_, exponents_, bytes_;
  Room<int16_t> step_q_;
  Room<uint16_t> words_;
  float* rows_ = nullptr;
};

}  // namespace lmcache::codec
