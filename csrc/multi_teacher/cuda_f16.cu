// The kernels over rows of students in Half.
#include "multi_teacher/launch_rows.cuh"

namespace fastkd::multi_teacher {
inline namespace FASTKD_TARGET {

template void forward_rows<Half>(const Args&, cudaStream_t);
template void stream_backward_rows<Half>(const Args&, const void*, cudaStream_t);

}  // namespace FASTKD_TARGET
}  // namespace fastkd::multi_teacher
