// topk: schema, allocation, tensors to Args. It has kernels of the CPU alone; elsewhere the formula of
// fastkd/ops/_topk_formula.py runs.
#include "core/constants.h"
#include "core/torch/run.h"
#include "topk/op.h"

#if defined(FASTKD_BACKEND_CPU)
namespace fastkd::topk {
namespace {

const double* doubles(const Tensor& t, int64_t count, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Double && t.numel() == count && t.is_contiguous(), "fastkd: topk: ", name,
                  " must be contiguous float64 of the rows");
  return static_cast<const double*>(t.data_ptr());
}

Args args_of(const Tensor& ids, const std::optional<Tensor>& log_probs, const std::optional<Tensor>& log_tail,
             const Tensor& weight, int64_t rows) {
  STD_TORCH_CHECK(ids.scalar_type() == ScalarType::Long && ids.dim() == 2 && ids.size(0) == rows && ids.is_contiguous(),
                  "fastkd: topk: ids must be contiguous int64 [R, k]");
  Args args;
  args.rows = rows;
  args.k = ids.size(1);
  args.ids = static_cast<const int64_t*>(ids.data_ptr());
  if (log_probs) args.log_probs = doubles(*log_probs, rows * args.k, "log_probs");
  if (log_tail) args.log_tail = doubles(*log_tail, rows, "log_tail");
  args.weight = doubles(weight, rows, "weight");
  return args;
}

// The rows' losses, weighted, A [R]; their gradients [R, C]; the inverse scales of float16 [R], or nothing.
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& student, const Tensor& ids, const std::optional<Tensor>& log_probs,
                                           const std::optional<Tensor>& log_tail, const Tensor& weight, int64_t mode,
                                           double temperature, double row_factor, bool need_grad) {
  STD_TORCH_CHECK(mode >= 0 && mode <= int(Mode::sampled), "fastkd: topk: mode");
  const int64_t classes = student.size(student.dim() - 1);
  STD_TORCH_CHECK(classes > 0, "fastkd: logits without classes");
  check_devices(student, {&ids, pointer_to(log_probs), pointer_to(log_tail), &weight});
  const int64_t rows = student.numel() / classes;
  Args args = args_of(ids, log_probs, log_tail, weight, rows);
  Networks networks;
  args.student = networks.add(student, rows, classes);
  args.classes = classes;
  args.mode = Mode(mode);
  args.temperature = temperature;
  args.row_factor = row_factor;
  args.need_grad = need_grad;
  const ScalarType type = accumulate_type(args.student.type);
  const bool scaled = need_grad && args.student.type == DType::f16;
  Tensor loss = empty_like_device(student, {rows}, type);
  Tensor grad = need_grad ? empty_like_device(student, {rows, classes}, student.scalar_type())
                          : empty_like_device(student, {0}, student.scalar_type());
  Tensor saved = empty_like_device(student, {scaled ? rows : 0}, type);
  args.row_loss = loss.data_ptr();
  args.grad = grad.data_ptr();
  args.saved = saved.data_ptr();
  const CpuKernels& kernels = FASTKD_KERNELS_OF(topk);
  run_with_scratch(kernels, args, rows, grain(args.mode == Mode::both ? 16 * args.k : classes), kernels.forward);
  return {loss, grad, saved};
}

}  // namespace
}  // namespace fastkd::topk

STABLE_TORCH_LIBRARY_FRAGMENT(FASTKD_LIBRARY, m) {
  m.def(
      "topk_forward(Tensor student, Tensor ids, Tensor? log_probs, Tensor? log_tail, Tensor weight, int mode, "
      "float temperature, float row_factor, bool need_grad) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(FASTKD_LIBRARY, FASTKD_KEY, m) { m.impl("topk_forward", TORCH_BOX(&fastkd::topk::forward)); }

using fastkd::topk::Mode;
FASTKD_CONSTANTS(topk, {"tail", int(Mode::tail)}, {"truncate", int(Mode::truncate)}, {"teacher", int(Mode::teacher)},
                 {"both", int(Mode::both)}, {"sampled", int(Mode::sampled)})
#endif
