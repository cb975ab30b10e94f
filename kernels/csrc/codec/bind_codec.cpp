// Python's way to the codecs: checks every argument, then works without the GIL.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>

#include "../python.hpp"
#include "format.hpp"

namespace lmcache {
namespace {

using codec::Kind;
using codec::Profile;
using codec::Shape;
using Sizes = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;

constexpr int64_t kMost = int64_t{1} << 32;  // bytes of a section, and numbers of most things

Shape shape_of(const Sizes& sizes) {
  const auto [dtype, layers, planes, heads, head_size, tokens] = sizes;
  if (dtype < 0 || dtype > 3) refuse("there is no dtype " + std::to_string(dtype));
  if (std::min({layers, planes, heads, head_size, tokens}) < 1 ||
      std::max({planes, heads}) > 65535 || std::max({layers, head_size, tokens}) >= kMost)
    refuse("a chunk has 1 to 65,535 planes and heads, and at least one of everything");
  const Shape shape{static_cast<codec::DType>(dtype), static_cast<uint32_t>(layers),
                    static_cast<uint32_t>(planes),    static_cast<uint32_t>(heads),
                    static_cast<uint32_t>(head_size), static_cast<uint32_t>(tokens)};
  unsigned __int128 bytes = shape.itemsize();
  for (const int64_t size : {head_size, tokens}) bytes *= static_cast<uint64_t>(size);
  if (bytes * codec::block_heads(shape) >= kMost) refuse("a head's tokens take 4 GiB or more");
  for (const int64_t size : {layers, planes, heads}) bytes *= static_cast<uint64_t>(size);
  if (bytes >> 48) refuse("a chunk is larger than 2^48 bytes");
  return shape;
}

Kind kind_of(int64_t number) {
  if (number < 1 || number > 4) refuse("there is no codec " + std::to_string(number));
  return static_cast<Kind>(number);
}

void check_size(const char* what, int64_t given, size_t needed) {
  if (static_cast<size_t>(given) != needed)
    refuse(std::string(what) + " has " + std::to_string(given) + " bytes, not " +
           std::to_string(needed));
}

template <class Number>
std::vector<Number> numbers(nb::handle bytes) {
  const Buffer source(bytes, false);
  const size_t count = static_cast<size_t>(source.size()) / sizeof(Number);
  std::vector<Number> made(count);
  if (count != 0) std::memcpy(made.data(), source.data(), count * sizeof(Number));
  return made;
}

// binary16, as a profile's file has it. Not finite is refused: sums must be the same everywhere.
std::vector<float> halves(nb::handle bytes) {
  const std::vector<uint16_t> source = numbers<uint16_t>(bytes);
  std::vector<float> made(source.size());
  if (codec::codec_simd()->widen(codec::DType::f16,
                                 reinterpret_cast<const uint8_t*>(source.data()), made.data(),
                                 made.size()))
    refuse("a profile's basis has numbers that aren't finite");
  return made;
}

Profile* make_profile(uint64_t id, nb::handle steps, nb::handle means, nb::handle key_means,
                      nb::handle value_gains, int64_t basis_heads, nb::handle key_basis,
                      nb::handle value_basis) {
  auto made = std::make_unique<Profile>();
  made->id = id;
  made->steps = numbers<float>(steps);
  made->means = numbers<uint16_t>(means);
  made->key_means = numbers<uint16_t>(key_means);
  made->value_gains = numbers<float>(value_gains);
  made->basis_heads = static_cast<uint32_t>(basis_heads);
  made->key_basis = halves(key_basis);
  made->value_basis = halves(value_basis);
  if (id == 0 || made->means.empty()) refuse("a profile has an id other than 0, and channels");
  if (basis_heads < 0 || basis_heads > 65535) refuse("a basis is of 0 to 65,535 heads");
  return made.release();
}

void check_count(const char* what, size_t given, size_t needed) {
  if (given != needed)
    refuse("a profile has " + std::to_string(given) + " " + what + ", and not " +
           std::to_string(needed) + " as this chunk");
}

void check_profile(const Profile* profile, const Shape& shape) {
  if (profile == nullptr) return;
  const size_t channels = size_t{shape.layers} * shape.heads * shape.head_size;
  if (shape.planes != 2) refuse("a profile is of keys and values, which this chunk hasn't got");
  check_count("steps", profile->steps.size(), channels);
  check_count("means", profile->means.size(), channels);
  if (!profile->key_means.empty() || profile->basis_heads != 0)
    check_count("means of keys", profile->key_means.size(), channels);
  if (!profile->value_gains.empty())
    check_count("gains", profile->value_gains.size(), shape.layers);
  if (profile->basis_heads > shape.heads) refuse("a profile's basis has more heads than a chunk");
  const size_t basis = shape.layers * profile->basis_size(shape);
  check_count("numbers in bases of keys", profile->key_basis.size(), basis);
  check_count("numbers in bases of values", profile->value_basis.size(), basis);
  const auto most = static_cast<unsigned __int128>(kMost) / shape.itemsize() / shape.head_size;
  if (static_cast<unsigned __int128>(profile->basis_heads) * shape.tokens >= most)
    refuse("a section's tokens take 4 GiB or more");
}

class Codec {
 public:
  Codec(int threads, const std::optional<std::string>& level)
      : codec_(codec::codec_simd(level ? level->c_str() : nullptr)),
        simd_(simd(level ? level->c_str() : nullptr)),
        pool_(checked(threads)) {
    if (codec_ == nullptr || simd_ == nullptr)
      refuse("this CPU, or this build, has no SIMD level " + *level);
  }

