// The module fusedres._C. Loading it registers the operators of the namespace fusedres_cpp, which each part declares
// beside its kernels. A program without Python loads it for these alone: what it uses of Python's is absent there then,
// instead of an error, and nobody calls what is in this file.
#include <Python.h>

#pragma weak PyErr_SetString
#pragma weak PyExc_ValueError
#pragma weak PyList_Append
#pragma weak PyList_New
#pragma weak PyModule_Create2
#pragma weak PyUnicode_FromString
#pragma weak _Py_Dealloc

#include <exception>

#include "cpu/activation.h"
#include "cpu/capability.h"

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

PyMethodDef methods[] = {
    {"cpu_capability", cpu_capability, METH_NOARGS,
     "The instruction set of the CPU kernels in this process: 'default', 'avx2', 'avx512' or 'avx512_bf16'; "
     "FUSEDRES_CPU_CAPABILITY overrides it."},
    {"cpu_capabilities", cpu_capabilities, METH_NOARGS, "The instruction sets that this CPU supports, the best last."},
    {"activations", activations, METH_NOARGS, "The names of the activations, each at the place that is its number."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", "The C++ kernels of fusedres.", -1, methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
