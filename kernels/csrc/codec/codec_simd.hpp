// The codecs' inner loops, once per instruction set, chosen at run time like simd.hpp's.
//
// Knows symbols, words and rows of numbers. Knows nothing about streams' layout, threads or Python.
// Every level gives the same bits: rANS is integer arithmetic, and floating-point operations are
// single, in one order, and never fused (-ffp-contract=off).
#pragma once

#include <cstddef>
#include <cstdint>

namespace lmcache::codec {

constexpr size_t kLanes = 32;           // of one stream, and channels of one pass
constexpr int kBits = 10;               // of a probability
constexpr uint32_t kLow = 1u << 16;     // a state is never below, nor is it when coding starts
constexpr size_t kPadding = 256;        // bytes that may be read behind a stream's words
constexpr size_t kSlack = 16;           // words that may be written in front of a stream's words

constexpr size_t kTile = 32;            // tokens that go through a basis together

constexpr size_t kValueTables = 32, kExponentTables = 64, kTables = kValueTables + kExponentTables;
constexpr size_t kSlots = size_t{1} << kBits, kSymbols = 128;

enum class DType : uint8_t { bf16, f16, f32, u8 };

// 32 channels: `rows` rows of 32 symbols, `stride` bytes apart, coded with one table for each lane.
struct Pass {
  uint8_t* symbols;
  size_t rows, stride;
  const uint8_t* tables;
};

// One stream: its passes are coded one after the other with the same 32 states, which share the
// words. A decoder reads upwards, so an encoder starts at the last row and writes downwards.
struct Stream {
  const Pass* passes;
  size_t count;
  uint32_t states[kLanes];
  uint16_t* words;  // encode: behind the last word, then the first. decode: the next to read
  uint16_t* end;    // decode: behind the last
};

// Rotary position embedding of rows (arXiv 2104.09864): `pairs` angles a row, as cosines and sines.
struct Rotation {
  const float *cosines, *sines;
  size_t pairs;
  bool interleaved;  // pairs are (2j, 2j + 1) instead of (j, j + pairs)
};

struct CodecSimd {
  const char* name;

  // Code `count` (1 or 2) streams of the same shape at the same time, so that one's latencies hide
  // the other's. `decode` is false if words ran out, were left over, or states aren't the first.
  void (*encode)(Stream* streams, size_t count);
  bool (*decode)(Stream* streams, size_t count);

  // Rows of numbers <-> rows of elements. `widen` puts 0 for what isn't finite, and says so.
  bool (*widen)(DType dtype, const uint8_t* source, float* to, size_t count);
  void (*narrow)(DType dtype, const float* source, uint8_t* to, size_t count);

  // Turn a row of `heads` heads, forwards or back.
  void (*rotate)(float* row, size_t heads, size_t head_size, const Rotation& by, size_t position,
                 bool back);

  // Sums over rows of each channel, and of squares. Rows are `stride` apart.
  void (*columns)(const float* rows, size_t count, size_t stride, float* sums, float* squares);
  // The sum of squares of `count` numbers.
  float (*energy)(const float* values, size_t count);

  // to = round((row - mean) * inverse * by), and whether all fit into +-32767.
  bool (*quantise)(const float* row, const float* mean, const float* inverse, float by,
                   int16_t* to, size_t count);
  // Sums over rows of min(|q|, 127) for each channel.
  void (*magnitudes)(const int16_t* rows, size_t count, size_t stride, uint32_t* sums);
  // symbol = |q| <= radius ? q + 64 : 0 in a row; whether there are zeros.
  bool (*symbols)(const int16_t* row, const uint8_t* radius, uint8_t* to, size_t count);
  // Whether there are bytes of `value` in a row.
  bool (*contains)(const uint8_t* row, size_t count, uint8_t value);
  // to = (symbol - 64) * (step * by) + mean
  void (*dequantise)(const uint8_t* row, const float* step, const float* mean, float by, float* to,
                     size_t count);
  // `dequantise`, `rotate` forwards and `narrow` of one head in registers: elements of 16 bits, and
  // pairs that aren't interleaved.
  void (*restore)(DType dtype, const uint8_t* row, const float* step, const float* mean, float by,
                  size_t count, const Rotation& turn, size_t position, uint8_t* to);

  // row = (row - mean) * inverse * by, and back: row = row * (step * by) + mean
  void (*centre)(float* row, const float* mean, const float* inverse, float by, size_t count);
  void (*scale)(float* row, const float* step, const float* mean, float by, size_t count);
  // to[o][t] = the sum over r of `rows`, in their order and from 0, of
  // basis[r * row_step + o * out_step] * from[r][t], for `outputs` o and all t of a tile.
  void (*project)(const float* basis, size_t row_step, size_t out_step, const uint32_t* rows,
                  size_t count, const float* from, float* to, size_t outputs);

  // 16-bit floats: exponents, and sign and upper mantissa bits with the lowest ones.
  void (*split)(DType dtype, const uint16_t* row, uint8_t* exponents, uint8_t* low, uint8_t* high,
                size_t count);
  void (*join)(DType dtype, const uint8_t* symbols, const uint8_t* references, const uint8_t* low,
               const uint8_t* high, uint16_t* row, size_t count);
  // symbol = min(reference - exponent, 15) as exponents are replaced; whether there are fifteens.
  bool (*below)(uint8_t* row, const uint8_t* references, uint8_t* to, size_t count);

  // Of the tables for exponents, the one whose cost for a histogram of 16 symbols is least.
  uint8_t (*cheapest)(const uint32_t* histogram, const uint32_t (*costs)[kExponentTables]);

  // One token and head as 8-bit integers or E4M3.
  void (*to_int8)(const float* row, float inverse, uint8_t* to, size_t count);
  void (*from_int8)(const uint8_t* row, float scale, float* to, size_t count);
  void (*to_e4m3)(const float* row, float inverse, uint8_t* to, size_t count);
  void (*from_e4m3)(const uint8_t* row, float scale, float* to, size_t count);
  float (*largest)(const float* row, size_t count);
};

extern const CodecSimd codec_base;
#if defined(LMCACHE_X86)
extern const CodecSimd codec_avx2;
extern const CodecSimd codec_avx512;
#endif

// The level that goes with `simd(name)`; nullptr if this CPU hasn't got it.
const CodecSimd* codec_simd(const char* name = nullptr);

// Frequencies, in the forms that coding needs. Tables 0-31 are for values, 32-95 for exponents.
struct Tables {
  uint32_t decode[kTables * kSlots];    // by slot: frequency << 20 | slot - start << 8 | symbol
  uint32_t encode[kTables * kSymbols];  // by symbol: start << 16 | frequency
};
extern const Tables& tables;

}  // namespace lmcache::codec
