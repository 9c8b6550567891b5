/* Prints the offsets that layout.rs holds, for the CPython whose headers it is compiled with:
 *
 *   P=/path/to/include/python3.X; cc -w -I$P -I$P/internal offsets.c -o offsets && ./offsets
 *
 * A test compares its output with the tables. For a new minor: compile this, add the row, see what no longer compiles.
 */
#define Py_BUILD_CORE 1
#include <Python.h>
#include <stddef.h>
#include <stdio.h>
#include <structmember.h>

#include "internal/pycore_pystate.h"
#if PY_VERSION_HEX >= 0x03090000
#include "internal/pycore_interp.h"
#include "internal/pycore_runtime.h"
#endif
#if PY_VERSION_HEX >= 0x030A0000
#include "internal/pycore_ceval.h"
#include "internal/pycore_moduleobject.h"
#else
/* Objects/moduleobject.c */
typedef struct {
    PyObject_HEAD
    PyObject *md_dict;
    void *md_def;
    void *md_state;
    PyObject *md_weaklist;
    PyObject *md_name;
} PyModuleObject;
#endif
#if PY_VERSION_HEX >= 0x030B0000
#include "internal/pycore_dict.h"
#else
/* Objects/dict-common.h */
struct _dictkeysobject {
    Py_ssize_t dk_refcnt;
    Py_ssize_t dk_size;
    void *dk_lookup;
    Py_ssize_t dk_usable;
    Py_ssize_t dk_nentries;
    char dk_indices[];
};
#endif
#if PY_VERSION_HEX < 0x030B0000
#include <frameobject.h>
#endif
#if PY_VERSION_HEX < 0x03090000
#include <code.h>
#endif

typedef struct _dictkeysobject PyDictKeysObject_;
typedef _PyRuntimeState PyRuntimeState;

#define NAMED(name, value) printf("%s %zu\n", name, (size_t)(value))
#define AT(type, field) NAMED(#type "." #field, offsetof(type, field))
#define SIZE(type) NAMED("sizeof." #type, sizeof(type))

