// Python to C++: tuples of addresses and sizes in, nothing out. Checks are ops.py's; the GIL is released.
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

// (data_ptr, dtype, b, c, h, w, strides of b, c, h, w) or None
Tensor tensor(const py::object& o) {
  Tensor t;
  if (o.is_none()) return t;
  PyObject* p = o.ptr();
  t.data = reinterpret_cast<void*>(integer(p, 0));
  t.dtype = static_cast<Dtype>(integer(p, 1));
  for (int i = 0; i < 4; ++i) {
    t.size[i] = integer(p, 2 + i);
    t.stride[i] = integer(p, 6 + i);
  }
  return t;
}

// (data_ptr, dtype) or None
Vector vector(const py::object& o) {
  Vector v;
  if (o.is_none()) return v;
  v.data = reinterpret_cast<const void*>(integer(o.ptr(), 0));
  v.dtype = static_cast<Dtype>(integer(o.ptr(), 1));
  return v;
}

template <class T>
T* address(int64_t p) {
  return reinterpret_cast<T*>(p);
}

template <class T>
T number(const py::object& o) {
  return o.cast<T>();
}
template <>
Row number<Row>(const py::object&) {
  throw std::invalid_argument("a row comes as an address");
}

// A number, or (address, on the host): a host value is read here, a device value by the kernel
template <class T>
Scalar<T> scalar(const py::object& o) {
  Scalar<T> s;
  if (!PyTuple_Check(o.ptr())) {
    s.value = number<T>(o);
    return s;
  }
  const T* p = address<const T>(integer(o.ptr(), 0));
  if (integer(o.ptr(), 1))
    s.value = *p;
  else
    s.device = p;
  return s;
}

// A number, or (address, on the host, one a sample)
Seeds seeds(const py::object& o) {
  Seeds s;
  if (!PyTuple_Check(o.ptr())) {
    s.value = o.cast<int64_t>();
    return s;
  }
  const auto* p = address<const int64_t>(integer(o.ptr(), 0));
  s.per_sample = integer(o.ptr(), 2) != 0;
  if (integer(o.ptr(), 1) && !s.per_sample)
    s.value = *p;
  else
    s.device = p;
  return s;
}

Norm norm(const py::object& h, const py::object& h2, const py::object& residual, const py::object& weight,
          const py::object& bias, const py::object& shift, int64_t groups, double eps, bool silu) {
  return {tensor(h), tensor(h2), tensor(residual), vector(weight), vector(bias), vector(shift), groups,
          eps,       silu};
}

Exec exec(const py::tuple& o) {
  Exec e;
  e.threads = static_cast<int>(integer(o.ptr(), 0));
  e.device = static_cast<int>(integer(o.ptr(), 1));
  e.stream = reinterpret_cast<void*>(integer(o.ptr(), 2));
  e.scratch = reinterpret_cast<void*>(integer(o.ptr(), 3));
  return e;
}

