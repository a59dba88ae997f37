// Whether Python objects are the very same ones as before.
#pragma once

#include "python_symbols.h"

namespace fusedres {

extern const char kUnchangedDoc[];

PyObject* unchanged(PyObject* module, PyObject* args);

}  // namespace fusedres
