#include "simd.hpp"

#include <cstring>

namespace lmcache {

const Simd* simd(const char* name) {
  const Simd* levels[] = {
#if defined(LMCACHE_X86)
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")
          ? &simd_avx512
          : nullptr,
      __builtin_cpu_supports("avx2") ? &simd_avx2 : nullptr,
#endif
      &simd_base,
  };
  for (const Simd* level : levels)
    if (level != nullptr && (name == nullptr || std::strcmp(name, level->name) == 0)) return level;
  return nullptr;
}

}  // namespace lmcache
