// The module fusedres._C. Importing it registers the operators of the namespace fusedres_cpp, which each part declares beside its kernels.
#include <Python.h>

#include <exception>

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

PyObject* cpu_capabilities(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  if (names == nullptr) return nullptr;
  for (auto capability : fusedres::kCapabilities) {
    if (!fusedres::capability_supported(capability)) continue;
    PyObject* name = PyUnicode_FromString(fusedres::capability_name(capability));
    if (name == nullptr || PyList_Append(names, name) < 0) {
      Py_XDECREF(name);
      Py_DECREF(names);
      return nullptr;
    }
    Py_DECREF(name);
  }
  return names;
}

PyMethodDef methods[] = {
    {"cpu_capability", cpu_capability, METH_NOARGS,
     "The instruction set of the CPU kernels in this process: 'default', 'avx2', 'avx512' or 'avx512_bf16'; FUSEDRES_CPU_CAPABILITY overrides it."},
    {"cpu_capabilities", cpu_capabilities, METH_NOARGS, "The instruction sets that this CPU supports, the best last."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", "The C++ kernels of fusedres.", -1, methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
