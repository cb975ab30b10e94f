// Which table an encoder takes. A stream says which was taken, so this isn't part of the format.
#pragma once

#include <cstdint>

namespace lmcache::codec {

// For `count` values whose magnitudes, each at most 127, add up to `magnitude`.
uint8_t value_table(uint64_t magnitude, uint64_t count);

// The largest |q| that a table has a symbol for.
uint8_t value_radius(uint8_t table);

// What symbols of exponents cost in each table, in 256ths of a bit.
using ExponentCosts = uint32_t[16][64];
const ExponentCosts& exponent_costs();

}  // namespace lmcache::codec