  size_t encode(int64_t kind, const Sizes& sizes, nb::handle chunk, nb::handle into,
                std::tuple<float, float> steps, nb::handle turns, bool interleaved, int first_raw,
                const Profile* profile, std::optional<int64_t> start) {
    const Shape shape = shape_of(sizes);
    const Buffer source(chunk, false), target(into, true), angles(turns, false);
    check_size("the chunk", source.size(), shape.bytes());
    codec::Options options;
    options.kind = kind_of(kind);
    std::tie(options.key_step, options.value_step) = steps;
    if (!(options.key_step > 0 && options.value_step > 0)) refuse("steps are positive");
    const size_t pairs = static_cast<size_t>(angles.size()) / 16;
    if (angles.size() % 16 != 0 || pairs > shape.head_size / 2)
      refuse("angles are pairs of float64, one for each two elements of a head at most");
    options.turns.resize(pairs * 2);
    if (pairs != 0) std::memcpy(options.turns.data(), angles.data(), pairs * 16);
    if (!codec::are_angles(options.turns.data(), pairs))
      refuse("angles are cosines and sines");
    options.interleaved = interleaved;
    options.first_raw = first_raw;
    if (start && *start >= 0 && *start < kMost) options.start = static_cast<uint32_t>(*start);
    check_profile(profile, shape);
    options.profile = options.kind == Kind::values ? profile : nullptr;
    const size_t room = codec::max_encoded(shape, pairs);
    if (static_cast<size_t>(target.size()) < room)
      refuse("encoding needs room for " + std::to_string(room) + " bytes, not " +
             std::to_string(target.size()));
    nb::gil_scoped_release released;
    return codec::encode({*codec_, *simd_, pool_}, shape, options, source.data(), target.data());
  }

  void decode(int64_t kind, const Sizes& sizes, nb::handle encoded, nb::handle into,
              const Profile* profile, int64_t first, std::optional<int64_t> layers) {
    const Shape shape = shape_of(sizes);
    const Buffer source(encoded, false), target(into, true);
    const int64_t count = layers.value_or(shape.layers - first);
    if (first < 0 || count < 1 || first > shape.layers || count > shape.layers - first)
      out_of_range("a chunk of " + std::to_string(shape.layers) + " layers has no layers " +
                   std::to_string(first) + " to " + std::to_string(first + count - 1));
    check_size("the buffer to decode into", target.size(),
               static_cast<size_t>(count) * shape.layer_bytes());
    check_profile(profile, shape);
    const Kind known = kind_of(kind);
    try {
      nb::gil_scoped_release released;
      codec::decode({*codec_, *simd_, pool_}, shape, known, profile, source.data(),
                    static_cast<size_t>(source.size()), target.data(),
                    static_cast<uint32_t>(first), static_cast<uint32_t>(count));
    } catch (const codec::BadStream& error) {
      refuse(error.what());
    }
  }

  const char* simd_name() const { return codec_->name; }
  int threads() const { return pool_.threads(); }

 private:
  static int checked(int threads) {
    if (threads < 1 || threads > 256) refuse("1 to 256 threads, not " + std::to_string(threads));
    return threads;
  }

  const codec::CodecSimd* codec_;
  const Simd* simd_;
  Pool pool_;
};

size_t max_encoded(const Sizes& sizes, int64_t pairs) {
  const Shape shape = shape_of(sizes);
  if (pairs < 0 || pairs > shape.head_size / 2) refuse("a head has no so many pairs");
  return codec::max_encoded(shape, static_cast<size_t>(pairs));
}

uint64_t profile_of(nb::handle encoded) {
  const Buffer source(encoded, false);
  try {
    return codec::profile_of(source.data(), static_cast<size_t>(source.size()));
  } catch (const codec::BadStream& error) {
    refuse(error.what());
  }
}

}  // namespace

void bind_codec(nb::module_& module) {
  nb::class_<Profile>(module, "CodecProfile")
      .def(nb::new_(&make_profile), nb::arg("id"), nb::arg("steps"), nb::arg("means"),
           nb::arg("key_means") = nb::bytes("", 0), nb::arg("value_gains") = nb::bytes("", 0),
           nb::arg("basis_heads") = 0, nb::arg("key_basis") = nb::bytes("", 0),
           nb::arg("value_basis") = nb::bytes("", 0));
  nb::class_<Codec>(module, "Codec")
      .def(nb::init<int, const std::optional<std::string>&>(), nb::arg("threads"),
           nb::arg("simd") = nb::none())
      .def("encode", &Codec::encode, nb::arg("kind"), nb::arg("shape"), nb::arg("chunk"),
           nb::arg("into"), nb::arg("steps"), nb::arg("turns"), nb::arg("interleaved"),
           nb::arg("first_raw"), nb::arg("profile").none(), nb::arg("start") = nb::none())
      .def("decode", &Codec::decode, nb::arg("kind"), nb::arg("shape"), nb::arg("encoded"),
           nb::arg("into"), nb::arg("profile").none(), nb::arg("first_layer") = 0,
           nb::arg("layers") = nb::none())
      .def_prop_ro("simd", &Codec::simd_name)
      .def_prop_ro("threads", &Codec::threads);
  module.def("codec_max_encoded", &max_encoded, nb::arg("shape"), nb::arg("pairs"));
  module.def("codec_profile_of", &profile_of, nb::arg("encoded"));
}

}  // namespace lmcache
