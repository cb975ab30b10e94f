// What libFuzzer runs: every way into the kernels for bytes that somebody else wrote.
//
// `decode` of a whole chunk, of each codec, at every level of this CPU; or of some of its layers and
// of what a stream says of its profile, and the checksums, whole and piece by piece. The first six
// bytes choose codec, shape and way, the rest is the stream. Checksums aren't looked at by `decode`
// (FUZZING_BUILD_MODE_UNSAFE_FOR_PRODUCTION), so that changed bytes get past them; if the first byte
// asks for it, header and directory are made to fit, too. Profiles have numbers of ours or any that
// bytes say. Levels must agree on whether a stream is good, and on what it says.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "../csrc/codec/format.hpp"
#include "../csrc/xxh3.hpp"

using namespace lmcache;
using namespace lmcache::codec;

namespace {

constexpr size_t kChoice = 6;

uint32_t in_range(uint8_t byte, uint32_t most) { return 1 + byte % most; }

Shape shape_of(const uint8_t* choice) {
  static constexpr uint32_t sizes[] = {1, 2, 8, 16, 24, 32, 40, 64};
  return {static_cast<DType>(choice[1] % 4), in_range(choice[2], 2), in_range(choice[2] >> 4, 2),
          in_range(choice[3], 3), sizes[choice[4] % 8], in_range(choice[5], 10)};
}

// With bases of `basis_heads` heads, or without.
Profile make_profile(const Shape& shape, uint32_t basis_heads) {
  const size_t channels = size_t{shape.layers} * shape.heads * shape.head_size;
  Profile made;
  made.id = 1;
  made.steps.assign(channels, 0.5f);
  made.means.assign(channels, 0x3F00);
  made.basis_heads = basis_heads;
  if (basis_heads == 0) return made;
  made.key_means.assign(channels, 0xBE80);
  made.value_gains.assign(shape.layers, 1.5f);
  made.key_basis.resize(shape.layers * made.basis_size(shape));
  for (size_t i = 0; i < made.key_basis.size(); ++i)
    made.key_basis[i] = static_cast<float>(i * 37 % 64) / 128.0f - 0.25f;
  made.value_basis.assign(made.key_basis.rbegin(), made.key_basis.rend());
  return made;
}

// The same, made once: bases take longer than most streams.
const Profile& known_profile(const Shape& shape, uint32_t basis_heads) {
  static std::map<std::tuple<uint32_t, uint32_t, uint32_t, uint32_t>, Profile> known;
  const auto key = std::make_tuple(shape.layers, shape.heads, shape.head_size, basis_heads);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  return known.emplace(key, make_profile(shape, basis_heads)).first->second;
}

// A profile whose numbers are what `bytes` say, over and over, as those of a file may be: anything,
// but for those of bases, which a reader of files has found to be finite halves.
Profile odd_profile(Profile made, const uint8_t* bytes, size_t size) {
  size_t at = 0;
  const auto next = [&] {
    uint32_t drawn = 0;
    for (int i = 0; i < 4; ++i) drawn = drawn << 8 | bytes[at++ % size];
    return drawn;
  };
  const auto number = [&] {
    const uint32_t drawn = next();
    float value;
    std::memcpy(&value, &drawn, sizeof(value));
    return value;
  };
  for (float& step : made.steps) step = number();
  for (uint16_t& mean : made.means) mean = static_cast<uint16_t>(next());
  for (uint16_t& mean : made.key_means) mean = static_cast<uint16_t>(next());
  for (float& gain : made.value_gains) gain = number();
  std::vector<uint16_t> halves(made.key_basis.size());
  for (uint16_t& half : halves)
    if (half = static_cast<uint16_t>(next()); (half & 0x7C00) == 0x7C00) half ^= 0x4000;
  codec_simd("base")->widen(DType::f16, reinterpret_cast<const uint8_t*>(halves.data()),
                            made.key_basis.data(), halves.size());
  made.value_basis.assign(made.key_basis.rbegin(), made.key_basis.rend());
  return made;
}

// How many heads share a basis, by the first byte: in half of the cases none.
uint32_t basis_heads_of(const uint8_t* choice, const Shape& shape) {
  return choice[0] & 0x20 ? 1 + (choice[0] >> 2 & 7) % shape.heads : 0;
}

// Make header and directory of a changed stream agree with its shape and length, so that most runs
// get as far as sections.
void repair(uint8_t* stream, size_t bytes, const Shape& shape, Kind kind, uint32_t basis_heads) {
  if (bytes < sizeof(Header)) return;
  Header header;
  std::memcpy(&header, stream, sizeof(header));
  std::memcpy(header.magic, kMagic, sizeof(kMagic));
  header.version = kVersion;
  header.kind = static_cast<uint8_t>(kind);
  header.dtype = static_cast<uint8_t>(shape.dtype);
  header.layers = shape.layers;
  header.planes = static_cast<uint16_t>(shape.planes);
  header.flags &= kInterleaved;
  header.heads = shape.heads;
  header.head_size = shape.head_size;
  header.tokens = shape.tokens;
  header.pairs %= shape.head_size / 2 + 1;
  header.table_set = kTableSet;
  header.block_heads = static_cast<uint16_t>(1 + header.block_heads % shape.heads);
  header.profile = header.profile != 0 && shape.planes == 2;
  if (header.profile != 0 && basis_heads != 0)
    header.block_heads = static_cast<uint16_t>(basis_heads);
  const Plan plan(shape, header.pairs, header.block_heads);
  header.sections = static_cast<uint32_t>(plan.sections);
  std::memcpy(stream, &header, sizeof(header));
  if (bytes < plan.payload) return;
  uint64_t at = 0;
  const uint64_t room = bytes - plan.payload;
  for (size_t i = 0; i < plan.sections; ++i) {
    Section section;
    std::memcpy(&section, stream + plan.directory + i * sizeof(section), sizeof(section));
    section.offset = at;
    section.reserved = 0;
    if (i + 1 == plan.sections || section.bytes > room - at)
      section.bytes = static_cast<uint32_t>(room - at);
    at += section.bytes;
    std::memcpy(stream + plan.directory + i * sizeof(section), &section, sizeof(section));
  }
}

struct Levels {
  Pool pool{1};
  std::vector<std::pair<const CodecSimd*, const Simd*>> found;
  Levels() {
    for (const char* name : {"base", "avx2", "avx512"})
      if (codec_simd(name) != nullptr) found.emplace_back(codec_simd(name), simd(name));
  }
};

Levels& levels() {
  static Levels all;
  return all;
}

// Every level of this CPU gives the same checksum, however the bytes come.
void check_sums(const uint8_t* bytes, size_t size, size_t piece) {
  const uint64_t sum = xxh3_64(bytes, size, *levels().found[0].second);
  const std::unique_ptr<uint8_t[]> copy(new uint8_t[size]);
  for (const auto& level : levels().found) {
    Xxh3Cursor cursor(copy.get(), size, *level.second);
    for (size_t at = 0; at < size; at += piece)
      cursor.copy(copy.get() + at, bytes + at, std::min(piece, size - at), at, Store::cached,
                  {bytes + at});
    if (xxh3_64(bytes, size, *level.second) != sum || cursor.finish() != sum) std::abort();
  }
}

// What was decoded, if the stream was good.
struct Decoded {
  bool good;
  std::vector<uint8_t> bytes;
};

Decoded decoded(size_t level, const Shape& shape, Kind kind, const Profile* profile,
                const uint8_t* stream, size_t bytes, uint32_t first, uint32_t count) {
  const auto& [codec, simd] = levels().found[level];
  Decoded made{true, std::vector<uint8_t>(count * shape.layer_bytes(), 0x55)};
  try {
    decode({*codec, *simd, levels().pool}, shape, kind, profile, stream, bytes, made.bytes.data(),
           first, count);
  } catch (const BadStream&) {
    made.good = false;
  }
  return made;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < kChoice) return 0;
  const Shape shape = shape_of(data);
  const Kind kind = static_cast<Kind>(1 + data[0] % 4);
  const uint32_t basis_heads = basis_heads_of(data, shape);
  // In memory of exactly its size, so that the sanitizer sees every byte too far.
  const size_t bytes = size - kChoice;
  const std::unique_ptr<uint8_t[]> stream(new uint8_t[bytes]);
  std::memcpy(stream.get(), data + kChoice, bytes);
  const Profile* profile = shape.planes == 2 ? &known_profile(shape, basis_heads) : nullptr;
  Profile odd;
  if (profile != nullptr && (data[2] & 2) && bytes != 0 && profile->key_basis.size() <= 1 << 13)
    profile = &(odd = odd_profile(*profile, stream.get(), bytes));
  if (data[0] & 0x80) repair(stream.get(), bytes, shape, kind, basis_heads);
  const Decoded whole = decoded(0, shape, kind, profile, stream.get(), bytes, 0, shape.layers);
  for (size_t level = 1; level < levels().found.size(); ++level) {
    const Decoded other =
        decoded(level, shape, kind, profile, stream.get(), bytes, 0, shape.layers);
    if (other.good != whole.good || (whole.good && other.bytes != whole.bytes)) std::abort();
  }
  if (!(data[0] & 0x40)) return 0;
  const uint32_t first = (data[4] >> 3) % shape.layers;
  const uint32_t count = 1 + (data[5] >> 4) % (shape.layers - first);
  const size_t level = levels().found.size() - 1;
  const Decoded some = decoded(level, shape, kind, profile, stream.get(), bytes, first, count);
  const uint8_t* same = whole.bytes.data() + first * shape.layer_bytes();
  if (whole.good && (!some.good || std::memcmp(some.bytes.data(), same, some.bytes.size()) != 0))
    std::abort();
  try {
    codec::profile_of(stream.get(), bytes);
  } catch (const BadStream&) {
    if (whole.good) std::abort();
  }
  check_sums(stream.get(), bytes, 1 + data[5] * size_t{7});
  return 0;
}

