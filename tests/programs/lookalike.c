/* A program that has every name by which a CPython is known, and nothing behind them but lies. VERSION is what it says it is;
   0: a version that does not say.

   lookalike KIND     zero: nothing is there; self: everything leads to itself; wild: everything leads nowhere

   Prints whether its memory is as it was made. */
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { WORDS = 1024, FLAGS = 21, VECTORCALL_OFFSET = 7 };

#define TYPES(X) \
    X(PyFunction_Type) X(PyCode_Type) X(PyType_Type) X(PyModule_Type) X(PyUnicode_Type) X(PyFloat_Type) X(PyBool_Type) \
    X(_Py_NoneStruct) X(PyCell_Type) X(PyMethod_Type) X(PyStaticMethod_Type) X(PyClassMethod_Type) X(PyProperty_Type) \
    X(PyCFunction_Type) X(PyMethodDescr_Type) X(PyMemberDescr_Type) X(PyCapsule_Type) X(PyBytes_Type) X(PyTuple_Type) \
    X(PyDict_Type) X(PyList_Type)

#define DEFINE(name) uint64_t name[WORDS];
TYPES(DEFINE)
uint64_t _PyRuntime[WORDS * 64];
#if VERSION
const unsigned long Py_Version = VERSION;
#endif

static uint64_t knot[WORDS];

#define FUNCTION(name) __attribute__((noinline)) void *name(void *object) { __asm__ volatile("" ::: "memory"); return object; }
FUNCTION(_PyEval_EvalFrameDefault)
FUNCTION(PyObject_Malloc)
FUNCTION(PyEval_SaveThread)
FUNCTION(PyEval_RestoreThread)
FUNCTION(Py_SetRecursionLimit)
FUNCTION(Py_Initialize)
FUNCTION(PyFunction_NewWithQualName)
FUNCTION(_PyFunction_Vectorcall)

static void lie(uint64_t *words, size_t count, const char *kind) {
    for (size_t i = 0; i < count; i++)
        words[i] = !strcmp(kind, "zero") ? 0 : !strcmp(kind, "self") ? (uintptr_t)knot : 0x4141414141414141u * (i + 1);
}

static uint64_t sum(const uint64_t *words, size_t count) {
    uint64_t sum = 0;
    for (size_t i = 0; i < count; i++)
        sum = sum * 31 + words[i];
    return sum;
}

static uint64_t all(void) {
    uint64_t total = sum(_PyRuntime, WORDS * 64) + sum(knot, WORDS);
#define ADD(name) total = total * 31 + sum(name, WORDS);
    TYPES(ADD)
    return total;
}

__attribute__((noinline)) int Py_RunMain(void) {
    uint64_t before = all();
    for (int i = 0; i < 100; i++) {
        PyEval_SaveThread(PyEval_RestoreThread(_PyEval_EvalFrameDefault(PyObject_Malloc(knot))));
        _PyFunction_Vectorcall(knot);
        usleep(2000);
    }
    puts(before == all() ? "unchanged" : "changed");
    return 0;
}

int main(int argc, char **argv) {
    const char *kind = argc > 1 ? argv[1] : "zero";
    lie(_PyRuntime, WORDS * 64, kind);
    lie(knot, WORDS, kind);
#define FILL(name) lie(name, WORDS, kind);
    TYPES(FILL)
    if (!strcmp(kind, "self")) {
        /* What is looked at first is true. */
        uint64_t *types[] = {PyFunction_Type, PyCode_Type, PyType_Type, PyModule_Type, PyUnicode_Type, knot};
        for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
            types[i][1] = (uintptr_t)PyType_Type;
            types[i][FLAGS] = ~0ull;
        }
        PyFunction_Type[VECTORCALL_OFFSET] = OFFSET;
        memcpy(_PyRuntime, "xdebugpy", 8);
        _PyRuntime[1] = VERSION;
        _PyRuntime[2] = 0;
    }
    Py_Initialize(0);
    return Py_RunMain();
}
