// What the bindings share: Python's buffers and integers, checked.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <string>

namespace lmcache {

namespace nb = nanobind;

// A contiguous buffer, held until the object goes. Needs the GIL to come and go.
class Buffer {
 public:
  Buffer(nb::handle object, bool writable) {
    if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_SIMPLE) != 0) throw nb::python_error();
    if (writable && view_.readonly) {
      PyBuffer_Release(&view_);
      throw nb::buffer_error("a buffer that is read-only can't be filled");
    }
  }
  Buffer(Buffer&& other) noexcept : view_(other.view_) { other.view_.obj = nullptr; }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
    if (view_.obj != nullptr) PyBuffer_Release(&view_);
  }

  uint8_t* data() const { return static_cast<uint8_t*>(view_.buf); }
  int64_t size() const { return view_.len; }

 private:
  Py_buffer view_{};
};

// Any integer, also a numpy one.
inline int64_t integer(nb::handle object) {
  const long long value = PyLong_AsLongLong(object.ptr());
  if (value == -1 && PyErr_Occurred()) throw nb::python_error();
  return value;
}

[[noreturn]] inline void refuse(const std::string& why) { throw nb::value_error(why.c_str()); }
[[noreturn]] inline void out_of_range(const std::string& why) { throw nb::index_error(why.c_str()); }

void bind_index(nb::module_& module);
void bind_codec(nb::module_& module);

}  // namespace lmcache
