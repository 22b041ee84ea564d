// group_stats: schema, allocation, tensors to Args. Compiled into the CPU library, the CUDA library and the tests' host
// build of the CUDA kernels.
#include "group_stats/op.h"

#include <tuple>
#include <vector>

#include "core/run.h"
#include "group_stats/tensors.h"

namespace fastkd::group_stats {
namespace {

// What Args points into, kept alive for the call.
struct Inputs {
  NetworkRows networks;
  std::optional<Tensor> target;
  Args args;
};

void fill_inputs(Inputs& in, const std::vector<Tensor>& networks, const std::optional<Tensor>& target) {
  STD_TORCH_CHECK(!networks.empty(), "fastkd: no network");
  Args& args = in.args;
  args.rows = networks.front().size(0);
  args.classes = networks.front().size(1);
  args.networks = int(networks.size());
  args.type = in.networks.add(networks, args.rows, args.classes);
  in.target = contiguous_target(target, args.rows);
  args.logits = in.networks.data.data();
  args.stride = in.networks.strides.data();
  args.target = optional_data<int64_t>(in.target);
}

#if defined(FASTKD_BACKEND_CPU)

void run_forward(const Args& args, const Tensor&) {
  const CpuKernels& kernels = FASTKD_KERNELS_OF(group_stats);
  run_with_scratch(kernels, args, args.rows * args.networks, grain(args.classes), kernels.forward);
}

#else

void run_forward(const Args& args, const Tensor& like) {
  on_stream("group_stats", like, [&](void* stream) { return forward_cuda(args, stream); });
}

#endif

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(const std::vector<Tensor>& networks,
                                                                   const std::optional<Tensor>& target,
                                                                   int64_t ignore_index) {
  Inputs in;
  fill_inputs(in, networks, target);
  Args& args = in.args;
  args.ignore_index = ignore_index;
  const Tensor& like = networks.front();
  const OutputTensors out(like, args.networks, args.rows, accumulate_type(args.type));
  args.out = out.pointers();
  run_forward(args, like);
  return out.all();
}

}  // namespace
}  // namespace fastkd::group_stats

#if !defined(FASTKD_BACKEND_CUDA)  // the CUDA library implements what the CPU library declares
STABLE_TORCH_LIBRARY_FRAGMENT(FASTKD_LIBRARY, m) {
  m.def(
      "group_stats(Tensor[] networks, Tensor? target, int ignore_index) -> (Tensor, Tensor, Tensor, Tensor, Tensor, "
      "Tensor)");
}
#endif

STABLE_TORCH_LIBRARY_IMPL(FASTKD_LIBRARY, FASTKD_KEY, m) {
  m.impl("group_stats", TORCH_BOX(&fastkd::group_stats::forward));
}