#define SR3FAST_BIND(home)                                                                                   \
  void bind_##home(py::module_ m) {                                                                          \
    m.def("noise", [](py::object out, py::object seed, py::object step, uint32_t domain, int64_t h0,         \
                      int64_t w0, py::tuple on) {                                                            \
      const auto a = tensor(out);                                                                            \
      const auto s = seeds(seed);                                                                            \
      const auto t = scalar<int64_t>(step);                                                                  \
      const auto e = exec(on);                                                                               \
      py::gil_scoped_release release;                                                                        \
      home::noise(a, s, t, domain, {h0, w0}, e);                                                             \
    });                                                                                                      \
    m.def("refine", [](py::object out, py::object into, py::object y, py::object eps_hat, py::object alpha,  \
                       py::object gamma, py::object seed, py::object step, py::object z, int64_t h0,         \
                       int64_t w0, py::tuple on) {                                                           \
      const auto a = tensor(out), b = tensor(into), c = tensor(y), d = tensor(eps_hat), f = tensor(z);       \
      const auto al = scalar<double>(alpha), ga = scalar<double>(gamma);                                     \
      const auto s = seeds(seed);                                                                            \
      const auto t = scalar<int64_t>(step);                                                                  \
      const auto e = exec(on);                                                                               \
      py::gil_scoped_release release;                                                                        \
      home::refine(a, b, c, d, al, ga, s, t, f, {h0, w0}, e);                                                \
    });                                                                                                      \
    m.def("solver_step", [](py::object out, py::object m_out, py::object into, py::object y,                 \
                            py::object eps_hat, py::object row, py::object seed, py::object step,            \
                            py::object m1, py::object m2, py::object z, int64_t h0, int64_t w0,              \
                            py::tuple on) {                                                                  \
      const auto a = tensor(out), b = tensor(m_out), c = tensor(into), d = tensor(y), f = tensor(eps_hat);   \
      const auto g = tensor(m1), h = tensor(m2), i = tensor(z);                                              \
      const auto r = scalar<Row>(row);                                                                       \
      const auto s = seeds(seed);                                                                            \
      const auto t = scalar<int64_t>(step);                                                                  \
      const auto e = exec(on);                                                                               \
      py::gil_scoped_release release;                                                                        \
      home::solver_step(a, b, c, d, f, r, s, t, g, h, i, {h0, w0}, e);                                       \
    });                                                                                                      \
    m.def("q_sample", [](py::object out, py::object eps_out, py::object into, py::object y_0,                \
                         py::object gamma, bool per_sample, py::object seed, py::object step,                \
                         py::object eps, int64_t h0, int64_t w0, py::tuple on) {                             \
      const auto a = tensor(out), b = tensor(eps_out), c = tensor(into), d = tensor(y_0), f = tensor(eps);   \
      auto ga = scalar<double>(gamma);                                                                       \
      if (per_sample) ga.device = address<const double>(integer(gamma.ptr(), 0));                            \
      const auto s = seeds(seed);                                                                            \
      const auto t = scalar<int64_t>(step);                                                                  \
      const auto e = exec(on);                                                                               \
      py::gil_scoped_release release;                                                                        \
      home::q_sample(a, b, c, d, ga, per_sample, s, t, f, {h0, w0}, e);                                      \
    });                                                                                                      \
    m.def("group_norm_silu", [](py::object out, py::object s, int64_t mean, int64_t rstd, py::object h,      \
                                py::object h2, py::object residual, py::object weight, py::object bias,      \
                                py::object shift, int64_t groups, double eps, bool silu, py::tuple on) {     \
      const auto a = tensor(out), b = tensor(s);                                                             \
      const auto n = norm(h, h2, residual, weight, bias, shift, groups, eps, silu);                          \
      const auto e = exec(on);                                                                               \
      py::gil_scoped_release release;                                                                        \
      home::group_norm_silu(a, b, address<float>(mean), address<float>(rstd), n, e);                         \
    });                                                                                                      \
    m.def("group_norm_silu_backward",                                                                        \
          [](py::object dh, py::object dh2, int64_t dweight, int64_t dbias, int64_t dshift, py::object grad, \
             py::object grad_s, int64_t mean, int64_t rstd, py::object h, py::object h2, py::object weight,  \
             py::object bias, py::object shift, int64_t groups, bool silu, py::tuple on) {                   \
            const auto a = tensor(dh), b = tensor(dh2), c = tensor(grad), d = tensor(grad_s);                \
            const auto n = norm(h, h2, py::none(), weight, bias, shift, groups, 0.0, silu);                  \
            const auto e = exec(on);                                                                         \
            py::gil_scoped_release release;                                                                  \
            home::group_norm_silu_backward(a, b, address<float>(dweight), address<float>(dbias),             \
                                           address<float>(dshift), c, d, address<const float>(mean),         \
                                           address<const float>(rstd), n, e);                                \
          });                                                                                                \
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