int main(void) {
    NAMED("PY_VERSION_HEX", PY_VERSION_HEX);
    SIZE(PyObject);
    AT(PyObject, ob_type);
    AT(PyVarObject, ob_size);

    AT(PyFunctionObject, func_code);
    AT(PyFunctionObject, func_globals);
    AT(PyFunctionObject, func_name);
    AT(PyFunctionObject, func_qualname);
    AT(PyFunctionObject, func_module);
    AT(PyFunctionObject, func_dict);
    AT(PyFunctionObject, func_defaults);
    AT(PyFunctionObject, func_kwdefaults);
    AT(PyFunctionObject, func_closure);
    AT(PyFunctionObject, vectorcall);

    AT(PyCodeObject, co_flags);
    AT(PyCodeObject, co_argcount);
    AT(PyCodeObject, co_kwonlyargcount);
    AT(PyCodeObject, co_firstlineno);
    AT(PyCodeObject, co_name);
    AT(PyCodeObject, co_filename);
    AT(PyCodeObject, co_consts);

    SIZE(PyASCIIObject);
    SIZE(PyCompactUnicodeObject);
    AT(PyUnicodeObject, data);
    AT(PyASCIIObject, length);
    AT(PyASCIIObject, state);
    AT(PyBytesObject, ob_sval);
    AT(PyFloatObject, ob_fval);
    AT(PyTupleObject, ob_item);
    AT(PyListObject, ob_item);

    AT(PyDictObject, ma_used);
    AT(PyDictObject, ma_keys);
    AT(PyDictObject, ma_values);
    NAMED("PyDictKeysObject.dk_nentries", offsetof(PyDictKeysObject_, dk_nentries));
    NAMED("PyDictKeysObject.dk_indices", offsetof(PyDictKeysObject_, dk_indices));

    AT(PyTypeObject, tp_name);
    AT(PyTypeObject, tp_basicsize);
    AT(PyTypeObject, tp_itemsize);
    AT(PyTypeObject, tp_vectorcall_offset);
    AT(PyTypeObject, tp_flags);
    AT(PyTypeObject, tp_methods);
    AT(PyTypeObject, tp_base);
    AT(PyTypeObject, tp_dict);
    AT(PyTypeObject, tp_dictoffset);
    AT(PyTypeObject, tp_mro);
    AT(PyTypeObject, tp_version_tag);
    AT(PyTypeObject, tp_subclasses);
    AT(PyHeapTypeObject, ht_qualname);
    AT(PyHeapTypeObject, ht_cached_keys);

    AT(PyModuleObject, md_dict);
    AT(PyModuleObject, md_name);
    AT(PyCellObject, ob_ref);
    AT(PyMethodObject, im_func);
    AT(PyMethodObject, im_self);
    AT(PyMethodDescrObject, d_method);
    AT(PyMemberDescrObject, d_member);
    AT(PyMethodDef, ml_name);
    AT(PyMethodDef, ml_meth);
    SIZE(PyMethodDef);
    AT(PyCFunctionObject, m_ml);
    AT(PyMemberDef, type);
    AT(PyMemberDef, offset);
    AT(PyWeakReference, wr_object);

    AT(PyBaseExceptionObject, args);
    AT(PyBaseExceptionObject, traceback);
    AT(PyBaseExceptionObject, context);
    AT(PyBaseExceptionObject, cause);
    AT(PyBaseExceptionObject, suppress_context);
    SIZE(PyBaseExceptionObject);
    AT(PyTracebackObject, tb_next);
    AT(PyTracebackObject, tb_frame);
    AT(PyTracebackObject, tb_lasti);
    AT(PyTracebackObject, tb_lineno);

    AT(PyThreadState, next);
    AT(PyThreadState, interp);
    AT(PyThreadState, thread_id);
    AT(PyInterpreterState, next);
    AT(PyInterpreterState, id);
    AT(PyInterpreterState, sysdict);
    AT(PyInterpreterState, builtins);
    AT(PyInterpreterState, eval_frame);
    NAMED("PyRuntimeState.interpreters_head", offsetof(PyRuntimeState, interpreters.head));
    NAMED("PyRuntimeState.interpreters_main", offsetof(PyRuntimeState, interpreters.main));

#if PY_VERSION_HEX < 0x030B0000
    NAMED("PyDictKeysObject.dk_size", offsetof(PyDictKeysObject_, dk_size));
    NAMED("PyCodeObject.varnames", offsetof(PyCodeObject, co_varnames));
    NAMED("PyInterpreterState.threads_head", offsetof(PyInterpreterState, tstate_head));
#else
    NAMED("PyDictKeysObject.dk_log2_index_bytes", offsetof(PyDictKeysObject_, dk_log2_index_bytes));
    NAMED("PyDictKeysObject.dk_kind", offsetof(PyDictKeysObject_, dk_kind));
    NAMED("PyDictValues.values", offsetof(struct _dictvalues, values));
    NAMED("PyCodeObject.varnames", offsetof(PyCodeObject, co_localsplusnames));
    NAMED("PyInterpreterState.threads_head", offsetof(PyInterpreterState, threads.head));
    NAMED("PyInterpreterState.stack_size", offsetof(PyInterpreterState, threads.stacksize));
    AT(PyFunctionObject, func_version);
    AT(PyCodeObject, co_qualname);
    AT(PyCodeObject, co_code_adaptive);
    AT(PyThreadState, native_thread_id);
#endif
#if PY_VERSION_HEX < 0x030A0000
    NAMED("PyCodeObject.linetable", offsetof(PyCodeObject, co_lnotab));
#else
    NAMED("PyCodeObject.linetable", offsetof(PyCodeObject, co_linetable));
#endif
#if PY_VERSION_HEX >= 0x03090000
    NAMED("PyInterpreterState.recursion_limit", offsetof(PyInterpreterState, ceval.recursion_limit));
#endif
#if PY_VERSION_HEX >= 0x03090000 && PY_VERSION_HEX < 0x030B0000
    NAMED("PyInterpreterState.stack_size", offsetof(PyInterpreterState, pythread_stacksize));
#endif
#if PY_VERSION_HEX < 0x030C0000
    NAMED("sign_and_size", offsetof(PyVarObject, ob_size));
    NAMED("digits", offsetof(PyLongObject, ob_digit));
    NAMED("PyInterpreterState.modules", offsetof(PyInterpreterState, modules));
    NAMED("PyThreadState.exception", offsetof(PyThreadState, curexc_value));
    NAMED("PyThreadState.exception_type", offsetof(PyThreadState, curexc_type));
    NAMED("PyRuntimeState.tstate_current", offsetof(PyRuntimeState, gilstate.tstate_current));
#else
    NAMED("sign_and_size", offsetof(PyLongObject, long_value.lv_tag));
    NAMED("digits", offsetof(PyLongObject, long_value.ob_digit));
    NAMED("PyInterpreterState.modules", offsetof(PyInterpreterState, imports.modules));
    NAMED("PyThreadState.exception", offsetof(PyThreadState, current_exception));
    NAMED("PyInterpreterState.gil", offsetof(PyInterpreterState, ceval.gil));
    NAMED("gil.last_holder", offsetof(struct _gil_runtime_state, last_holder));
#endif
#if PY_VERSION_HEX >= 0x030D0000
    NAMED("PyInterpreterState.func_version_cache", offsetof(PyInterpreterState, func_state.func_version_cache));
    NAMED("func_version_cache.entries",
          sizeof(((PyInterpreterState *)0)->func_state.func_version_cache) / (2 * sizeof(void *)));
#endif
    return 0;
}
