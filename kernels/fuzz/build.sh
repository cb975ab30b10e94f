#!/bin/sh
# Build the fuzzer and its corpus into a folder: build.sh FOLDER. Needs clang with compiler-rt.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=${1:?usage: build.sh FOLDER}
mkdir -p "$out/corpus"
common="-std=c++17 -O2 -g -DLMCACHE_X86 -DFUZZING_BUILD_MODE_UNSAFE_FOR_PRODUCTION -ffp-contract=off"
wide="-mavx512f -mavx512bw -mavx512vl -mavx512dq"

objects() { # the sanitizers, a prefix
  for file in codec/codec codec/section codec/values codec/components codec/survey codec/exact codec/tables codec/codec_base \
    codec/codec_avx2 codec/codec_avx512 simd simd_base simd_avx2 simd_avx512 xxh3 pool; do
    case $file in *avx512) level=$wide ;; *avx2) level=-mavx2 ;; *) level= ;; esac
    # shellcheck disable=SC2086
    clang++ $common $1 $level -c "$here/../csrc/$file.cpp" -o "$out/$2$(basename $file).o"
  done
}

fuzzing="-fsanitize=fuzzer-no-link,address,undefined -fno-sanitize-recover=undefined"
objects "$fuzzing" fuzz_
objects "" plain_
# shellcheck disable=SC2086
clang++ $common ${fuzzing%%,*},address,undefined -fno-sanitize-recover=undefined \
  -fsanitize=fuzzer "$here/decode.cpp" "$out"/fuzz_*.o -o "$out/decode" -lpthread
# shellcheck disable=SC2086
clang++ $common -DMAKE_CORPUS "$here/decode.cpp" "$out"/plain_*.o -o "$out/corpus-maker" -lpthread
"$out/corpus-maker" "$out/corpus"
