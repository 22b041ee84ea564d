// The kernels over rows of learners in float.
#include "mutual/launch_rows.cuh"

namespace fastkd::mutual {
inline namespace FASTKD_TARGET {

template void forward_rows<float>(const Args&, cudaStream_t);

}  // namespace FASTKD_TARGET
}  // namespace fastkd::mutual
