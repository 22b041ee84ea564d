// The kernels over rows of learners in Half.
#include "mutual/launch_rows.cuh"

namespace fastkd::mutual {
inline namespace FASTKD_TARGET {

template void forward_rows<Half>(const Args&, cudaStream_t);

}  // namespace FASTKD_TARGET
}  // namespace fastkd::mutual
