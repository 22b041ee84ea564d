// relational: schema, allocation, tensors to arguments. Compiled into the CPU library, the CUDA library and the tests' host
// build of the CUDA kernels.
#include "relational/op.h"

#include <tuple>

#include "core/constants.h"
#include "core/torch/run.h"

namespace fastkd::relational {
namespace {

double* doubles(const Tensor& t) { return static_cast<double*>(t.data_ptr()); }

#if defined(FASTKD_BACKEND_CPU)

const CpuKernels& kernels() { return FASTKD_KERNELS_OF(relational); }
int64_t partial_elements(int64_t n) { return kernels().partial_elements(n); }

// In the order of the rows: the same bits for any number of threads.
double sum_of(const double* values, int64_t n) {
  double sum = 0;
  for (int64_t r = 0; r < n; ++r) sum += values[r];
  return sum;
}

template <class F>
void over_rows(int64_t n, const F& f) {
  torch::stable::parallel_for(0, n, grain(n), f);
}

// From args.squares to planes and mean.
void run_planes(const SidesArgs& args) {
  const int64_t n = args.n;
  over_rows(n, [&](int64_t begin, int64_t end) { kernels().sums(args, begin, end); });
  const double positive = sum_of(args.row_sums + n, n);
  args.mean[0] = sum_of(args.row_sums, n) / (positive > 1 ? positive : 1);
  args.mean[1] = positive;
  over_rows(n, [&](int64_t begin, int64_t end) { kernels().planes(args, begin, end); });
}

void run_sides(const SidesArgs& args, const Tensor&) {
  over_rows(args.n, [&](int64_t begin, int64_t end) { kernels().gram_squares(args, begin, end); });
  run_planes(args);
}

// Squared distances from differences. A task has a block of rows and its mirror image, the number of whose pairs add up
// to the same for all.
void run_squares(RowsArgs& args) {
  const int64_t n = args.n, blocks = (n + kBlock - 1) / kBlock;
  args.scale = kernels().scale(args);
  torch::stable::parallel_for(0, n, grain(args.width),
                              [&](int64_t begin, int64_t end) { kernels().copy_rows(args, begin, end); });
  const auto block = [&](int64_t b) {
    kernels().direct_squares(args, b * kBlock, b * kBlock + kBlock < n ? b * kBlock + kBlock : n);
  };
  torch::stable::parallel_for(0, (blocks + 1) / 2, grain(n * args.width), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      block(b);
      if (blocks - 1 - b != b) block(blocks - 1 - b);
    }
  });
}

// Squared distances of rows that do not count: 0.
void leave_out(const SidesArgs& args) {
  over_rows(args.n, [&](int64_t begin, int64_t end) {
    for (int64_t a = begin; a < end; ++a)
      for (int64_t b = 0; b < args.n; ++b)
        if (!args.counts(a, b)) args.squares[a * args.n + b] = 0;
  });
}

// Planes, scaled rows, and behind the mean their scale.
void run_distances(RowsArgs& args, const SidesArgs& sides, const Tensor&) {
  STD_TORCH_CHECK(sides.kind == Kind::distance, "fastkd: angles take a Gram matrix on the CPU");
  run_squares(args);
  if (sides.mask) leave_out(sides);
  run_planes(sides);
  sides.mean[2] = args.scale;
}

void run_pull(const PullArgs& args, const Tensor&) {
  // In pairs of rows, so that a pair is no other one where threads divide them otherwise.
  const int64_t pairs = (args.n + 1) / 2;
  torch::stable::parallel_for(0, pairs, grain(2 * args.n * args.width), [&](int64_t begin, int64_t end) {
    kernels().pull(args, 2 * begin, 2 * end < args.n ? 2 * end : args.n);
  });
}

