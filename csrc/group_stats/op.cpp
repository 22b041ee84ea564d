// group_stats: schema, allocation, tensors to Args. Compiled into the CPU library, the CUDA library and the tests' host
// build of the CUDA kernels.
#include "group_stats/op.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "core/torch/run.h"
#include "group_stats/tensors.h"

namespace fastkd::group_stats {
namespace {

// What Args points into, kept alive for the call.
struct Inputs {
  Networks networks, soft;
  std::optional<Tensor> target, labels;
  Args args;
};

void fill_inputs(Inputs& in, const std::vector<Tensor>& networks, const std::optional<Tensor>& target,
                 const std::optional<Tensor>& soft) {
  STD_TORCH_CHECK(!networks.empty() && networks.front().dim() > 0, "fastkd: no network");
  const Tensor& first = networks.front();
  Args& args = in.args;
  args.classes = first.size(first.dim() - 1);
  args.rows = first.numel() / std::max<int64_t>(1, args.classes);
  args.networks = int(networks.size());
  in.networks.add(networks, args.rows, args.classes);
  check_devices(first, {pointer_to(target), pointer_to(soft)});
  args.network = in.networks.list.data();
  for (const Network& network : in.networks.list) args.wide |= network.type == DType::f64;
  in.target = contiguous_target(target, args.rows);
  args.target = optional_data<int64_t>(in.target);
  if (!soft) return;
  args.soft = &in.soft.add(*soft, args.rows, args.classes);
  in.labels = empty_like_device(first, {args.rows}, ScalarType::Long);
  args.labels = optional_data<int64_t>(in.labels);
}

#if defined(FASTKD_BACKEND_CPU)

void run_forward(Args& args, const Tensor&) {
  const CpuKernels& kernels = FASTKD_KERNELS_OF(group_stats);
  if (args.soft) {
    run_with_scratch(kernels, args, args.rows, grain(args.classes), kernels.soft_labels);
    args.target = args.labels;
    args.ignore_index = -1;
  }
  run_with_scratch(kernels, args, args.rows * args.networks, grain(args.classes), kernels.forward);
}

#else

void run_forward(Args& args, const Tensor& like) {
  on_stream("group_stats", like, [&](void* stream) { return forward_cuda(args, stream); });
}

#endif

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(const std::vector<Tensor>& networks,
                                                                   const std::optional<Tensor>& target,
                                                                   const std::optional<Tensor>& soft, int64_t ignore_index) {
  Inputs in;
  fill_inputs(in, networks, target, soft);
  Args& args = in.args;
  args.ignore_index = ignore_index;
  const Tensor& like = networks.front();
  const OutputTensors out(like, args.networks, args.rows, args.wide ? ScalarType::Double : ScalarType::Float);
  args.out = out.pointers();
  run_forward(args, like);
  return out.all();
}

}  // namespace
}  // namespace fastkd::group_stats

#if !defined(FASTKD_BACKEND_CUDA)  // the CUDA library implements what the CPU library declares
STABLE_TORCH_LIBRARY_FRAGMENT(FASTKD_LIBRARY, m) {
  m.def(
      "group_stats(Tensor[] networks, Tensor? target, Tensor? soft, int ignore_index) -> (Tensor, Tensor, Tensor, Tensor, "
      "Tensor, Tensor)");
}
#endif

STABLE_TORCH_LIBRARY_IMPL(FASTKD_LIBRARY, FASTKD_KEY, m) { m.impl("group_stats", TORCH_BOX(&fastkd::group_stats::forward)); }
