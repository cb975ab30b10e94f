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
#include "slot_ring.hpp"

namespace lmcache {
namespace {

constexpr size_t kDigest = sizeof(Digest);

Digest digest_of(nb::handle key) {
  const Buffer buffer(key, false);
  if (buffer.size() != static_cast<int64_t>(kDigest))
    refuse("a key has 16 bytes, not " + std::to_string(buffer.size()));
  Digest digest;
  std::memcpy(digest.data(), buffer.data(), kDigest);
  return digest;
}

constexpr char kIds[] = "token ids are integers from 0 to 4294967295";

[[noreturn]] void no_token(PyObject* kind, nb::handle item, const char* remedy) {
  const std::string why = std::string("tokens: ") + nb::repr(item).c_str() + ", and " + kIds + remedy;
  PyErr_SetString(kind, why.c_str());
  throw nb::python_error();
}

uint32_t token(PyObject* item) {
  nb::object index;
  if (!PyLong_Check(item)) {
    // Its __index__ may be Python code that takes it out of the list.
    const nb::object kept = nb::borrow(item);
    index = nb::steal(PyNumber_Index(item));
    if (!index.is_valid()) {
      if (!PyErr_ExceptionMatches(PyExc_TypeError)) throw nb::python_error();
      PyErr_Clear();
      no_token(PyExc_TypeError, kept, "");
    }
    item = index.ptr();
  }
  const unsigned long value = PyLong_AsUnsignedLong(item);
  const bool failed = value == static_cast<unsigned long>(-1) && PyErr_Occurred() != nullptr;
  if (failed) PyErr_Clear();
  if (failed || value > 0xFFFFFFFFu)
    no_token(PyExc_OverflowError, item, ": leave padding and placeholders out");
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

// The digest chain of lmcache_core.chunks.hashing, one chunk at a time.
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

// What tokens may be is said once, in core. Packed ids and lists of integers are what it mostly is,
// and a call of Python costs them a tenth of a lookup whose code isn't in the CPU's cache.
nb::object plain(nb::handle tokens) {
  if (PyBytes_CheckExact(tokens.ptr()) && PyBytes_GET_SIZE(tokens.ptr()) % 4 == 0)
    return nb::borrow(tokens);
  if (PyList_CheckExact(tokens.ptr())) {
    const Py_ssize_t count = PyList_GET_SIZE(tokens.ptr());
    if (count == 0 || (PyLong_CheckExact(PyList_GET_ITEM(tokens.ptr(), 0)) &&
                       PyLong_CheckExact(PyList_GET_ITEM(tokens.ptr(), count - 1))))
      return nb::borrow(tokens);
  }
  return nb::module_::import_("lmcache_core.chunks.tokens").attr("plain")(tokens);
}

// Feed the full chunks of `tokens` to `chain` while `go_on()` says so. Bytes, which are 32-bit
// little-endian tokens already, without the GIL; sequences of integers chunk by chunk, so that
// what needn't be digested isn't converted either.
template <class F>
void digest(Chain& chain, nb::handle given, F go_on) {
  const nb::object tokens = plain(given);
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

size_t checked_slots(int64_t slots) {
  if (slots < 1 || slots > ChunkIndex::kMostSlots)
    refuse("an index has 1 to " + std::to_string(ChunkIndex::kMostSlots) + " slots, not " +
           std::to_string(slots));
  return static_cast<size_t>(slots);
}

uint64_t random_seed() {
  std::random_device draw;
  return uint64_t{draw()} << 32 | draw();
}

class Index {
 public:
  explicit Index(int64_t slots) : index_(checked_slots(slots), random_seed()) {}

  void insert(nb::handle key, int64_t slot, int64_t parent, int64_t state) {
    const uint32_t to = slot_of(slot);
    if (parent != ChunkIndex::kNone) slot_of(parent);
    switch (index_.insert(digest_of(key), to, parent, state_of(state))) {
      case ChunkIndex::Inserted::yes: return;
      case ChunkIndex::Inserted::exists: refuse("the index has this key already");
      case ChunkIndex::Inserted::occupied:
        refuse("slot " + std::to_string(slot) + " holds a chunk already");
      case ChunkIndex::Inserted::orphan:
        refuse("slot " + std::to_string(parent) + " holds no chunk that could be continued");
    }
  }

  int64_t find(nb::handle key) const { return index_.find(digest_of(key)); }

  nb::object key(int64_t slot) const {
    Digest digest;
    if (!index_.key(slot_of(slot), &digest)) return nb::none();
    return nb::bytes(digest.data(), digest.size());
  }

  uint32_t state(int64_t slot) const { return index_.state(slot_of(slot)); }

  void set_state(int64_t slot, int64_t state) {
    if (!index_.set_state(slot_of(slot), state_of(state))) nothing_in(slot);
  }

  void remove(int64_t slot) {
    if (!index_.remove(slot_of(slot))) nothing_in(slot);
  }

  int64_t leaf(int64_t slot) const {
    const int64_t found = index_.leaf(slot_of(slot));
    if (found == ChunkIndex::kNone) nothing_in(slot);
    return found;
  }

  std::vector<uint32_t> descendants(int64_t slot) const {
    return index_.descendants(slot_of(slot));
  }

  std::vector<uint32_t> ready_slots(nb::handle keys) const {
    const std::vector<uint8_t> joined = keys_of(keys);
    std::vector<uint32_t> slots;
    nb::gil_scoped_release released;
    index_.prefix(joined.data(), joined.size() / kDigest, kReady, &slots);
    return slots;
  }

  std::tuple<nb::bytes, std::vector<uint32_t>> match(nb::handle parent, nb::handle tokens,
                                                     int64_t chunk_tokens,
                                                     const std::optional<nb::dict>& extras,
                                                     int64_t start) const {
    Chain chain(parent, chunk_tokens, start, extras_of(extras));
    std::vector<uint32_t> slots;
    digest(chain, tokens,
           [&] { return index_.prefix(chain.last(), 1, kReady, &slots) == 1; });
    return {bytes_of(chain), slots};
  }

  size_t size() const { return index_.size(); }
  size_t slots() const { return index_.slots(); }
  size_t nbytes() const { return index_.nbytes(); }

 private:
  static constexpr uint32_t kReady = 3;  // lmcache_core.chunks.chunk_index.ChunkState

  uint32_t slot_of(int64_t slot) const {
    if (slot < 0 || static_cast<uint64_t>(slot) >= index_.slots())
      out_of_range("slot " + std::to_string(slot) + ": there are " +
                   std::to_string(index_.slots()));
    return static_cast<uint32_t>(slot);
  }

  static uint32_t state_of(int64_t state) {
    if (state <= ChunkIndex::kAbsent || state >= ChunkIndex::kStates)
      refuse("a state is 1 to 7, not " + std::to_string(state));
    return static_cast<uint32_t>(state);
  }

  [[noreturn]] static void nothing_in(int64_t slot) {
    refuse("slot " + std::to_string(slot) + " holds no chunk");
  }

  ChunkIndex index_;
};

// Guarded by the GIL, which none of its methods gives up.
class Ring {
 public:
  void added(int64_t slot) {
    if (slot < 0 || slot >= SlotRing::kMostSlots)
      refuse("a slot is 0 to " + std::to_string(SlotRing::kMostSlots - 1) + ", not " +
             std::to_string(slot));
    if (!ring_.add(static_cast<uint32_t>(slot)))
      refuse("slot " + std::to_string(slot) + " holds a chunk already");
  }

  void touched(nb::handle slots) {
    for (nb::handle slot : nb::borrow<nb::object>(slots))
      if (!ring_.touch(known(slot))) unknown(slot);
  }

  void check(nb::handle slots) const {
    for (nb::handle slot : nb::borrow<nb::object>(slots))
      if (!ring_.contains(known(slot))) unknown(slot);
  }

  void removed(nb::handle slot) {
    if (!ring_.remove(known(slot))) unknown(slot);
  }

  void clear() { ring_.clear(); }
  int64_t after(int64_t slot) const { return ring_.after(held(slot)); }
  int64_t before(int64_t slot) const { return ring_.before(held(slot)); }
  size_t size() const { return ring_.size(); }
  size_t nbytes() const { return ring_.nbytes(); }

 private:
  static uint32_t known(nb::handle slot) {
    const int64_t number = integer(slot);
    return number < 0 || number >= SlotRing::kMostSlots ? SlotRing::kMostSlots
                                                        : static_cast<uint32_t>(number);
  }

  int64_t held(int64_t slot) const {
    if (slot != SlotRing::kNone && (slot < 0 || slot >= SlotRing::kMostSlots ||
                                    !ring_.contains(static_cast<uint32_t>(slot))))
      out_of_range("slot " + std::to_string(slot) + " isn't in the order");
    return slot;
  }

  [[noreturn]] static void unknown(nb::handle slot) {
    PyErr_SetObject(PyExc_KeyError, slot.ptr());
    throw nb::python_error();
  }

  SlotRing ring_;
};

}  // namespace

void bind_index(nb::module_& module) {
  nb::class_<Index>(module, "ChunkIndex")
      .def(nb::init<int64_t>(), nb::arg("slots"))
      .def("insert", &Index::insert, nb::arg("key"), nb::arg("slot"), nb::arg("parent"),
           nb::arg("state"))
      .def("find", &Index::find, nb::arg("key"))
      .def("key", &Index::key, nb::arg("slot"))
      .def("state", &Index::state, nb::arg("slot"))
      .def("set_state", &Index::set_state, nb::arg("slot"), nb::arg("state"))
      .def("remove", &Index::remove, nb::arg("slot"))
      .def("leaf", &Index::leaf, nb::arg("slot"))
      .def("descendants", &Index::descendants, nb::arg("slot"))
      .def("ready_slots", &Index::ready_slots, nb::arg("keys"))
      .def("match", &Index::match, nb::arg("parent"), nb::arg("tokens"), nb::arg("chunk_tokens"),
           nb::arg("extras") = nb::none(), nb::arg("start") = 0)
      .def_static("digests", &prefix_digests, nb::arg("parent"), nb::arg("tokens"),
                  nb::arg("chunk_tokens"), nb::arg("extras") = nb::none(), nb::arg("start") = 0)
      .def("__len__", &Index::size)
      .def_prop_ro("slots", &Index::slots)
      .def_prop_ro("nbytes", &Index::nbytes);
  nb::class_<Ring>(module, "SlotRing")
      .def(nb::init<>())
      .def("added", &Ring::added, nb::arg("slot"))
      .def("touched", &Ring::touched, nb::arg("slots"))
      .def("check", &Ring::check, nb::arg("slots"))
      .def("removed", &Ring::removed, nb::arg("slot"))
      .def("clear", &Ring::clear)
      .def("after", &Ring::after, nb::arg("slot"))
      .def("before", &Ring::before, nb::arg("slot"))
      .def("__len__", &Ring::size)
      .def_prop_ro("nbytes", &Ring::nbytes);
  module.def("blake2b", &blake2b, nb::arg("data"), nb::arg("digest_size"));
}

}  // namespace lmcache