void run_loss(const LossArgs& args, const Tensor&) {
  const int64_t n = args.n;
  const bool angles = args.kind != Kind::distance;
  if (angles) {
    const int64_t triplets = n * n * n / 2 / kChunks;
    torch::stable::parallel_for(0, kChunks, grain(triplets),
                                [&](int64_t begin, int64_t end) { kernels().angles(args, begin, end); });
  } else {
    over_rows(n, [&](int64_t begin, int64_t end) { kernels().distances(args, begin, end); });
  }
  if (args.loss) *args.loss = sum_of(args.row_loss, n) * args.factor();
  if (!args.need_grad) return;
  const double correction = angles ? 0 : sum_of(args.row_sums, n) / (args.mean[1] > 1 ? args.mean[1] : 1);
  over_rows(n, [&](int64_t begin, int64_t end) {
    angles ? kernels().angle_pairs(args, begin, end) : kernels().distance_pairs(args, correction, begin, end);
  });
  over_rows(n, [&](int64_t begin, int64_t end) { kernels().diagonal(args, begin, end); });
}

#else

int64_t partial_elements(int64_t n) { return partial_elements_cuda(n); }

void run_sides(const SidesArgs& args, const Tensor& like) {
  on_stream("relational", like, [&](void* stream) { return sides_cuda(args, stream); });
}

void run_distances(RowsArgs& args, const SidesArgs& sides, const Tensor& like) {
  const Tensor magnitudes = empty_like_device(like, {magnitude_blocks_cuda(args)}, ScalarType::Double);
  const int64_t parts = parts_cuda(args);
  // The squares themselves where there is one.
  const Tensor sums = empty_like_device(like, {parts > 1 ? parts : 0, args.n, args.n}, ScalarType::Double);
  args.magnitudes = doubles(magnitudes);
  args.parts = parts > 1 ? doubles(sums) : args.squares;
  args.device_scale = sides.mean + 2;
  on_stream("relational", like, [&](void* stream) { return direct_sides_cuda(args, sides, stream); });
}

void run_pull(const PullArgs& args, const Tensor& like) {
  on_stream("relational", like, [&](void* stream) { return pull_cuda(args, stream); });
}

void run_loss(const LossArgs& args, const Tensor& like) {
  on_stream("relational", like, [&](void* stream) {
    return args.kind == Kind::distance ? distances_cuda(args, stream) : angles_cuda(args, stream);
  });
}

#endif

void check_matrix(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 2 && t.scalar_type() == ScalarType::Double, "fastkd: expected a matrix in float64");
}

ScalarType plane_type(Kind kind) { return kind == Kind::single ? ScalarType::Float : ScalarType::Double; }

// bool [N], kept alive by the caller.
std::optional<Tensor> contiguous_mask(const std::optional<Tensor>& mask, int64_t n) {
  if (!mask) return std::nullopt;
  STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->numel() == n, "fastkd: bool mask [N]");
  return torch::stable::contiguous(*mask);
}

std::tuple<Tensor, Tensor> sides(const Tensor& x, const Tensor& gram, const std::optional<Tensor>& mask, int64_t kind,
                                 double eps) {
  check_matrix(x);
  check_matrix(gram);
  STD_TORCH_CHECK(gram.size(0) == x.size(0) && gram.size(1) == x.size(0), "fastkd: expected a Gram matrix [N, N]");
  check_devices(x, {&gram, pointer_to(mask)});
  const Tensor rows = torch::stable::contiguous(x), products = torch::stable::contiguous(gram);
  SidesArgs args;
  args.n = x.size(0);
  args.width = x.size(1);
  args.kind = Kind(kind);
  const std::optional<Tensor> counted = contiguous_mask(mask, args.n);
  args.mask = optional_data<bool>(counted);
  args.eps = eps;
  Tensor planes = empty_like_device(x, {plane_count(args.kind), args.n, padded_size(args.n)}, plane_type(args.kind));
  Tensor mean = empty_like_device(x, {2}, ScalarType::Double);
  Tensor squares = empty_like_device(x, {args.n, args.n}, ScalarType::Double);
  Tensor row_sums = empty_like_device(x, {2, args.n}, ScalarType::Double);
  args.x = doubles(rows);
  args.gram = doubles(products);
  args.squares = doubles(squares);
  args.row_sums = doubles(row_sums);
  args.mean = doubles(mean);
  args.planes = planes.data_ptr();
  run_sides(args, x);
  return {planes, mean};
}

