// group_stats on the CPU: a row at a time, read once into scratch memory that stays in the cache. Compiled once per
// instruction set; no headers of the standard library with inline functions here (core/config.h says why).
#include "core/dispatch.h"
#include "group_stats/row.h"

namespace fastkd::group_stats {
inline namespace FASTKD_TARGET {
namespace {

template <class T>
const T* row_of(const Args& args, int64_t i) {
  return static_cast<const T*>(args.logits[i / args.rows]) + i % args.rows * args.stride[i / args.rows];
}

template <class T, class A>
void forward_typed(const Args& args, int64_t begin, int64_t end, A* scratch) {
  const int64_t padded = padded_length(args.classes);
  for (int64_t i = begin; i < end; ++i) {
    const T* row = row_of<T>(args, i);
    const Label<A> label = label_of<T, A>(args.target, i % args.rows, args.ignore_index, args.classes, row);
    const A max = load_row(row, args.classes, padded, scratch);
    if (i + 1 < end) prefetch_row(row_of<T>(args, i + 1), args.classes);
    store(args.out, i, stats_of_row(scratch, max, label, args.classes, padded));
  }
}

int64_t scratch_bytes(const Args& args) {
  constexpr int64_t kAlignment = 64;
  return padded_length(args.classes) * int64_t(sizeof(double)) + kAlignment;
}

void forward_rows(const Args& args, int64_t begin, int64_t end, void* scratch) {
  dispatch(args.type, [&]<class T, class A>() { forward_typed<T>(args, begin, end, aligned_scratch<A>(scratch)); });
}

}  // namespace
}  // namespace FASTKD_TARGET

const CpuKernels FASTKD_CPU_KERNELS = {scratch_bytes, forward_rows};

}  // namespace fastkd::group_stats
