// Python's way in: checks every argument, then moves bytes without the GIL.
//
// Nothing is read or written before all arguments of a call are known to be good.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <optional>

#include "paged.hpp"
#include "python.hpp"
#include "xxh3.hpp"

namespace lmcache {
namespace {

using Strides = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>;
using Address = std::tuple<int64_t, uint64_t, int64_t>;  // layer, address, bytes from there on

int64_t times(int64_t a, int64_t b) {
  int64_t product;
  if (__builtin_mul_overflow(a, b, &product)) refuse("a layout's sizes don't fit into 64 bits");
  return product;
}

int64_t plus(int64_t a, int64_t b) {
  int64_t sum;
  if (__builtin_add_overflow(a, b, &sum)) refuse("a layout's sizes don't fit into 64 bits");
  return sum;
}

// A `Layout` that was checked, and what must be known to check the rest.
struct CheckedLayout {
  Layout layout;
  int64_t layers, token_bytes, reach;

  CheckedLayout(int64_t layers, int64_t itemsize, int64_t blocks, int64_t block_tokens,
                int64_t heads, int64_t head_size, const std::vector<Strides>& planes)
      : layout{itemsize, blocks, block_tokens, heads, head_size, {}}, layers(layers), reach(0) {
    if (itemsize != 1 && itemsize != 2 && itemsize != 4)
      refuse("elements have 1, 2 or 4 bytes, not " + std::to_string(itemsize));
    if (std::min({layers, blocks, block_tokens, heads, head_size}) < 1 || planes.empty())
      refuse("a layout needs layers, planes, blocks, tokens, heads and dims");
    for (const auto& [offset, block, token, head, dim] : planes) {
      if (std::min({offset, block, token, head, dim}) < 0)
        refuse("a layout's offset and strides can't be negative");
      const int64_t last = plus(
          plus(plus(offset, times(blocks - 1, block)), times(block_tokens - 1, token)),
          plus(times(heads - 1, head), times(head_size - 1, dim)));
      reach = std::max(reach, times(plus(last, 1), itemsize));
      // Strides of a dimension of one may be anything, and are never used.
      layout.planes.push_back({times(offset, itemsize), blocks == 1 ? 0 : times(block, itemsize),
                               block_tokens == 1 ? 0 : times(token, itemsize),
                               heads == 1 ? 0 : times(head, itemsize),
                               head_size == 1 ? 0 : times(dim, itemsize)});
    }
    const int64_t row = times(times(heads, head_size), itemsize);
    token_bytes = times(times(row, static_cast<int64_t>(planes.size())), layers);
  }
};

// Names of BlockSpan's attributes.
struct Names {
  nb::object blocks = intern("blocks"), first = intern("first"), tokens = intern("tokens"),
             chunk_tokens = intern("chunk_tokens"), chunk_offset = intern("chunk_offset");
  static nb::object intern(const char* name) {
    return nb::steal(PyUnicode_InternFromString(name));
  }
};

const Names* interned() {
  static const Names* names = new Names;  // as long-lived as the interpreter's own strings
  return names;
}

int64_t attribute(nb::handle object, const nb::object& name) {
  nb::object value = nb::steal(PyObject_GetAttr(object.ptr(), name.ptr()));
  if (!value.is_valid()) throw nb::python_error();
  return integer(value);
}

// All arguments of one call, checked. Holds the buffers.
class Arguments {
 public:
  Arguments(const CheckedLayout& checked, const std::vector<Address>& layers, nb::handle spans,
            nb::handle buffers, bool writable)
      : checked_(checked), writable_(writable) {
    for (const auto& [position, address, room] : layers) {
      if (position < 0 || position >= checked.layers)
        out_of_range("there is no layer " + std::to_string(position) + " among " +
                     std::to_string(checked.layers));
      if (room < checked.reach)
        refuse("the layout reaches byte " + std::to_string(checked.reach) + " of layer " +
               std::to_string(position) + ", whose tensor has " + std::to_string(room));
      this->layers.push_back({reinterpret_cast<uint8_t*>(address), position});
    }
    const nb::object own_spans = fast(spans), own_buffers = fast(buffers);
    const size_t count = nb::len(own_spans);
    if (count != nb::len(own_buffers))
      refuse(std::to_string(count) + " spans for " + std::to_string(nb::len(own_buffers)) +
             " buffers");
    buffers_.reserve(count);
    for (size_t i = 0; i < count; ++i) add(own_spans[i], own_buffers[i]);
    for (size_t i = 0; i < count; ++i) this->spans[i].blocks = blocks_.data() + starts_[i];
  }