std::tuple<Tensor, Tensor> loss(const Tensor& student, const Tensor& teacher, const Tensor& mean,
                                const std::optional<Tensor>& weight, int64_t kind, int64_t reduction, bool need_grad) {
  LossArgs args;
  args.n = student.size(1);
  args.kind = Kind(kind);
  args.reduction = Reduction(reduction);
  args.need_grad = need_grad;
  const ScalarType type = plane_type(args.kind);
  for (const Tensor* t : {&student, &teacher})
    STD_TORCH_CHECK(t->dim() == 3 && t->size(0) == plane_count(args.kind) && t->size(1) == args.n &&
                        t->size(2) == padded_size(args.n) && t->scalar_type() == type && t->is_contiguous(),
                    "fastkd: expected planes of this kind");
  check_devices(student, {&teacher, &mean, pointer_to(weight)});
  std::optional<Tensor> factors;
  if (weight) {
    factors = torch::stable::contiguous(*weight);
    STD_TORCH_CHECK(weight->numel() == args.n && weight->scalar_type() == ScalarType::Double, "fastkd: weights [N]");
  }
  const bool per_row = args.reduction == Reduction::none, angles = args.kind != Kind::distance;
  Tensor rows = empty_like_device(student, {args.n}, ScalarType::Double);
  Tensor result = per_row ? rows : empty_like_device(student, {}, ScalarType::Double);
  Tensor laplacian = need_grad ? empty_like_device(student, {args.n, args.n}, ScalarType::Double)
                               : empty_like_device(student, {0, 0}, ScalarType::Double);
  // CUDA sums the losses of its blocks there, too.
  Tensor partial = empty_like_device(student, {angles ? partial_elements(args.n) : 0}, type);
  Tensor row_sums = empty_like_device(student, {angles ? 0 : args.n}, ScalarType::Double);
  args.student = student.data_ptr();
  args.teacher = teacher.data_ptr();
  args.mean = doubles(mean);
  args.weight = optional_data<double>(factors);
  args.row_loss = doubles(rows);
  args.loss = per_row ? nullptr : doubles(result);
  args.laplacian = doubles(laplacian);
  args.partial = partial.data_ptr();
  args.row_sums = doubles(row_sums);
  run_loss(args, student);
  return {result, laplacian};
}

// Planes of the distances between the rows x [N, D] (float32, float64), their mean, their number and the scale of the
// rows [3], and the scaled rows [N, padded].
std::tuple<Tensor, Tensor, Tensor> distances(const Tensor& x, const std::optional<Tensor>& mask, int64_t kind, double eps) {
  STD_TORCH_CHECK(x.dim() == 2, "fastkd: expected embeddings [N, D]");
  check_devices(x, {pointer_to(mask)});
  const Tensor from = torch::stable::contiguous(x);
  RowsArgs args;
  args.n = x.size(0);
  args.columns = x.size(1);
  args.width = padded_width(args.columns);
  args.type = dtype_of(x);
  STD_TORCH_CHECK(args.type == DType::f32 || args.type == DType::f64, "fastkd: embeddings in float32 or float64");
  Tensor rows = empty_like_device(x, {args.n, args.width}, x.scalar_type());
  Tensor squares = empty_like_device(x, {args.n, args.n}, ScalarType::Double);
  SidesArgs sides;
  sides.kind = Kind(kind);
  STD_TORCH_CHECK(sides.kind == Kind::distance || (sides.kind == Kind::single) == (args.type == DType::f32),
                  "fastkd: planes of the rows' dtype");
  Tensor planes = empty_like_device(x, {plane_count(sides.kind), args.n, padded_size(args.n)}, plane_type(sides.kind));
  Tensor mean = empty_like_device(x, {3}, ScalarType::Double);
  Tensor row_sums = empty_like_device(x, {2, args.n}, ScalarType::Double);
  args.from = from.data_ptr();
  args.rows = rows.data_ptr();
  args.squares = doubles(squares);
  args.exact = sides.kind == Kind::single;
  sides.n = args.n;
  sides.eps = eps;
  sides.squares = args.squares;
  const std::optional<Tensor> counted = contiguous_mask(mask, args.n);
  sides.mask = optional_data<bool>(counted);
  sides.row_sums = doubles(row_sums);
  sides.mean = doubles(mean);
  sides.planes = planes.data_ptr();
  run_distances(args, sides, x);
  return {planes, mean, rows};
}

