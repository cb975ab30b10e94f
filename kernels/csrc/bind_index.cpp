// Python's way to the chunk index and the digest chain.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <map>
#include <optional>
#include <random>

#include "blake2b.hpp"
#include "chunk_index.hpp"
#include "python.hpp"

namespace lmcache {
namespace {

constexpr size_t kDigest = sizeof(Digest);
constexpr size_t kNoLimit = ~size_t{0};

Digest digest_of(nb::handle key) {
  const Buffer buffer(key, false);
  if (buffer.size() != static_cast<int64_t>(kDigest))
    refuse("a key has 16 bytes, not " + std::to_string(buffer.size()));
  Digest digest;
  std::memcpy(digest.data(), buffer.data(), kDigest);
  return digest;
}

uint32_t token(PyObject* item) {
  nb::object index;
  if (!PyLong_Check(item)) {
    // Its __index__ may be Python code that takes it out of the list.
    const nb::object kept = nb::borrow(item);
    index = nb::steal(PyNumber_Index(item));
    if (!index.is_valid()) throw nb::python_error();
    item = index.ptr();
  }
  const unsigned long value = PyLong_AsUnsignedLong(item);
  if (value == static_cast<unsigned long>(-1) && PyErr_Occurred()) throw nb::python_error();
  if (value > 0xFFFFFFFFu) {
    PyErr_SetString(PyExc_OverflowError, "a token id doesn't fit into 32 bits");
    throw nb::python_error();
  }
  return static_cast<uint32_t>(value);
}

using Extras = std::map<int64_t, std::vector<uint8_t>>;

Extras extras_of(const std::optional<nb::dict>& given) {
  Extras extras;
  if (given)
    for (const auto& [chunk, bytes] : *given) {
      const Buffer buffer(bytes, false);
      extras[integer(chunk)].assign(buffer.data(), buffer.data() + buffer.size());
    }
  return extras;
}

// The digest chain of lmcache_core.hashing, one chunk at a time.
class Chain {
 public:
  Chain(nb::handle parent, int64_t chunk_tokens, int64_t start, Extras extras)
      : extras_(std::move(extras)), index_(start) {
    if (chunk_tokens < 1 || chunk_tokens > (int64_t{1} << 30))
      refuse("a chunk can't have " + std::to_string(chunk_tokens) + " tokens");
    const Buffer buffer(parent, false);
    parent_.assign(buffer.data(), buffer.data() + buffer.size());
    chunk_bytes_ = static_cast<size_t>(chunk_tokens) * 4;
  }

  size_t chunk_bytes() const { return chunk_bytes_; }
  const std::vector<uint8_t>& digests() const { return digests_; }
  const uint8_t* last() const { return digests_.data() + digests_.size() - kDigest; }

  void add(const uint8_t* tokens) {
    Blake2b state(kDigest);
    state.update(parent_.data(), parent_.size());
    if (const auto extra = extras_.find(index_++); extra != extras_.end())
      state.update(extra->second.data(), extra->second.size());
    state.update(tokens, chunk_bytes_);
    digests_.resize(digests_.size() + kDigest);
    state.finish(digests_.data() + digests_.size() - kDigest);
    parent_.assign(last(), last() + kDigest);
  }

