// Python to C++: tensors in, nothing out. contract.py has checked them; the GIL is released. A torch.Tensor
// is read by the names of its attributes, so that no torch header is needed and one build serves every torch.
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <cstring>

#include "common/ops.h"
#include "cpu/conv3x3.h"
#include "cpu/dispatch.h"
#if defined(SR3FAST_CUDA)
#include "cuda/device.h"
#endif

namespace py = pybind11;
using namespace sr3fast;

namespace {

// What is asked of a tensor, and what it may be; set when the module is loaded.
struct Torch {
  PyObject *data_ptr, *device, *dtype, *is_cpu, *is_neg, *ndim, *requires_grad, *shape, *stride;  // names
  PyObject* tensor;                                                                               // the type
  PyObject* dtypes[3];  // in the order of Dtype

  void load() {
    const auto name = PyUnicode_InternFromString;
    data_ptr = name("data_ptr"), device = name("device"), dtype = name("dtype"), is_cpu = name("is_cpu");
    is_neg = name("is_neg"), ndim = name("ndim"), requires_grad = name("requires_grad");
    shape = name("shape"), stride = name("stride");
    const auto module = py::module_::import("torch");
    const auto get = [&](const char* a) { return py::object(module.attr(a)).release().ptr(); };
    tensor = get("Tensor");
    dtypes[0] = get("float32"), dtypes[1] = get("float16"), dtypes[2] = get("bfloat16");
  }
} torch;

py::object checked(PyObject* o) {
  if (!o) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(o);
}
py::object attribute(PyObject* o, PyObject* name) { return checked(PyObject_GetAttr(o, name)); }
py::object call(PyObject* o, PyObject* method) { return checked(PyObject_CallMethodNoArgs(o, method)); }

template <class T>
T valid(T value) {
  if (PyErr_Occurred()) throw py::error_already_set();
  return value;
}
int64_t integer(PyObject* tuple, Py_ssize_t i) {
  return valid(PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, i)));
}
bool flag(PyObject* tuple, Py_ssize_t i) { return PyTuple_GET_ITEM(tuple, i) == Py_True; }

void* address(PyObject* tensor) { return valid(PyLong_AsVoidPtr(call(tensor, torch.data_ptr).ptr())); }
long dimensions(PyObject* tensor) { return valid(PyLong_AsLong(attribute(tensor, torch.ndim).ptr())); }
bool are_four(PyObject* numbers) { return PyTuple_Check(numbers) && PyTuple_GET_SIZE(numbers) == 4; }

Dtype dtype(PyObject* tensor) {
  const auto own = attribute(tensor, torch.dtype);
  for (int i = 0; i < 3; ++i)
    if (own.ptr() == torch.dtypes[i]) return static_cast<Dtype>(i);
  throw py::type_error("a tensor must be float32, float16 or bfloat16");
}

// The arguments of sr3fast/native.py, as the ops take them.

void describe(PyObject* o, Tensor& t) {
  t.data = address(o);
  t.dtype = dtype(o);
  const auto shape = attribute(o, torch.shape), strides = call(o, torch.stride);
  if (!are_four(shape.ptr()) || !are_four(strides.ptr()))
    throw py::type_error("a tensor must be [B, C, H, W]");
  for (int i = 0; i < 4; ++i) {
    t.size[i] = integer(shape.ptr(), i);
    t.stride[i] = integer(strides.ptr(), i);
  }
}

// A tensor [B, C, H, W] or None
void read(PyObject* o, Tensor& t) {
  if (o == Py_None) return;
  describe(o, t);
  if (!t) throw py::value_error("a tensor must have memory");
}

// A tensor or None
void read(PyObject* o, Vector& v) {
  if (o == Py_None) return;
  v.data = address(o);
  v.dtype = dtype(o);
}

// The same, float32
struct Array {
  float* data = nullptr;
};
void read(PyObject* o, Array& a) {
  if (o != Py_None) a.data = static_cast<float*>(address(o));
}

bool is_number(PyObject* o) { return PyFloat_Check(o) || PyLong_Check(o); }
bool is_on_host(PyObject* tensor) { return attribute(tensor, torch.is_cpu).ptr() == Py_True; }
bool is_one_a_sample(PyObject* tensor) { return dimensions(tensor) == 1; }

int64_t number(PyObject* o, int64_t) { return valid(PyLong_AsLongLong(o)); }
double number(PyObject* o, double) { return valid(PyFloat_AsDouble(o)); }

// A number or a tensor: one value (of no dimension) on the host is read here, all else by the kernel
template <class T>
void read(PyObject* o, Scalar<T>& s) {
  if (is_number(o)) {
    s.value = number(o, T{});
    return;
  }
  const auto* p = static_cast<const T*>(address(o));
  if (is_on_host(o) && !is_one_a_sample(o))
    s.value = *p;
  else
    s.device = p;
}

// A tensor [9]
void read(PyObject* o, Scalar<Row>& s) {
  const auto* p = static_cast<const Row*>(address(o));
  if (is_on_host(o))
    s.value = *p;
  else
    s.device = p;
}

// A number, a tensor, or a tensor [B]
void read(PyObject* o, Seeds& s) {
  Scalar<int64_t> one;
  read(o, one);
  s.value = one.value, s.device = one.device;
  s.per_sample = one.device && is_one_a_sample(o);
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
  e.stream = reinterpret_cast<void*>(integer(o, 2));
  e.scratch = reinterpret_cast<void*>(integer(o, 3));
}