// The gradient [N, columns] from what `distances` and `loss` returned.
Tensor pull(const Tensor& laplacian, const Tensor& rows, const Tensor& mean, int64_t columns) {
  check_matrix(laplacian);
  PullArgs args;
  args.n = rows.size(0);
  args.columns = columns;
  args.width = rows.size(1);
  args.type = dtype_of(rows);
  STD_TORCH_CHECK(laplacian.size(0) == args.n && laplacian.is_contiguous() && rows.is_contiguous() && mean.numel() == 3 &&
                      args.width == padded_width(columns),
                  "fastkd: expected the results of relational_distances");
  check_devices(rows, {&laplacian, &mean});
  Tensor grad = empty_like_device(rows, {args.n, columns}, rows.scalar_type());
  args.rows = rows.data_ptr();
  args.laplacian = doubles(laplacian);
  args.factor = doubles(mean) + 2;
  args.grad = grad.data_ptr();
  run_pull(args, rows);
  return grad;
}

}  // namespace
}  // namespace fastkd::relational

#if !defined(FASTKD_BACKEND_CUDA)  // the CUDA library implements what the CPU library declares
STABLE_TORCH_LIBRARY_FRAGMENT(FASTKD_LIBRARY, m) {
  m.def("relational_sides(Tensor x, Tensor gram, Tensor? mask, int kind, float eps) -> (Tensor, Tensor)");
  m.def(
      "relational_loss(Tensor student, Tensor teacher, Tensor mean, Tensor? weight, int kind, int reduction, bool need_grad) "
      "-> (Tensor, Tensor)");
  m.def("relational_distances(Tensor x, Tensor? mask, int kind, float eps) -> (Tensor, Tensor, Tensor)");
  m.def("relational_pull(Tensor laplacian, Tensor rows, Tensor mean, int columns) -> Tensor");
}
#endif

STABLE_TORCH_LIBRARY_IMPL(FASTKD_LIBRARY, FASTKD_KEY, m) {
  m.impl("relational_sides", TORCH_BOX(&fastkd::relational::sides));
  m.impl("relational_loss", TORCH_BOX(&fastkd::relational::loss));
  m.impl("relational_distances", TORCH_BOX(&fastkd::relational::distances));
  m.impl("relational_pull", TORCH_BOX(&fastkd::relational::pull));
}

using fastkd::relational::Kind;
FASTKD_CONSTANTS(relational, {"distance", int(Kind::distance)}, {"single", int(Kind::single)}, {"full", int(Kind::full)},
                 {"planes_distance", fastkd::relational::plane_count(Kind::distance)},
                 {"planes_single", fastkd::relational::plane_count(Kind::single)},
                 {"planes_full", fastkd::relational::plane_count(Kind::full)},
                 {"padded_70", fastkd::relational::padded_size(70)}, {"padded_width_70", fastkd::relational::padded_width(70)})
