#!/bin/sh
# Build the fuzzer and its corpus into a folder: build.sh FOLDER [JOBS]. Needs clang with compiler-rt.
# A minute of one core: one set of objects, at -O1. simd_*.cpp, which hash and copy, unroll forty loops
# sixteen times, and checks in all of that take an optimiser longer than everything else: -O0. Where
# they only hash they count on from a null pointer, which is never followed: that check is left out.
# Objects that are newer than the sources stay.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=${1:?usage: build.sh FOLDER [JOBS]}
jobs=${2:-$(nproc)}
mkdir -p "$out/corpus" "$out/objects"
sources="codec/codec codec/section codec/values codec/components codec/survey codec/exact codec/tables
  codec/codec_base codec/codec_avx2 codec/codec_avx512 simd simd_base simd_avx2 simd_avx512 xxh3 pool"
sanitizers="-fsanitize=fuzzer-no-link,address,undefined"
export here out
export flags="-std=c++17 -gline-tables-only -DLMCACHE_X86 -DFUZZING_BUILD_MODE_UNSAFE_FOR_PRODUCTION
  -ffp-contract=off $sanitizers -fno-sanitize-recover=undefined"

# shellcheck disable=SC2016
printf '%s\n' $sources | xargs -P "$jobs" -I{} sh -eu -c '
  object="$out/objects/$(basename "{}").o"
  [ -z "$(find "$here/../csrc" "$here/build.sh" -type f -newer "$object" 2>&1 || echo none)" ] && exit
  case {} in simd_*) level="-O0 -fno-sanitize=pointer-overflow" ;; *) level=-O1 ;; esac
  case {} in
    *avx512) level="$level -mavx512f -mavx512bw -mavx512vl -mavx512dq" ;;
    *avx2) level="$level -mavx2" ;;
  esac
  clang++ $flags $level -c "$here/../csrc/{}.cpp" -o "$object.part"
  mv "$object.part" "$object"'
# shellcheck disable=SC2086
clang++ $flags -O1 -fsanitize=fuzzer "$here/decode.cpp" "$out"/objects/*.o -o "$out/decode" -lpthread
# shellcheck disable=SC2086
clang++ $flags -O1 -DMAKE_CORPUS "$here/decode.cpp" "$out"/objects/*.o -o "$out/corpus-maker" -lpthread
"$out/corpus-maker" "$out/corpus"
