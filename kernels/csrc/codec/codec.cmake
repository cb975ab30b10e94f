# The codecs. Included by the CMakeLists.txt above, which has the flags' reasons.
set(CODEC ${CMAKE_CURRENT_LIST_DIR})
set(CODEC_SOURCES ${CODEC}/codec.cpp ${CODEC}/section.cpp ${CODEC}/values.cpp ${CODEC}/components.cpp
  ${CODEC}/survey.cpp ${CODEC}/exact.cpp
  ${CODEC}/tables.cpp ${CODEC}/codec_base.cpp)
target_sources(_native PRIVATE ${CODEC_SOURCES} ${CODEC}/bind_codec.cpp)
# A fused multiplication rounds once instead of twice: levels would differ in the last bit.
set_source_files_properties(${CODEC_SOURCES} PROPERTIES COMPILE_OPTIONS "-ffp-contract=off")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  target_sources(_native PRIVATE ${CODEC}/codec_avx2.cpp ${CODEC}/codec_avx512.cpp)
  set_source_files_properties(${CODEC}/codec_avx2.cpp PROPERTIES COMPILE_OPTIONS
    "-mavx2;-ffp-contract=off")
  set_source_files_properties(${CODEC}/codec_avx512.cpp PROPERTIES COMPILE_OPTIONS
    "-mavx512f;-mavx512bw;-mavx512vl;-mavx512dq;-mprefer-vector-width=512;-ffp-contract=off;-Wno-maybe-uninitialized")
endif()