// An ordinary float32 tensor [B, C, H, W], contiguous, not empty, that autograd does not watch?
bool is_ordinary(PyObject* o, Tensor& t) {
  if (reinterpret_cast<PyObject*>(Py_TYPE(o)) != torch.tensor) return false;
  if (dimensions(o) != 4 || attribute(o, torch.dtype).ptr() != torch.dtypes[0]) return false;
  if (attribute(o, torch.requires_grad).ptr() == Py_True || call(o, torch.is_neg).ptr() == Py_True)
    return false;
  describe(o, t);
  int64_t stride = 1;
  for (int i = 3; i >= 0; --i) {
    if (t.size[i] != 1 && t.stride[i] != stride) return false;
    stride *= t.size[i];
  }
  return static_cast<bool>(t);
}

// The common call of a step, told in one look: ordinary tensors of one shape on one device, eps_hat apart
// from out in memory, y too or out itself. False says no more than that contract.py must look closer; a new
// rule there for y, eps_hat or out is one here.
bool is_plain_step(py::handle out, py::handle y, py::handle eps_hat) {
  Tensor o, t;
  if (!is_ordinary(out.ptr(), o)) return false;
  const auto device = attribute(out.ptr(), torch.device);
  const int64_t bytes = o.numel() * static_cast<int64_t>(sizeof(float));
  for (const bool is_y : {true, false}) {
    const auto input = is_y ? y : eps_hat;
    if (!is_ordinary(input.ptr(), t) || std::memcmp(o.size, t.size, sizeof o.size) != 0) return false;
    if (!device.equal(attribute(input.ptr(), torch.device))) return false;
    const int64_t apart = static_cast<char*>(t.data) - static_cast<char*>(o.data);
    if (std::abs(apart) < bytes && !(is_y && apart == 0)) return false;
  }
  return true;
}

}  // namespace

namespace pybind11::detail {

template <class T>
struct from_native {
  PYBIND11_TYPE_CASTER(T, const_name("object"));
  bool load(handle source, bool) {
    read(source.ptr(), value);
    return true;
  }
};

template <>
struct type_caster<Tensor> : from_native<Tensor> {};
template <>
struct type_caster<Array> : from_native<Array> {};
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

#define SR3FAST_BIND(home)                                                                                   \
  void bind_##home(py::module_ m) {                                                                          \
    const auto without_gil = py::call_guard<py::gil_scoped_release>();                                       \
    m.def("noise", &home::noise, without_gil);                                                               \
    m.def("refine", &home::refine, without_gil);                                                             \
    m.def("solver_step", &home::solver_step, without_gil);                                                   \
    m.def("q_sample", &home::q_sample, without_gil);                                                         \
    m.def(                                                                                                   \
        "group_norm_silu",                                                                                   \
        [](const Tensor& out, const Tensor& s, Array mean, Array rstd, const Norm& norm, const Exec& exec) { \
          home::group_norm_silu(out, s, mean.data, rstd.data, norm, exec);                                   \
        },                                                                                                   \
        without_gil);                                                                                        \
    m.def(                                                                                                   \
        "group_norm_silu_backward",                                                                          \
        [](const Tensor& dh, const Tensor& dh2, Array dweight, Array dbias, Array dshift,                    \
           const Tensor& grad, const Tensor& grad_s, Array mean, Array rstd, const Norm& norm,               \
           const Exec& exec) {                                                                               \
          home::group_norm_silu_backward(dh, dh2, dweight.data, dbias.data, dshift.data, grad, grad_s,       \
                                         mean.data, rstd.data, norm, exec);                                  \
        },                                                                                                   \
        without_gil);                                                                                        \
  }

SR3FAST_BIND(cpu)
#if defined(SR3FAST_CUDA)
SR3FAST_BIND(cuda)
#endif

void bind_conv3x3(py::module_ m) {
  const auto without_gil = py::call_guard<py::gil_scoped_release>();
  m.def(
      "conv3x3_pack",
      [](Array packed, const Tensor& weight, int threads) {
        cpu::conv3x3_pack(packed.data, static_cast<const float*>(weight.data), weight.size[0], weight.size[1],
                          threads);
      },
      without_gil);
  m.def("conv3x3_scratch", [](const Tensor& out, const Tensor& h, int threads) {
    return cpu::conv3x3_scratch(out, h.size[1], threads);
  });
  m.def(
      "conv3x3",
      [](const Tensor& out, const Tensor& h, Array packed, Array bias, const Tensor& onto, const Exec& exec) {
        cpu::conv3x3(out, h, packed.data, bias.data, onto, exec);
      },
      without_gil);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "sr3fast's compiled kernels; sr3fast.native calls them";
  torch.load();
  m.def("is_plain_step", &is_plain_step);
  auto cpu_module = m.def_submodule("cpu");
  bind_cpu(cpu_module);
  cpu_module.def("isa", &cpu::isa);
#if defined(_OPENMP)
  cpu_module.attr("openmp") = true;
#else
  cpu_module.attr("openmp") = false;
#endif
  bind_conv3x3(cpu_module);
#if defined(SR3FAST_CUDA)
  auto cuda_module = m.def_submodule("cuda");
  bind_cuda(cuda_module);
  cuda_module.def("driver_version", &cuda::driver_version);
  cuda_module.def("runtime_version", &cuda::runtime_version);
  cuda_module.def("scratch_bytes", &cuda::scratch_bytes);
  cuda_module.attr("architectures") = SR3FAST_CUDA_ARCHITECTURES;
#endif
}
