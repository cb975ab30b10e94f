#define LMCACHE_CODEC codec_avx512
#define LMCACHE_CODEC_NAME "avx512"
#include "codec_body.inc"