  std::vector<Layer> layers;
  std::vector<Span> spans;

 private:
  static nb::object fast(nb::handle sequence) {
    nb::object items = nb::steal(PySequence_Fast(sequence.ptr(), "not a sequence"));
    if (!items.is_valid()) throw nb::python_error();
    return items;
  }

  void add(nb::handle object, nb::handle buffer) {
    const Names* names = interned();
    const int64_t first = attribute(object, names->first);
    const int64_t tokens = attribute(object, names->tokens);
    const int64_t chunk_tokens = attribute(object, names->chunk_tokens);
    const int64_t offset = attribute(object, names->chunk_offset);
    const auto text = [&] { return std::string(nb::repr(object).c_str()); };
    buffers_.emplace_back(buffer, writable_);
    int64_t needed;
    if (__builtin_mul_overflow(chunk_tokens, checked_.token_bytes, &needed) ||
        needed != buffers_.back().size())
      refuse("a chunk of " + std::to_string(chunk_tokens) + " tokens has " +
             (needed < 0 ? std::string("too many") : std::to_string(needed)) +
             " bytes, the buffer " + std::to_string(buffers_.back().size()));
    if (offset < 0 || tokens > chunk_tokens || offset > chunk_tokens - std::max<int64_t>(tokens, 0))
      refuse(text() + " doesn't lie inside its chunk");
    if (first < 0 || tokens < 1) refuse(text() + " has no tokens or starts before its blocks");
    const int64_t size = checked_.layout.block_tokens;
    starts_.push_back(blocks_.size());
    add_blocks(object, first / size, (first % size + tokens - 1) / size + 1, text);
    spans.push_back({first % size, tokens, chunk_tokens, offset, nullptr, buffers_.back().data()});
  }

  // Blocks `from` ... `from + count - 1` of the span.
  template <class Text>
  void add_blocks(nb::handle object, int64_t from, int64_t count, Text text) {
    const Names* names = interned();
    nb::object named = nb::steal(PyObject_GetAttr(object.ptr(), names->blocks.ptr()));
    if (!named.is_valid()) throw nb::python_error();
    const Py_ssize_t length = PySequence_Size(named.ptr());
    if (length < 0) throw nb::python_error();
    if (count > length || from > length - count)
      refuse(text() + " needs more blocks of " + std::to_string(checked_.layout.block_tokens) +
             " tokens than it names");
    for (int64_t i = from; i < from + count; ++i) {
      nb::object item = nb::steal(PySequence_GetItem(named.ptr(), static_cast<Py_ssize_t>(i)));
      if (!item.is_valid()) throw nb::python_error();
      const int64_t block = integer(item);
      if (block < 0 || block >= checked_.layout.blocks)
        out_of_range(text() + ": there are " + std::to_string(checked_.layout.blocks) + " blocks");
      blocks_.push_back(block);
    }
  }

  const CheckedLayout& checked_;
  const bool writable_;
  std::vector<Buffer> buffers_;
  std::vector<int64_t> blocks_;
  std::vector<size_t> starts_;
};

const Simd& level(const std::optional<std::string>& name) {
  const Simd* found = simd(name ? name->c_str() : nullptr);
  if (found == nullptr) refuse("this CPU, or this build, has no SIMD level " + *name);
  return *found;
}

// The threads and the instruction set that calls use.
class Engine {
 public:
  Engine(int threads, const std::optional<std::string>& simd)
      : simd_(level(simd)), pool_(checked(threads)) {}

  nb::object gather(const CheckedLayout& layout, const std::vector<Address>& layers,
                    nb::handle spans, nb::handle into, bool sums) {
    const Arguments arguments(layout, layers, spans, into, true);
    std::vector<uint64_t> hashes(sums ? arguments.spans.size() * arguments.layers.size() : 0);
    {
      nb::gil_scoped_release released;
      const Transfer transfer{layout.layout, arguments.layers, arguments.spans, simd_};
      transfer.gather(pool_, sums ? hashes.data() : nullptr);
    }
    if (!sums) return nb::none();
    nb::list answer;
    for (size_t i = 0; i < arguments.spans.size(); ++i)
      answer.append(nb::bytes(hashes.data() + i * arguments.layers.size(),
                              arguments.layers.size() * sizeof(uint64_t)));
    return answer;
  }

