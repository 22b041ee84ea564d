// The forward over rows of learners of one dtype; cuda_f32.cu and its siblings define it, one dtype each.
#pragma once

#include "core/cuda/simt.h"
#include "mutual/op.h"

namespace fastkd::mutual {
inline namespace FASTKD_TARGET {

template <class S>
void forward_rows(const Args&, cudaStream_t);

}  // namespace FASTKD_TARGET
}  // namespace fastkd::mutual
