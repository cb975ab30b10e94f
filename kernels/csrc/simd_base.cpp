// What every CPU of the architecture has: SSE2 on x86-64, portable C++ elsewhere.
#define LMCACHE_LEVEL simd_base
#define LMCACHE_LEVEL_NAME "base"
#include "simd_body.inc"