 private:
  Extras extras_;
  int64_t index_;
  size_t chunk_bytes_;
  std::vector<uint8_t> parent_, digests_;
};

// Feed the full chunks of `tokens` to `chain` while `go_on()` says so. Bytes, which are 32-bit
// little-endian tokens already, without the GIL; sequences of integers chunk by chunk, so that
// what needn't be digested isn't converted either.
template <class F>
void digest(Chain& chain, nb::handle tokens, F go_on) {
  const size_t size = chain.chunk_bytes();
  if (PyBytes_Check(tokens.ptr()) || PyByteArray_Check(tokens.ptr()) ||
      PyMemoryView_Check(tokens.ptr())) {
    const Buffer buffer(tokens, false);
    if (buffer.size() % 4 != 0)
      refuse(std::to_string(buffer.size()) +
             " bytes aren't a whole number of 32-bit token ids");
    nb::gil_scoped_release released;
    for (size_t at = 0; at + size <= static_cast<size_t>(buffer.size()); at += size) {
      chain.add(buffer.data() + at);
      if (!go_on()) return;
    }
    return;
  }
  const nb::object items = nb::steal(PySequence_Fast(tokens.ptr(), "tokens aren't a sequence"));
  if (!items.is_valid()) throw nb::python_error();
  const bool list = PyList_Check(items.ptr());
  const size_t count = nb::len(items), per_chunk = size / 4;
  std::vector<uint32_t> words(per_chunk);
  for (size_t at = 0; at + per_chunk <= count; at += per_chunk) {
    for (size_t i = 0; i < per_chunk; ++i) {
      const auto place = static_cast<Py_ssize_t>(at + i);
      PyObject* item =
          list ? PyList_GetItem(items.ptr(), place) : PyTuple_GetItem(items.ptr(), place);
      if (item == nullptr) throw nb::python_error();  // such code may also shorten the list
      words[i] = token(item);
    }
    chain.add(reinterpret_cast<const uint8_t*>(words.data()));
    if (!go_on()) return;
  }
}

nb::bytes bytes_of(const Chain& chain) {
  return nb::bytes(chain.digests().data(), chain.digests().size());
}

nb::bytes prefix_digests(nb::handle parent, nb::handle tokens, int64_t chunk_tokens,
                         const std::optional<nb::dict>& extras, int64_t start) {
  Chain chain(parent, chunk_tokens, start, extras_of(extras));
  digest(chain, tokens, [] { return true; });
  return bytes_of(chain);
}

nb::bytes blake2b(nb::handle data, int64_t digest_size) {
  if (digest_size < 1 || digest_size > 64)
    refuse("a digest has 1 to 64 bytes, not " + std::to_string(digest_size));
  const Buffer buffer(data, false);
  uint8_t out[64];
  Blake2b state(static_cast<size_t>(digest_size));
  state.update(buffer.data(), static_cast<size_t>(buffer.size()));
  state.finish(out);
  return nb::bytes(out, static_cast<size_t>(digest_size));
}

// Concatenated keys, from one bytes object or from a list or tuple of them.
std::vector<uint8_t> keys_of(nb::handle keys) {
  std::vector<uint8_t> joined;
  if (PyList_Check(keys.ptr()) || PyTuple_Check(keys.ptr())) {
    for (nb::handle key : keys) {
      const Digest digest = digest_of(key);
      joined.insert(joined.end(), digest.begin(), digest.end());
    }
    return joined;
  }
  const Buffer buffer(keys, false);
  if (buffer.size() % kDigest != 0)
    refuse(std::to_string(buffer.size()) + " bytes aren't a whole number of 16-byte keys");
  joined.assign(buffer.data(), buffer.data() + buffer.size());
  return joined;
}

uint32_t state_of(int64_t state) {
  if (state < 0 || state >= ChunkIndex::kStates)
    refuse("a state is 0 to 7, not " + std::to_string(state));
  return static_cast<uint32_t>(state);
}

size_t checked_chunks(int64_t chunks) {
  if (chunks < 1 || chunks >= ChunkIndex::kMostSlots)
    refuse("an index has room for 1 to 536870911 chunks, not " + std::to_string(chunks));
  return static_cast<size_t>(chunks);
}

class Index {
 public:
  explicit Index(int64_t chunks)
      : index_(checked_chunks(chunks), std::random_device{}() * 0x9E3779B97F4A7C15u +
                                           std::random_device{}()) {}

