#include "bindings.h"

PYBIND11_MODULE(_core, m) {
    m.doc() = "The C API of laprox.h and the selection functions of cpp/core, on NumPy arrays.";

    pybind11::register_exception<laprox_python::refusal>(m, "LaproxError", PyExc_RuntimeError).attr("__module__") = "laprox";

    laprox_python::register_settings(m);
    laprox_python::register_context(m);
    laprox_python::register_inspect(m);
    laprox_python::register_document(m);
    laprox_python::register_core(m);
    laprox_python::register_build(m);
}
