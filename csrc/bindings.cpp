// Python to C++: tuples of addresses and sizes in, nothing out. ops.py has checked them; the GIL is released.
#include <pybind11/pybind11.h>

#include "common/ops.h"
#include "cpu/dispatch.h"
#if defined(SR3FAST_CUDA)
#include "cuda/device.h"
#endif

namespace py = pybind11;
using namespace sr3fast;

namespace {

int64_t integer(PyObject* tuple, Py_ssize_t i) { return PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, i)); }
bool flag(PyObject* tuple, Py_ssize_t i) { return PyTuple_GET_ITEM(tuple, i) == Py_True; }

template <class T>
T* address(PyObject* tuple, Py_ssize_t i) {
  return reinterpret_cast<T*>(integer(tuple, i));
}

// What sr3fast/native.py makes of an argument, as the ops take it.

// (data_ptr, dtype, b, c, h, w, strides of b, c, h, w) or None
void read(PyObject* o, Tensor& t) {
  if (o == Py_None) return;
  t.data = address<void>(o, 0);
  t.dtype = static_cast<Dtype>(integer(o, 1));
  for (int i = 0; i < 4; ++i) {
    t.size[i] = integer(o, 2 + i);
    t.stride[i] = integer(o, 6 + i);
  }
}

// (data_ptr, dtype) or None
void read(PyObject* o, Vector& v) {
  if (o == Py_None) return;
  v.data = address<const void>(o, 0);
  v.dtype = static_cast<Dtype>(integer(o, 1));
}

int64_t number(PyObject* o, int64_t) { return PyLong_AsLongLong(o); }
double number(PyObject* o, double) { return PyFloat_AsDouble(o); }
Row number(PyObject*, Row) { throw std::invalid_argument("a row comes as an address"); }

// A number, or (address, to be read here): a host value is read here, a device value by the kernel
template <class T>
void read(PyObject* o, Scalar<T>& s) {
  if (!PyTuple_Check(o)) {
    s.value = number(o, T{});
    return;
  }
  const T* p = address<const T>(o, 0);
  if (flag(o, 1))
    s.value = *p;
  else
    s.device = p;
}

// A number, or (address, to be read here, one a sample)
void read(PyObject* o, Seeds& s) {
  if (!PyTuple_Check(o)) {
    s.value = number(o, int64_t{});
    return;
  }
  const auto* p = address<const int64_t>(o, 0);
  s.per_sample = flag(o, 2);
  if (flag(o, 1))
    s.value = *p;
  else
    s.device = p;
}

// (h, w)
void read(PyObject* o, Origin& origin) { origin = {integer(o, 0), integer(o, 1)}; }

// (h, h2, residual, weight, bias, shift, groups, eps, silu)
void read(PyObject* o, Norm& n) {
  const auto item = [o](Py_ssize_t i) { return PyTuple_GET_ITEM(o, i); };
  read(item(0), n.h), read(item(1), n.h2), read(item(2), n.residual);
  read(item(3), n.weight), read(item(4), n.bias), read(item(5), n.shift);
  n.groups = integer(o, 6);
  n.eps = number(item(7), double{});
  n.silu = flag(o, 8);
}

// (threads, device, stream, scratch)
void read(PyObject* o, Exec& e) {
  e.threads = static_cast<int>(integer(o, 0));
  e.device = static_cast<int>(integer(o, 1));
  e.stream = address<void>(o, 2);
  e.scratch = address<void>(o, 3);
}

}  // namespace

namespace pybind11::detail {

template <class T>
struct from_native {
  PYBIND11_TYPE_CASTER(T, const_name("tuple"));
  bool load(handle source, bool) {
    read(source.ptr(), value);
    return !PyErr_Occurred();
  }
};

template <>
struct type_caster<Tensor> : from_native<Tensor> {};
template <class T>
struct type_caster<Scalar<T>> : from_native<Scalar<T>> {};
template <>
struct type_caster<Seeds> : from_native<Seeds> {};
template <>
struct type_caster<Origin> : from_native<Origin> {};
template <>
struct type_caster<Norm> : from_native<Norm> {};
template <>
struct type_caster<Exec> : from_native<Exec> {};

}  // namespace pybind11::detail

namespace {

// The norms' float32 arrays come as addresses.
auto* floats(int64_t p) { return reinterpret_cast<float*>(p); }

#define SR3FAST_BIND(home)                                                                               \
  void bind_##home(py::module_ m) {                                                                      \
    const auto without_gil = py::call_guard<py::gil_scoped_release>();                                   \
    m.def("noise", &home::noise, without_gil);                                                           \
    m.def("refine", &home::refine, without_gil);                                                         \
    m.def("solver_step", &home::solver_step, without_gil);                                               \
    m.def("q_sample", &home::q_sample, without_gil);                                                     \
    m.def(                                                                                               \
        "group_norm_silu",                                                                               \
        [](const Tensor& out, const Tensor& s, int64_t mean, int64_t rstd, const Norm& norm,             \
           const Exec& exec) { home::group_norm_silu(out, s, floats(mean), floats(rstd), norm, exec); }, \
        without_gil);                                                                                    \
    m.def(                                                                                               \
        "group_norm_silu_backward",                                                                      \
        [](const Tensor& dh, const Tensor& dh2, int64_t dweight, int64_t dbias, int64_t dshift,          \
           const Tensor& grad, const Tensor& grad_s, int64_t mean, int64_t rstd, const Norm& norm,       \
           const Exec& exec) {                                                                           \
          home::group_norm_silu_backward(dh, dh2, floats(dweight), floats(dbias), floats(dshift), grad,  \
                                         grad_s, floats(mean), floats(rstd), norm, exec);                \
        },                                                                                               \
        without_gil);                                                                                    \
  }

SR3FAST_BIND(cpu)
#if defined(SR3FAST_CUDA)
SR3FAST_BIND(cuda)
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "sr3fast's compiled kernels; sr3fast.native calls them";
  auto cpu_module = m.def_submodule("cpu");
  bind_cpu(cpu_module);
  cpu_module.def("isa", &cpu::isa);
#if defined(SR3FAST_CUDA)
  auto cuda_module = m.def_submodule("cuda");
  bind_cuda(cuda_module);
  cuda_module.def("driver_version", &cuda::driver_version);
  cuda_module.def("runtime_version", &cuda::runtime_version);
  cuda_module.def("scratch_bytes", &cuda::scratch_bytes);
  cuda_module.attr("architectures") = SR3FAST_CUDA_ARCHITECTURES;
#endif
}
