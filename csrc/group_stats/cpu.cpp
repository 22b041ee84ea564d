// group_stats on the CPU: a row at a time, read once into scratch memory that stays in the cache. Compiled once per
// instruction set; no headers of the standard library with inline functions here (core/config.h says why).
#include "core/dispatch.h"
#include "group_stats/row.h"

namespace fastkd::group_stats {
inline namespace FASTKD_TARGET {
namespace {

// Memory for two rows: a network's and, where labels are soft, theirs.
template <class A>
struct Scratch {
  A *logits, *soft;

  Scratch(void* memory, int64_t padded) : logits(aligned_scratch<A>(memory)), soft(logits + padded) {}
};

int64_t scratch_bytes(const Args& args) {
  constexpr int64_t kAlignment = 64;
  return (args.soft ? 2 : 1) * padded_length(args.classes) * int64_t(sizeof(double)) + kAlignment;
}

// The cross-entropy of the row in scratch memory with the soft labels of row r.
template <class A>
A cross_entropy_of(const Args& args, int64_t r, A max, A confidence, const Scratch<A>& s) {
  constexpr int64_t kBlock = 256;  // as in row.h
  const int64_t padded = padded_length(args.classes);
  load_row(*args.soft, r, args.classes, padded, s.soft);
  for (int64_t c = args.classes; c < padded; ++c) s.soft[c] = 0;
  A weight = 0, below = 0;
  for (int64_t begin = 0; begin < padded; begin += kBlock) {
    const int64_t end = begin + kBlock < padded ? begin + kBlock : padded;
    A block_weight = 0, block_below = 0;
#pragma omp simd reduction(+ : block_weight, block_below)
    for (int64_t c = begin; c < end; ++c) {
      block_weight += s.soft[c];
      block_below += soft_term(s.soft[c], max - s.logits[c]);
    }
    weight += block_weight;
    below += block_below;
  }
  return soft_cross_entropy(weight, below, confidence);
}

// Rows [begin, end) of one network, m.
template <class T, class A>
void network_rows(const Args& args, int64_t m, int64_t begin, int64_t end, const Scratch<A>& s) {
  const Network& network = args.network[m];
  const int64_t padded = padded_length(args.classes);
  for (int64_t r = begin; r < end; ++r) {
    const T* row = row_of<T>(network, r);
    const Label<A> label = label_of<T, A>(args.target, r, args.ignore_index, args.classes, row);
    const A max = load_row(row, args.classes, padded, s.logits);
    if (r + 1 < end) prefetch_row(row_of<T>(network, r + 1), args.classes);
    RowStats<A> stats = stats_of_row(s.logits, max, label, args.classes, padded);
    if (args.soft && label.given) stats.ce = cross_entropy_of(args, r, max, stats.confidence, s);
    store(args.out, m * args.rows + r, stats, args.wide);
  }
}

void forward_rows(const Args& args, int64_t begin, int64_t end, void* scratch) {
  for (int64_t i = begin; i < end;) {
    const int64_t m = i / args.rows, first = i - m * args.rows;
    const int64_t last = end - m * args.rows < args.rows ? end - m * args.rows : args.rows;
    dispatch(args.network[m].type, [&]<class T, class A>() {
      network_rows<T>(args, m, first, last, Scratch<A>(scratch, padded_length(args.classes)));
    });
    i += last - first;
  }
}

void soft_labels(const Args& args, int64_t begin, int64_t end, void* scratch) {
  double* row = aligned_scratch<double>(scratch);
  for (int64_t r = begin; r < end; ++r) {
    const double top = load_row(*args.soft, r, args.classes, padded_length(args.classes), row);
    int64_t largest = 0;
    while (largest + 1 < args.classes && row[largest] != top) ++largest;
    args.labels[r] = label_of_soft(args, r, largest);
  }
}

}  // namespace
}  // namespace FASTKD_TARGET

const CpuKernels FASTKD_CPU_KERNELS = {scratch_bytes, forward_rows, soft_labels};

}  // namespace fastkd::group_stats
