// Frequency tables in the forms that coding needs, and the choice of a level.
#include <cstring>

#include "choice.hpp"
#include "codec_simd.hpp"

namespace lmcache::codec {
namespace {

#include "tables.inc"

template <size_t N>
void add(Tables& made, size_t table, const uint16_t (&frequencies)[N]) {
  uint32_t start = 0;
  for (size_t symbol = 0; symbol < N; ++symbol) {
    const uint32_t f = frequencies[symbol];
    made.encode[table * kSymbols + symbol] = start << 16 | f;
    for (uint32_t j = 0; j < f; ++j)
      made.decode[table * kSlots + start + j] = f << 20 | j << 8 | static_cast<uint32_t>(symbol);
    start += f;
  }
}

const Tables& make() {
  static Tables made{};
  for (size_t k = 0; k < kValueTables; ++k) add(made, k, kValueFrequencies[k]);
  for (size_t k = 0; k < kExponentTables; ++k)
    add(made, kValueTables + k, kExponentFrequencies[k]);
  return made;
}

// -log2(f / 1024) in 256ths, with integers, so that encoders everywhere choose alike.
uint32_t cost(uint32_t f) {
  uint32_t log = 0;
  while (f >> (log / 256 + 1)) log += 256;
  uint64_t mantissa = uint64_t{f} << (31 - log / 256);  // in [2^31, 2^32): squaring gives a bit
  for (uint32_t bit = 128; bit; bit /= 2) {
    mantissa = mantissa * mantissa >> 31;
    if (mantissa >> 32) mantissa >>= 1, log += bit;
  }
  return kBits * 256 - log;
}

struct Costs {
  ExponentCosts of;
  Costs() {
    for (size_t k = 0; k < kExponentTables; ++k)
      for (size_t s = 0; s < 16; ++s)
        of[s][k] = cost(kExponentFrequencies[k][s]) + (s == 15 ? 16 * 256 : 0);
  }
};

}  // namespace

const Tables& tables = make();

uint8_t value_table(uint64_t magnitude, uint64_t count) {
  const uint64_t mean = count ? (magnitude << 12) / count : 0;
  uint8_t table = 0;
  while (table + 1u < kValueTables && mean >= kValueThresholds[table]) ++table;
  return table;
}

uint8_t value_radius(uint8_t table) {
  uint8_t radius = 0;
  while (radius < 63 && kValueFrequencies[table][64 + radius + 1]) ++radius;
  return radius;
}

const ExponentCosts& exponent_costs() {
  static const Costs costs;
  return costs.of;
}

const CodecSimd* codec_simd(const char* name) {
  const CodecSimd* levels[] = {
#if defined(LMCACHE_X86)
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")
          ? &codec_avx512
          : nullptr,
      __builtin_cpu_supports("avx2") ? &codec_avx2 : nullptr,
#endif
      &codec_base,
  };
  for (const CodecSimd* level : levels)
    if (level != nullptr && (name == nullptr || std::strcmp(name, level->name) == 0)) return level;
  return nullptr;
}

}  // namespace lmcache::codec
