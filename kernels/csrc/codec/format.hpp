// The fixed parts of a stream. Little-endian, unaligned. See docs/codec-format.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "codec.hpp"

namespace lmcache::codec {

constexpr uint8_t kMagic[4] = {'K', 'V', 'C', '1'};
constexpr uint16_t kVersion = 1;
constexpr uint16_t kTableSet = 1;
constexpr uint16_t kInterleaved = 1;

struct Header {
  uint8_t magic[4];
  uint16_t version;
  uint8_t kind, dtype;
  uint32_t layers;
  uint16_t planes, flags;
  uint32_t heads, head_size, tokens;
  uint32_t pairs;        // of a head, that rotary embedding turns; their angles follow the header
  float key_step, value_step;
  uint16_t table_set, block_heads;  // heads of a section
  uint32_t sections;
  uint64_t profile;
  uint32_t start;        // the position that the first token is turned back by
  uint32_t checksum;     // of header (with 0 here), angles and directory
};
static_assert(sizeof(Header) == 64);

enum class Mode : uint8_t { raw = 0, lossless = 1, values = 2, int8 = 3, e4m3 = 4 };

// Flags of a section of values.
constexpr uint8_t kFirstRaw = 1, kTokenSteps = 2, kRotated = 4, kProfileSteps = 8,
                  kProfileMeans = 16, kBasis = 32, kSectionFlags = 63;

struct Section {
  uint64_t offset;  // behind the directory
  uint32_t bytes, words, escapes, patches;
  uint32_t checksum;
  uint8_t mode, flags;
  uint16_t reserved;
};
static_assert(sizeof(Section) == 32);

struct Patch {
  uint32_t position;  // token * channels of the section + channel
  uint32_t bits;
};

// Where everything of a stream is, from its shape.
struct Plan {
  Shape shape;
  uint32_t block_heads, blocks;  // a section has `block_heads` heads, the last of a row fewer
  size_t pairs, sections, directory, payload;

  Plan(const Shape& shape, size_t pairs, uint32_t block_heads)
      : shape(shape),
        block_heads(block_heads),
        blocks((shape.heads - 1) / block_heads + 1),
        pairs(pairs),
        sections(size_t{shape.layers} * shape.planes * blocks),
        directory(sizeof(Header) + pairs * 2 * sizeof(double)),
        payload(directory + sections * sizeof(Section)) {}
};

// About as many heads as make 128 channels, so that sections are of nearly the same size.
inline uint32_t block_heads(const Shape& shape) {
  const uint32_t few = shape.head_size < 128 ? 128 / shape.head_size : 1;
  const uint32_t blocks = shape.heads > few ? shape.heads / few : 1;
  return (shape.heads + blocks - 1) / blocks;
}

// One section's place in a chunk: rows of `channels` elements, `stride` bytes apart.
struct Block {
  uint32_t layer, plane, number, first_head, heads, head_size;  // number: of its row's blocks
  size_t rows, channels, width;  // width: channels, in whole passes
  size_t offset, stride, itemsize;
  bool keys;

  Block(const Plan& plan, size_t index) {
    const Shape& shape = plan.shape;
    const size_t plane_index = index / plan.blocks;
    number = static_cast<uint32_t>(index % plan.blocks);
    layer = static_cast<uint32_t>(plane_index / shape.planes);
    plane = static_cast<uint32_t>(plane_index % shape.planes);
    first_head = number * plan.block_heads;
    heads = shape.heads - first_head < plan.block_heads ? shape.heads - first_head
                                                        : plan.block_heads;
    head_size = shape.head_size;
    rows = shape.tokens;
    channels = size_t{heads} * head_size;
    width = (channels + kLanes - 1) / kLanes * kLanes;
    itemsize = shape.itemsize();
    stride = shape.row_bytes();
    offset = layer * shape.layer_bytes() + size_t{plane} * rows * stride +
             size_t{first_head} * head_size * itemsize;
    keys = shape.planes == 2 && plane == 0;
  }

  size_t row_bytes() const { return channels * itemsize; }
  size_t bytes() const { return rows * row_bytes(); }
  size_t passes() const { return width / kLanes; }
  bool same_shape(const Block& other) const {
    return channels == other.channels && keys == other.keys;
  }
};

// Cosines and sines of every token's angles, the first of which is at position `start`, by repeated
// multiplication: no mathematical library, so the same everywhere.
struct Angles {
  std::vector<float> cosines, sines;
  Angles(const double* turns, size_t pairs, size_t tokens, uint32_t start);
};

// Whether these are cosines and sines of `pairs` angles.
bool are_angles(const double* turns, size_t pairs);

}  // namespace lmcache::codec