#if defined(MAKE_CORPUS)
// Streams to start from: each codec, of chunks of different shapes. Usage: corpus DIRECTORY
int main(int, char** arguments) {
  uint32_t state = 1;
  const auto draw = [&state] { return state = state * 1664525 + 1013904223, state >> 8; };
  for (int number = 0; number < 400; ++number) {
    uint8_t choice[kChoice];
    for (uint8_t& byte : choice) byte = static_cast<uint8_t>(draw());
    const Shape shape = shape_of(choice);
    std::vector<uint8_t> chunk(shape.bytes());
    const bool noise = draw() % 8 == 0;
    for (size_t i = 0; i < chunk.size() / shape.itemsize(); ++i) {
      const float value = (static_cast<float>(draw() % 2001) - 1000.0f) / 250.0f *
                          (draw() % 500 == 0 ? 100.0f : 1.0f);
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      if (noise) bits = draw() * 2654435761u;
      if (shape.dtype == DType::bf16) bits >>= 16;
      if (shape.dtype == DType::f16) bits = 0x3000 + draw() % 0x1000 + (draw() % 2 << 15);
      std::memcpy(chunk.data() + i * shape.itemsize(), &bits, shape.itemsize());
    }
    Options options;
    options.kind = static_cast<Kind>(1 + choice[0] % 4);
    const size_t pairs = number % 3 == 0 ? 0 : shape.head_size / 2;
    for (size_t j = 0; j < pairs; ++j) options.turns.insert(options.turns.end(), {0.8, 0.6});
    options.interleaved = number % 2 == 0;
    options.first_raw = number % 3 - 1;
    const Profile profile = make_profile(shape, basis_heads_of(choice, shape));
    options.start = 256u * (draw() % 4);
    if (number % 4 != 3 && shape.planes == 2 && options.kind == Kind::values)
      options.profile = &profile;
    std::vector<uint8_t> into(max_encoded(shape, pairs));
    Levels& all = levels();
    const size_t bytes = encode({*all.found[0].first, *all.found[0].second, all.pool}, shape,
                                options, chunk.data(), into.data());
    std::ofstream file(std::string(arguments[1]) + "/" + std::to_string(number),
                       std::ios::binary);
    file.write(reinterpret_cast<const char*>(choice), kChoice);
    file.write(reinterpret_cast<const char*>(into.data()), static_cast<std::streamsize>(bytes));
  }
}
#endif
