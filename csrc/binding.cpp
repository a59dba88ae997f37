// The module fusedres._C. Loading it registers the operators of the namespace fusedres_cpp, which each part declares
// beside its kernels.
#include "python_symbols.h"

#include <exception>

#include "cpu/activation.h"
#include "cpu/capability.h"
#include "cpu/kept.h"
#include "cpu/map_memory.h"
#include "tape.h"
#include "unchanged.h"

namespace {

PyObject* cpu_capability(PyObject*, PyObject*) {
  try {
    return PyUnicode_FromString(fusedres::capability_name(fusedres::cpu_capability()));
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
    return nullptr;
  }
}

// Appends a string to `list`; false, with the error set, where that fails.
bool append(PyObject* list, const char* text) {
  PyObject* string = PyUnicode_FromString(text);
  const bool appended = string != nullptr && PyList_Append(list, string) == 0;
  Py_XDECREF(string);
  return appended;
}

PyObject* cpu_capabilities(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  if (names == nullptr) return nullptr;
  for (auto capability : fusedres::kCapabilities) {
    if (!fusedres::capability_supported(capability) || append(names, fusedres::capability_name(capability))) continue;
    Py_DECREF(names);
    return nullptr;
  }
  return names;
}

PyObject* activations(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  if (names == nullptr) return nullptr;
  for (const char* name : fusedres::kActivationNames) {
    if (append(names, name)) continue;
    Py_DECREF(names);
    return nullptr;
  }
  return names;
}

PyObject* tape_operators(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  if (names == nullptr) return nullptr;
  for (int64_t i = 0; const char* name = fusedres::tape_operator_name(i); ++i) {
    if (append(names, name)) continue;
    Py_DECREF(names);
    return nullptr;
  }
  return names;
}

template <void (*kRun)(const void*)>
PyObject* with_address(PyObject*, PyObject* number) {
  const void* address = PyLong_AsVoidPtr(number);
  if (address == nullptr && PyErr_Occurred()) return nullptr;
  try {
    kRun(address);
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_MemoryError, error.what());
    return nullptr;
  }
  Py_RETURN_NONE;
}

PyObject* packed_bytes(PyObject*, PyObject*) { return PyLong_FromLongLong(fusedres::kept_bytes()); }

PyObject* map_bytes(PyObject*, PyObject*) { return PyLong_FromLongLong(fusedres::map_memory().held); }

PyObject* release_maps(PyObject*, PyObject*) {
  fusedres::release_maps();
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"cpu_capability", cpu_capability, METH_NOARGS,
     "The instruction set of the CPU kernels in this process: 'default', 'avx2', 'avx512' or 'avx512_bf16'; "
     "FUSEDRES_CPU_CAPABILITY overrides it."},
    {"cpu_capabilities", cpu_capabilities, METH_NOARGS, "The instruction sets that this CPU supports, the best last."},
    {"activations", activations, METH_NOARGS, "The names of the activations, each at the place that is its number."},
    {"tape_operators", tape_operators, METH_NOARGS,
     "The names of the operators that a recorded schedule may hold, each at the place that is its number."},
    {"unchanged", fusedres::unchanged, METH_VARARGS, fusedres::kUnchangedDoc},
    {"keep_packed", with_address<fusedres::keep_weight>, METH_O,
     "keep_packed(address)\n\nFrom now on forward convolutions keep the weight that begins there packed, for as long "
     "as "
     "its version stays the same. Nothing else may begin there until forget_packed."},
    {"forget_packed", with_address<fusedres::forget_weight>, METH_O, "forget_packed(address)\n\nEnds keep_packed."},
    {"packed_bytes", packed_bytes, METH_NOARGS, "Of all weights that are kept packed, as they are now."},
    {"map_bytes", map_bytes, METH_NOARGS, "Of the memory that maps lie in, and that is kept for the next ones."},
    {"release_maps", release_maps, METH_NOARGS, "Gives what is kept of it back to the system."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", "The C++ kernels of fusedres.", -1, methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
