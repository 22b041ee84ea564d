// The kernels over rows of learners in BFloat16.
#include "mutual/launch_rows.cuh"

namespace fastkd::mutual {
inline namespace FASTKD_TARGET {

template void forward_rows<BFloat16>(const Args&, cudaStream_t);

}  // namespace FASTKD_TARGET
}  // namespace fastkd::mutual
