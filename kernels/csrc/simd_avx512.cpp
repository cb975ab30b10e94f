#define LMCACHE_LEVEL simd_avx512
#define LMCACHE_LEVEL_NAME "avx512"
#include "simd_body.inc"
