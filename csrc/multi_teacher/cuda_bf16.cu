// The kernels over rows of students in BFloat16.
#include "multi_teacher/launch_rows.cuh"

namespace fastkd::multi_teacher {
inline namespace FASTKD_TARGET {

template void forward_rows<BFloat16>(const Args&, cudaStream_t);
template void stream_backward_rows<BFloat16>(const Args&, const void*, cudaStream_t);

}  // namespace FASTKD_TARGET
}  // namespace fastkd::multi_teacher
