// The forward over rows and the backward of streamed rows of one dtype of the student; cuda_f32.cu and its siblings define
// them, one dtype each.
#pragma once

#include "core/cuda/simt.h"
#include "multi_teacher/op.h"

namespace fastkd::multi_teacher {
inline namespace FASTKD_TARGET {

template <class S>
void forward_rows(const Args&, cudaStream_t);
template <class S>
void stream_backward_rows(const Args&, const void* grad_loss, cudaStream_t);

}  // namespace FASTKD_TARGET
}  // namespace fastkd::multi_teacher
