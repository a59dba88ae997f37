// Python, for the two files that know of it. A program without Python loads the library for its operators alone: what
// is used of Python is absent there then, instead of an error, and nobody calls what uses it.
#pragma once

#include <Python.h>

#pragma weak PyArg_ParseTuple
#pragma weak PyBool_FromLong
#pragma weak PyBytes_AsString
#pragma weak PyBytes_Size
#pragma weak PyBytes_Type
#pragma weak PyDict_Next
#pragma weak PyDict_Size
#pragma weak PyErr_Clear
#pragma weak PyErr_Occurred
#pragma weak PyErr_SetString
#pragma weak PyExc_MemoryError
#pragma weak PyExc_TypeError
#pragma weak PyExc_ValueError
#pragma weak PyList_Append
#pragma weak PyList_New
#pragma weak PyLong_AsVoidPtr
#pragma weak PyLong_FromLongLong
#pragma weak PyModule_Create2
#pragma weak PyObject_GenericGetDict
#pragma weak PyTuple_GetItem
#pragma weak PyTuple_Size
#pragma weak PyTuple_Type
#pragma weak PyType_GetFlags
#pragma weak PyUnicode_FromString
#pragma weak _Py_Dealloc
#pragma weak _Py_NoneStruct