  bool insert(nb::handle key, int64_t slot, int64_t state) {
    if (slot < 0 || slot >= ChunkIndex::kMostSlots - 1)
      refuse("a slot is 0 to 536870910, not " + std::to_string(slot));
    switch (index_.insert(digest_of(key), static_cast<uint32_t>(slot), state_of(state))) {
      case ChunkIndex::Inserted::yes: return true;
      case ChunkIndex::Inserted::exists: return false;
      default:
        refuse("the index is full: it has room for " + std::to_string(index_.capacity()) +
               " chunks");
    }
  }
  int64_t find(nb::handle key) const { return index_.find(digest_of(key)); }
  int64_t state(nb::handle key) const { return index_.state(digest_of(key)); }
  bool set_state(nb::handle key, int64_t state) {
    return index_.set_state(digest_of(key), state_of(state));
  }
  int64_t erase(nb::handle key) { return index_.erase(digest_of(key)); }
  void clear() { index_.clear(); }

  size_t ready_prefix(nb::handle keys, int64_t ready) const {
    const std::vector<uint8_t> joined = keys_of(keys);
    const uint32_t state = state_of(ready);
    nb::gil_scoped_release released;
    return index_.prefix(joined.data(), joined.size() / kDigest, state, nullptr);
  }

  std::vector<uint32_t> ready_slots(nb::handle keys, int64_t ready) const {
    const std::vector<uint8_t> joined = keys_of(keys);
    const uint32_t state = state_of(ready);
    std::vector<uint32_t> slots;
    nb::gil_scoped_release released;
    index_.prefix(joined.data(), joined.size() / kDigest, state, &slots);
    return slots;
  }

  std::tuple<nb::bytes, size_t> match(nb::handle parent, nb::handle tokens, int64_t chunk_tokens,
                                      const std::optional<nb::dict>& extras, int64_t start,
                                      int64_t ready) const {
    Chain chain(parent, chunk_tokens, start, extras_of(extras));
    const uint32_t state = state_of(ready);
    size_t hits = 0;
    digest(chain, tokens, [&] {
      const size_t hit = index_.prefix(chain.last(), 1, state, nullptr);
      hits += hit;
      return hit == 1;
    });
    return {bytes_of(chain), hits};
  }

  bool contains(nb::handle key) const { return find(key) >= 0; }
  size_t size() const { return index_.size(); }
  size_t capacity() const { return index_.capacity(); }
  size_t nbytes() const { return index_.nbytes(); }

 private:
  ChunkIndex index_;
};

}  // namespace

void bind_index(nb::module_& module) {
  nb::class_<Index>(module, "ChunkIndex")
      .def(nb::init<int64_t>(), nb::arg("chunks"))
      .def("insert", &Index::insert, nb::arg("key"), nb::arg("slot"), nb::arg("state") = 0)
      .def("find", &Index::find, nb::arg("key"))
      .def("state", &Index::state, nb::arg("key"))
      .def("set_state", &Index::set_state, nb::arg("key"), nb::arg("state"))
      .def("erase", &Index::erase, nb::arg("key"))
      .def("clear", &Index::clear)
      .def("ready_prefix", &Index::ready_prefix, nb::arg("keys"), nb::arg("ready") = 0)
      .def("ready_slots", &Index::ready_slots, nb::arg("keys"), nb::arg("ready") = 0)
      .def("match", &Index::match, nb::arg("parent"), nb::arg("tokens"), nb::arg("chunk_tokens"),
           nb::arg("extras") = nb::none(), nb::arg("start") = 0, nb::arg("ready") = 0)
      .def("__contains__", &Index::contains, nb::arg("key"))
      .def("__len__", &Index::size)
      .def_prop_ro("capacity", &Index::capacity)
      .def_prop_ro("nbytes", &Index::nbytes);
  module.def("prefix_digests", &prefix_digests, nb::arg("parent"), nb::arg("tokens"),
             nb::arg("chunk_tokens"), nb::arg("extras") = nb::none(), nb::arg("start") = 0);
  module.def("blake2b", &blake2b, nb::arg("data"), nb::arg("digest_size"));
}

}  // namespace lmcache
