#define LMCACHE_LEVEL simd_avx2
#define LMCACHE_LEVEL_NAME "avx2"
#include "simd_body.inc"
