// What every CPU has.
#define LMCACHE_CODEC codec_base
#define LMCACHE_CODEC_NAME "base"
#include "codec_body.inc"
