#define LMCACHE_CODEC codec_avx2
#define LMCACHE_CODEC_NAME "avx2"
#include "codec_body.inc"
