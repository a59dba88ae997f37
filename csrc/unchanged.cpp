#include "unchanged.h"

#include <cstdint>
#include <cstring>

namespace fusedres {
namespace {

// Whether each object is of its class still and has its dictionary still: `three` holds object, class and dictionary in
// turn.
bool are_themselves(PyObject* three) {
  const Py_ssize_t n = PyTuple_Size(three);
  for (Py_ssize_t i = 0; i + 2 < n; i += 3) {
    PyObject* object = PyTuple_GetItem(three, i);
    if (reinterpret_cast<PyObject*>(Py_TYPE(object)) != PyTuple_GetItem(three, i + 1)) return false;
    PyObject* own = PyObject_GenericGetDict(object, nullptr);
    if (own == nullptr) {
      PyErr_Clear();
      return false;
    }
    Py_DECREF(own);  // compared only: the object keeps it
    if (own != PyTuple_GetItem(three, i + 2)) return false;
  }
  return true;
}

// Whether `mapping` holds `length` values, those from `at` on in `values`, and in that order; moves `at` behind them.
bool holds(PyObject* mapping, Py_ssize_t length, PyObject* values, Py_ssize_t& at) {
  if (PyDict_Size(mapping) != length) return false;
  PyObject *key = nullptr, *value = nullptr;
  for (Py_ssize_t position = 0; PyDict_Next(mapping, &position, &key, &value); ++at)
    if (value != PyTuple_GetItem(values, at)) return false;
  return true;
}

}  // namespace

const char kUnchangedDoc[] =
    "unchanged(three, mappings, lengths, values) -> bool\n\n"
    "Whether every object of `three` (object, class, __dict__ in turn) has that class and that __dict__ still, and the "
    "dictionaries `mappings` hold, one after the other, `lengths` (bytes, 32 bits each) values: the very objects of "
    "`values`. All but `lengths` are tuples.";

PyObject* unchanged(PyObject*, PyObject* args) {
  PyObject *three = nullptr, *mappings = nullptr, *lengths = nullptr, *values = nullptr;
  if (!PyArg_ParseTuple(args, "O!O!O!O!:unchanged", &PyTuple_Type, &three, &PyTuple_Type, &mappings, &PyBytes_Type,
                        &lengths, &PyTuple_Type, &values))
    return nullptr;
  const Py_ssize_t n = PyTuple_Size(mappings);
  const char* numbers = PyBytes_AsString(lengths);
  int64_t total = 0;
  for (Py_ssize_t i = 0; i < PyBytes_Size(lengths) / 4; ++i) {
    uint32_t length = 0;
    std::memcpy(&length, numbers + 4 * i, 4);
    total += length;
  }
  if (PyBytes_Size(lengths) != 4 * n || total != PyTuple_Size(values)) {
    PyErr_SetString(PyExc_ValueError, "unchanged wants one length for each mapping, and as many values as they say");
    return nullptr;
  }
  bool same = are_themselves(three);
  Py_ssize_t at = 0;
  for (Py_ssize_t i = 0; same && i < n; ++i) {
    PyObject* mapping = PyTuple_GetItem(mappings, i);
    if (!PyDict_Check(mapping)) {
      PyErr_SetString(PyExc_TypeError, "unchanged wants dictionaries as mappings");
      return nullptr;
    }
    uint32_t length = 0;
    std::memcpy(&length, numbers + 4 * i, 4);
    same = holds(mapping, static_cast<Py_ssize_t>(length), values, at);
  }
  return PyBool_FromLong(same);
}

}  // namespace fusedres
