#include "codec.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "../xxh3.hpp"
#include "section.hpp"

namespace lmcache::codec {
namespace {

uint32_t checksum(const uint8_t* data, size_t bytes, const Simd& simd) {
  return static_cast<uint32_t>(xxh3_64(data, bytes, simd));
}

// Of everything up to the payload, with the checksum's own place empty.
uint32_t head_checksum(const uint8_t* stream, size_t bytes, const Simd& simd) {
  std::vector<uint8_t> copy(stream, stream + bytes);
  std::memset(copy.data() + offsetof(Header, checksum), 0, sizeof(uint32_t));
  return checksum(copy.data(), bytes, simd);
}

// Sections in twos of the same shape, whose streams are coded side by side.
using Pair = std::pair<size_t, size_t>;
constexpr size_t kNone = std::numeric_limits<size_t>::max();

std::vector<Pair> pairs_of(const std::vector<Block>& blocks) {
  std::vector<Pair> pairs;
  std::map<std::pair<size_t, bool>, size_t> waiting;
  for (size_t i = 0; i < blocks.size(); ++i) {
    const auto shape = std::make_pair(blocks[i].channels, blocks[i].keys);
    const auto found = waiting.find(shape);
    if (found == waiting.end()) {
      waiting.emplace(shape, i);
    } else {
      pairs.emplace_back(found->second, i);
      waiting.erase(found);
    }
  }
  for (const auto& [shape, i] : waiting) pairs.emplace_back(i, kNone);
  return pairs;
}

// Runs tasks that may throw, and throws what the first of them threw.
template <class Task>
void run_all(Pool& pool, size_t count, const Task& task) {
  std::mutex mutex;
  std::exception_ptr thrown;
  std::atomic<bool> failed{false};
  pool.run(count, [&](size_t i) {
    if (failed.load(std::memory_order_relaxed)) return;
    try {
      task(i);
    } catch (...) {
      const std::lock_guard lock(mutex);
      if (!thrown) thrown = std::current_exception();
      failed = true;
    }
  });
  if (thrown) std::rethrow_exception(thrown);
}

struct Coders {
  Coder of[2];
};

Coders& coders() {
  thread_local Coders mine;
  return mine;
}

Mode mode_of(Kind kind) { return static_cast<Mode>(kind); }

void copy_rows(const Block& block, const uint8_t* chunk, uint8_t* to) {
  const size_t row = block.row_bytes();
  for (size_t t = 0; t < block.rows; ++t)
    std::memcpy(to + t * row, chunk + block.offset + t * block.stride, row);
}

Header header_of(const Plan& plan, const Options& options) {
  Header header{};
  std::memcpy(header.magic, kMagic, sizeof(kMagic));
  header.version = kVersion;
  header.kind = static_cast<uint8_t>(options.kind);
  header.dtype = static_cast<uint8_t>(plan.shape.dtype);
  header.layers = plan.shape.layers;
  header.planes = static_cast<uint16_t>(plan.shape.planes);
  header.flags = options.interleaved ? kInterleaved : 0;
  header.heads = plan.shape.heads;
  header.head_size = plan.shape.head_size;
  header.tokens = plan.shape.tokens;
  header.pairs = static_cast<uint32_t>(plan.pairs);
  header.key_step = options.key_step;
  header.value_step = options.value_step;
  header.table_set = kTableSet;
  header.block_heads = static_cast<uint16_t>(plan.block_heads);
  header.sections = static_cast<uint32_t>(plan.sections);
  header.profile = options.profile != nullptr ? options.profile->id : 0;
  header.start = plan.pairs != 0 ? options.start.value_or(0) : 0;
  return header;
}

// A stream whose header and directory were checked against what the caller expects.
struct Stream_ {
  Header header;
  std::vector<double> turns;
  std::vector<Section> sections;
};

Header read_header(const uint8_t* stream, size_t bytes) {
  Header header;
  if (bytes < sizeof(Header)) throw BadStream("a stream is shorter than its header");
  std::memcpy(&header, stream, sizeof(Header));
  if (std::memcmp(header.magic, kMagic, sizeof(kMagic)) != 0)
    throw BadStream("no stream of these codecs begins like this");
  if (header.version != kVersion || header.table_set != kTableSet ||
      (header.flags & ~kInterleaved) != 0)
    throw BadStream("a stream of a later format");
  return header;
}

void check_shape(const Header& header, const Shape& shape) {
  const bool same = header.dtype == static_cast<uint8_t>(shape.dtype) &&
                    header.layers == shape.layers && header.planes == shape.planes &&
                    header.heads == shape.heads && header.head_size == shape.head_size &&
                    header.tokens == shape.tokens;
  if (!same)
    throw BadStream("a stream of " + std::to_string(header.layers) + " layers x " +
                    std::to_string(header.planes) + " planes x " +
                    std::to_string(header.tokens) + " tokens x " + std::to_string(header.heads) +
                    " heads x " + std::to_string(header.head_size) + " of dtype " +
                    std::to_string(header.dtype) + ", which isn't the chunk's shape");
  if (header.pairs > header.head_size / 2 || header.block_heads < 1 ||
      header.block_heads > header.heads)
    throw BadStream("a stream's heads can't be so");
}

Stream_ read_head(const Machine& machine, const Shape& shape, Kind kind, const Profile* profile,
                  const uint8_t* stream, size_t bytes) {
  Stream_ read{read_header(stream, bytes), {}, {}};
  check_shape(read.header, shape);
  if (read.header.kind != static_cast<uint8_t>(kind))
    throw BadStream("a stream of another codec");
  if (read.header.profile != 0 && (profile == nullptr || profile->id != read.header.profile))
    throw BadStream("a stream was written with a profile that isn't here");
  const Plan plan(shape, read.header.pairs, read.header.block_heads);
  if (read.header.sections != plan.sections || bytes < plan.payload)
    throw BadStream("a stream is shorter than its directory");
#ifndef FUZZING_BUILD_MODE_UNSAFE_FOR_PRODUCTION
  if (head_checksum(stream, plan.payload, machine.simd) != read.header.checksum)
    throw BadStream("a stream's directory is damaged");
#else
  (void)machine;
#endif
  read.turns.resize(plan.pairs * 2);
  if (plan.pairs != 0)
    std::memcpy(read.turns.data(), stream + sizeof(Header), plan.pairs * 2 * sizeof(double));
  if (!are_angles(read.turns.data(), plan.pairs))
    throw BadStream("a stream's angles are no cosines and sines");
  read.sections.resize(plan.sections);
  std::memcpy(read.sections.data(), stream + plan.directory, plan.sections * sizeof(Section));
  uint64_t end = 0;
  for (const Section& section : read.sections) {
    if (section.offset != end) throw BadStream("a stream's sections aren't one after the other");
    end += section.bytes;  // each has 32 bits: no overflow before memory is full
  }
  return read;
}

}  // namespace

size_t Shape::itemsize() const {
  static constexpr size_t sizes[] = {2, 2, 4, 1};
  return sizes[static_cast<size_t>(dtype)];
}

bool are_angles(const double* turns, size_t pairs) {
  for (const double* end = turns + 2 * pairs; turns != end; turns += 2)
    if (!(std::fabs(turns[0] * turns[0] + turns[1] * turns[1] - 1) <= 1e-6)) return false;
  return true;
}

Angles::Angles(const double* turns, size_t pairs, size_t tokens, uint32_t start)
    : cosines(pairs * tokens), sines(pairs * tokens) {
  for (size_t j = 0; j < pairs; ++j) {
    const double c1 = turns[2 * j], s1 = turns[2 * j + 1];
    double c = 1, s = 0;
    for (int bit = 31; bit >= 0; --bit) {
      const double twice = c * c - s * s;
      s = s * c + c * s;
      c = twice;
      if (!(start >> bit & 1)) continue;
      const double next = c * c1 - s * s1;
      s = s * c1 + c * s1;
      c = next;
    }
    for (size_t t = 0; t < tokens; ++t) {
      cosines[t * pairs + j] = static_cast<float>(c);
      sines[t * pairs + j] = static_cast<float>(s);
      const double next = c * c1 - s * s1;
      s = s * c1 + c * s1;
      c = next;
    }
  }
}

size_t Profile::basis_size(const Shape& shape) const {
  if (basis_heads == 0) return 0;
  const size_t whole = shape.heads / basis_heads, rest = shape.heads % basis_heads;
  const size_t numbers = whole * basis_heads * basis_heads + rest * rest;
  return numbers * shape.head_size * shape.head_size;
}

const float* Profile::basis(bool keys, const Shape& shape, uint32_t layer, uint32_t block) const {
  const size_t width = size_t{basis_heads} * shape.head_size;
  return (keys ? key_basis : value_basis).data() + layer * basis_size(shape) +
         block * width * width;
}

size_t max_encoded(const Shape& shape, size_t pairs) {
  return Plan(shape, pairs, 1).payload + shape.bytes();
}

size_t encode(const Machine& machine, const Shape& shape, const Options& options,
              const uint8_t* chunk, uint8_t* into) {
  const bool turns = options.kind == Kind::values && shape.planes == 2;
  const bool bases = options.profile != nullptr && options.profile->basis_heads != 0;
  const Plan plan(shape, turns ? options.turns.size() / 2 : 0,
                  bases ? options.profile->basis_heads : block_heads(shape));
  const Angles angles(options.turns.data(), plan.pairs, shape.tokens, options.start.value_or(0));
  Survey survey(shape.layers);
  const Job job{machine.codec, plan, &options, options.profile, angles, options.interleaved,
                &survey};
  if (options.kind == Kind::values && shape.dtype != DType::u8) {
    run_all(machine.pool, shape.layers,
            [&](size_t layer) { survey.look(job, static_cast<uint32_t>(layer), chunk); });
    survey.conclude(options.first_raw);
  }
  std::vector<Block> blocks;
  blocks.reserve(plan.sections);
  for (size_t i = 0; i < plan.sections; ++i) blocks.emplace_back(plan, i);
  std::vector<size_t> places;  // each where it would be if all were raw; closed up at the end
  for (size_t i = 0, at = 0; i < plan.sections; at += blocks[i++].bytes()) places.push_back(at);
  std::vector<Section> sections(plan.sections);
  uint8_t* payload = into + plan.payload;
  const std::vector<Pair> pairs = pairs_of(blocks);

  run_all(machine.pool, pairs.size(), [&](size_t number) {
    const size_t members[2] = {pairs[number].first, pairs[number].second};
    const size_t count = members[1] == kNone ? 1 : 2;
    Coders& mine = coders();
    bool good[2] = {};
    for (size_t i = 0; i < count; ++i)
      good[i] = mine.of[i].prepare(job, blocks[members[i]], mode_of(options.kind), chunk);
    if (good[0] && good[1] && mine.of[0].has_stream() && mine.of[0].side_by_side(mine.of[1])) {
      Stream both[2] = {mine.of[0].stream, mine.of[1].stream};
      machine.codec.encode(both, 2);
      for (size_t i = 0; i < 2; ++i) mine.of[i].stream = both[i];
    } else {
      for (size_t i = 0; i < count; ++i)
        if (good[i] && mine.of[i].has_stream()) machine.codec.encode(&mine.of[i].stream, 1);
    }
    for (size_t i = 0; i < count; ++i) {
      const size_t at = members[i];
      Section& section = sections[at];
      if (!good[i] || !mine.of[i].finish(payload + places[at], section)) {
        section = Section{};
        section.bytes = static_cast<uint32_t>(blocks[at].bytes());
        copy_rows(blocks[at], chunk, payload + places[at]);
      }
      section.checksum = checksum(payload + places[at], section.bytes, machine.simd);
    }
  });

  size_t end = 0;
  for (size_t i = 0; i < plan.sections; ++i) {
    if (end != places[i]) std::memmove(payload + end, payload + places[i], sections[i].bytes);
    sections[i].offset = end;
    end += sections[i].bytes;
  }
  const Header header = header_of(plan, options);
  std::memcpy(into, &header, sizeof(header));
  if (plan.pairs != 0)
    std::memcpy(into + sizeof(header), options.turns.data(), plan.pairs * 2 * sizeof(double));
  std::memcpy(into + plan.directory, sections.data(), sections.size() * sizeof(Section));
  const uint32_t sum = head_checksum(into, plan.payload, machine.simd);
  std::memcpy(into + offsetof(Header, checksum), &sum, sizeof(sum));
  return plan.payload + end;
}

void decode(const Machine& machine, const Shape& shape, Kind kind, const Profile* profile,
            const uint8_t* stream, size_t bytes, uint8_t* into, uint32_t first, uint32_t count) {
  const Stream_ read = read_head(machine, shape, kind, profile, stream, bytes);
  const Plan plan(shape, read.header.pairs, read.header.block_heads);
  const Angles angles(read.turns.data(), plan.pairs, shape.tokens, read.header.start);
  Options options;
  options.kind = kind;
  options.key_step = read.header.key_step;
  options.value_step = read.header.value_step;
  const Job job{machine.codec, plan,   &options, read.header.profile != 0 ? profile : nullptr,
                angles,        (read.header.flags & kInterleaved) != 0, nullptr};
  const size_t each = size_t{shape.planes} * plan.blocks, from = first * each;
  std::vector<Block> blocks;
  blocks.reserve(count * each);
  for (size_t i = 0; i < count * each; ++i) blocks.emplace_back(plan, from + i);
  const size_t room = bytes - plan.payload;
  const Section& last = read.sections[from + count * each - 1];
  if (last.offset > room || last.bytes > room - last.offset)
    throw BadStream("a stream ends before its last section");
  if (first + count == shape.layers && count == shape.layers && last.offset + last.bytes != room)
    throw BadStream("a stream is longer than its sections");
  const uint8_t* payload = stream + plan.payload;
  // Blocks know their place in a whole chunk; `into` begins with the first layer asked for.
  for (Block& block : blocks) block.offset -= first * shape.layer_bytes();
  const std::vector<Pair> pairs = pairs_of(blocks);

  run_all(machine.pool, pairs.size(), [&](size_t number) {
    const size_t members[2] = {pairs[number].first, pairs[number].second};
    const size_t amount = members[1] == kNone ? 1 : 2;
    Coders& mine = coders();
    for (size_t i = 0; i < amount; ++i) {
      const Section& section = read.sections[from + members[i]];
#ifndef FUZZING_BUILD_MODE_UNSAFE_FOR_PRODUCTION
      if (checksum(payload + section.offset, section.bytes, machine.simd) != section.checksum)
        throw BadStream("a section is damaged");
#endif
      mine.of[i].parse(job, blocks[members[i]], section, payload + section.offset);
    }
    bool good = true;
    if (amount == 2 && mine.of[0].has_stream() && mine.of[0].side_by_side(mine.of[1])) {
      Stream both[2] = {mine.of[0].stream, mine.of[1].stream};
      good = machine.codec.decode(both, 2);
    } else {
      for (size_t i = 0; i < amount; ++i)
        if (mine.of[i].has_stream()) good &= machine.codec.decode(&mine.of[i].stream, 1);
    }
    if (!good) throw BadStream("a section's words don't fit to its states");
    for (size_t i = 0; i < amount; ++i) mine.of[i].restore(into);
  });
}

uint64_t profile_of(const uint8_t* stream, size_t bytes) {
  return read_header(stream, bytes).profile;
}

}  // namespace lmcache::codec
