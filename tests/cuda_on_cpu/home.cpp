// The ops of csrc/cuda on the emulated GPU, for ctypes. Structures go by address; an error comes back as
// text.
#include <exception>
#include <string>

#include "../../csrc/common/divide.h"
#include "../../csrc/common/ops.h"
#include "../../csrc/cuda/device.h"
#include "emulate.h"

using namespace sr3fast;

namespace {
std::string message;

template <class F>
const char* run(F&& f) {
  try {
    f();
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
  return nullptr;
}
}  // namespace

extern "C" {

void emulate_schedule(int schedule) { emulate::schedule = static_cast<emulate::Schedule>(schedule); }
void emulate_forget() { emulate::launches = emulate::largest_cluster = emulate::grids = 0; }
int emulate_launches() { return emulate::launches; }
int emulate_largest_cluster() { return emulate::largest_cluster; }
int emulate_grids() { return emulate::grids; }
int emulate_told() { return emulate::told; }
int emulate_asked() { return static_cast<int>(emulate::asked.size()); }
uint32_t quotient(uint32_t n, int64_t divisor) { return Divide(divisor).quotient(n); }
int64_t scratch_bytes(int64_t b, int64_t c, int64_t h, int64_t w) { return cuda::scratch_bytes(b, c, h, w); }

const char* noise(const Tensor* out, const Seeds* seed, const Scalar<int64_t>* step, uint32_t domain,
                  const Origin* origin, const Exec* exec) {
  return run([&] { cuda::noise(*out, *seed, *step, domain, *origin, *exec); });
}
const char* refine(const Tensor* out, const Tensor* into, const Tensor* y, const Tensor* eps_hat,
                   const Scalar<double>* alpha, const Scalar<double>* gamma, const Seeds* seed,
                   const Scalar<int64_t>* step, const Tensor* z, const Origin* origin, const Exec* exec) {
  return run(
      [&] { cuda::refine(*out, *into, *y, *eps_hat, *alpha, *gamma, *seed, *step, *z, *origin, *exec); });
}
const char* solver_step(const Tensor* out, const Tensor* m, const Tensor* into, const Tensor* y,
                        const Tensor* eps_hat, const Scalar<Row>* row, const Seeds* seed,
                        const Scalar<int64_t>* step, const Tensor* m1, const Tensor* m2, const Tensor* z,
                        const Origin* origin, const Exec* exec) {
  return run([&] {
    cuda::solver_step(*out, *m, *into, *y, *eps_hat, *row, *seed, *step, *m1, *m2, *z, *origin, *exec);
  });
}
const char* q_sample(const Tensor* out, const Tensor* eps_out, const Tensor* into, const Tensor* y_0,
                     const Scalar<double>* gamma, int per_sample, const Seeds* seed,
                     const Scalar<int64_t>* step, const Tensor* eps, const Origin* origin, const Exec* exec) {
  return run([&] {
    cuda::q_sample(*out, *eps_out, *into, *y_0, *gamma, per_sample != 0, *seed, *step, *eps, *origin, *exec);
  });
}
const char* group_norm_silu(const Tensor* out, const Tensor* s, float* mean, float* rstd, const Norm* norm,
                            const Exec* exec) {
  return run([&] { cuda::group_norm_silu(*out, *s, mean, rstd, *norm, *exec); });
}
const char* group_norm_silu_backward(const Tensor* dh, const Tensor* dh2, float* dweight, float* dbias,
                                     float* dshift, const Tensor* grad, const Tensor* grad_s,
                                     const float* mean, const float* rstd, const Norm* norm,
                                     const Exec* exec) {
  return run([&] {
    cuda::group_norm_silu_backward(*dh, *dh2, dweight, dbias, dshift, *grad, *grad_s, mean, rstd, *norm,
                                   *exec);
  });
}
}
