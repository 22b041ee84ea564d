// mutual on CUDA: forward, its reductions over rows, backward. No torch header.
#include "core/cuda/launch.cuh"
#include "core/cuda/row_kernels.cuh"
#include "mutual/rows.cuh"
#include "mutual/split.cuh"

namespace fastkd::mutual {

int64_t scratch_numbers_cuda(const Args& args) {
  const int networks = args.learners + args.teachers;
  if (networks > kVectorNetworks || args.type == DType::f64) return 0;
  const unsigned parts = parts_of_row(args);
  return parts == 1 ? 0 : args.rows * parts * kPartNumbers<kVectorNetworks>;
}

const char* forward_cuda(const Args& given, void* stream_handle) {
  Args args = given;
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  const RowFactor factor = launch_factor(args, args.type, args.slots * args.rows * args.classes * bytes_of(args.type), stream);
  args.row_factor = factor.known;
  args.counted = factor.counted;
  if (args.rows > 0) dispatch(args.type, [&]<class S, class A>() { forward_rows<S>(args, stream); });
  launch_reduce(args, args.type, args.learners, factor.whole, stream);
  if (args.terms) {
    Args terms = args;
    terms.row_loss = args.row_terms;
    terms.loss = args.terms;
    launch_reduce(terms, args.type, 2 * args.learners, factor.whole, stream);
  }
  return launch_error();
}

const char* backward_cuda(const BackwardArgs& args, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  dispatch(args.type, [&]<class S, class A>() {
    StoredGradients<A> p{args.stored,
                         args.grad,
                         static_cast<const A*>(args.grad_loss),
                         static_cast<const A*>(args.aux),
                         static_cast<const A*>(args.saved),
                         args.reduction == Reduction::none,
                         args.rows,
                         args.classes,
                         args.slots,
                         {}};
    for (int s = 0; s < args.slots; ++s) p.learner[s] = int(args.learner[s]);
    launch_scale<S, A>(p, stream);
  });
  return launch_error();
}

}  // namespace fastkd::mutual