  // The positions of the chunks whose layers' checksums aren't as expected. They were scattered too.
  std::vector<size_t> scatter(nb::handle sources, const CheckedLayout& layout,
                              const std::vector<Address>& layers, nb::handle spans,
                              const std::optional<std::vector<nb::bytes>>& expected) {
    const Arguments arguments(layout, layers, spans, sources, false);
    const size_t count = arguments.spans.size(), width = arguments.layers.size();
    std::vector<uint64_t> wanted(expected ? count * width : 0), sums(wanted.size());
    if (expected) {
      if (expected->size() != count)
        refuse(std::to_string(expected->size()) + " checksums for " + std::to_string(count) +
               " spans");
      for (size_t i = 0; i < count; ++i) {
        const nb::bytes& one = (*expected)[i];
        if (one.size() != width * sizeof(uint64_t))
          refuse(std::to_string(one.size()) + " bytes aren't the checksums of " +
                 std::to_string(width) + " layers");
        std::memcpy(&wanted[i * width], one.data(), one.size());
      }
    }
    nb::gil_scoped_release released;
    const Transfer transfer{layout.layout, arguments.layers, arguments.spans, simd_};
    transfer.scatter(pool_, expected ? sums.data() : nullptr);
    std::vector<size_t> bad;
    for (size_t i = 0; expected && i < count; ++i)
      if (!std::equal(&sums[i * width], &sums[i * width] + width, &wanted[i * width]))
        bad.push_back(i);
    return bad;
  }

  nb::bytes checksums(nb::handle object, int64_t pieces) {
    const Buffer buffer(object, false);
    if (pieces < 1 || buffer.size() % pieces != 0)
      refuse(std::to_string(buffer.size()) + " bytes can't be cut into " + std::to_string(pieces) +
             " equal pieces");
    std::vector<uint64_t> sums(static_cast<size_t>(pieces));
    {
      nb::gil_scoped_release released;
      hash_pieces(pool_, simd_, buffer.data(), static_cast<size_t>(buffer.size() / pieces),
                  sums.size(), sums.data());
    }
    return nb::bytes(sums.data(), sums.size() * sizeof(uint64_t));
  }

  const char* simd_name() const { return simd_.name; }
  int threads() const { return pool_.threads(); }

 private:
  static int checked(int threads) {
    if (threads < 1 || threads > 256) refuse("1 to 256 threads, not " + std::to_string(threads));
    return threads;
  }

  const Simd& simd_;
  Pool pool_;
};

uint64_t xxh3_of(nb::handle data, const std::optional<std::string>& simd) {
  const Buffer buffer(data, false);
  const Simd& chosen = level(simd);
  nb::gil_scoped_release released;
  return xxh3_64(buffer.data(), static_cast<size_t>(buffer.size()), chosen);
}

std::vector<std::string> levels() {
  std::vector<std::string> found;
  for (const char* name : {"avx512", "avx2", "base"})
    if (simd(name) != nullptr) found.emplace_back(name);
  return found;
}

}  // namespace
}  // namespace lmcache

NB_MODULE(_native, module) {
  using namespace lmcache;
  // Engines keep their connectors until the interpreter is gone. That isn't worth a warning.
  nb::set_leak_warnings(false);
  nb::class_<CheckedLayout>(module, "Layout")
      .def(nb::init<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                    const std::vector<Strides>&>(),
           nb::arg("layers"), nb::arg("itemsize"), nb::arg("blocks"), nb::arg("block_tokens"),
           nb::arg("heads"), nb::arg("head_size"), nb::arg("planes"));
  nb::class_<Engine>(module, "Engine")
      .def(nb::init<int, const std::optional<std::string>&>(), nb::arg("threads"),
           nb::arg("simd") = nb::none())
      .def("gather", &Engine::gather, nb::arg("layout"), nb::arg("layers"), nb::arg("spans"),
           nb::arg("into"), nb::arg("sums"))
      .def("scatter", &Engine::scatter, nb::arg("sources"), nb::arg("layout"), nb::arg("layers"),
           nb::arg("spans"), nb::arg("expected").none())
      .def("checksums", &Engine::checksums, nb::arg("buffer"), nb::arg("pieces"))
      .def_prop_ro("simd", &Engine::simd_name)
      .def_prop_ro("threads", &Engine::threads);
  module.def(
      "address_of",
      [](nb::handle buffer, bool writable) {
        const Buffer held(buffer, writable);
        return std::make_tuple(reinterpret_cast<uint64_t>(held.data()), held.size());
      },
      nb::arg("buffer"), nb::arg("writable"));
  module.def("xxh3_64", &xxh3_of, nb::arg("data"), nb::arg("simd") = nb::none());
  module.def("simd_levels", &levels);
  bind_index(module);
  bind_codec(module);
}
