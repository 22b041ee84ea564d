// Entry points of the self-test kernels: bound to Python by module.cpp, compiled as a check by nvcc.
#include "simt/selftest.h"

#include "simt/kernels.cuh"

namespace selftest {

void run_block_sum(bool with_barrier, const float* x, float* out, int rows, int n, int threads) {
  cudaStream_t stream = nullptr;
  if (with_barrier)
    SIMT_LAUNCH((block_sum<true>), rows, threads, 0, stream, x, out, n);
  else
    SIMT_LAUNCH((block_sum<false>), rows, threads, 0, stream, x, out, n);
}

void run_warp_rotate(bool with_sync, const int* x, int* out) {
  if (with_sync)
    SIMT_LAUNCH((warp_rotate<true>), 1, 32, 0, nullptr, x, out);
  else
    SIMT_LAUNCH((warp_rotate<false>), 1, 32, 0, nullptr, x, out);
}

void run_scan(bool with_barrier, const int* x, int* out, int n) {
  if (with_barrier)
    SIMT_LAUNCH((scan<true>), 1, n, 0, nullptr, x, out);
  else
    SIMT_LAUNCH((scan<false>), 1, n, 0, nullptr, x, out);
}

void run_faulty(Fault fault, float* out, int threads) {
  SIMT_LAUNCH(faulty, 1, threads, threads * sizeof(float), nullptr, fault, out);
}

void run_arrays(int* out) {
  SIMT_LAUNCH((arrays<32>), 1, 32, 0, nullptr, out);
  SIMT_LAUNCH((arrays<96>), 1, 96, 0, nullptr, out + 32);
}

void run_uninitialised(float* out, int blocks) { SIMT_LAUNCH(uninitialised, blocks, 1, 16, nullptr, out); }

void run_vector_copy(bool asserted, const float* from, float* to, int vectors) {
  if (asserted)
    SIMT_LAUNCH(vector_copy, 1, vectors, 0, nullptr, from, to);
  else
    SIMT_LAUNCH(bare_vector_copy, 1, vectors, 0, nullptr, from, to);
}

void run_shuffles(const float* x, float* out, int n, int argument, int width) {
  SIMT_LAUNCH((shuffles<float>), 1, n, 0, nullptr, x, out, argument, width);
}
void run_shuffles(const double* x, double* out, int n, int argument, int width) {
  SIMT_LAUNCH((shuffles<double>), 1, n, 0, nullptr, x, out, argument, width);
}
void run_shuffles(const long long* x, long long* out, int n, int argument, int width) {
  SIMT_LAUNCH((shuffles<long long>), 1, n, 0, nullptr, x, out, argument, width);
}

void run_votes(const int* x, int* out, int n) { SIMT_LAUNCH(votes, 1, n, 0, nullptr, x, out); }

void run_atomics(const int* x, int* out, int n) {
  Totals t{0, 0, 0, 0, -1000, 1000, 0, 0};
  SIMT_LAUNCH(atomics, (n + 63) / 64, 64, 0, nullptr, x, &t, n);
  const int totals[] = {t.sum,
                        static_cast<int>(t.count),
                        static_cast<int>(t.wide >> 32),
                        static_cast<int>(2 * t.real),
                        t.greatest,
                        t.least,
                        static_cast<int>(t.wrapped),
                        t.swapped};
  for (int i = 0; i < 8; ++i) out[i] = totals[i];
}

void run_histogram(bool atomic, const int* x, int* out, int n) {
  if (atomic)
    SIMT_LAUNCH((histogram<true>), 1, n, 0, nullptr, x, out);
  else
    SIMT_LAUNCH((histogram<false>), 1, n, 0, nullptr, x, out);
}

void run_indices(int* out, const unsigned (&grid)[3], const unsigned (&block)[3]) {
  SIMT_LAUNCH(indices, dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]), 0, nullptr, out);
}

void run_barriers(int threads, int steps) { SIMT_LAUNCH(barriers, 1, threads, 0, nullptr, steps); }
void run_exchanges(int threads, int steps, int* out) { SIMT_LAUNCH(exchanges, 1, threads, 0, nullptr, steps, out); }
void run_functions(float x, unsigned bits, float* out) { SIMT_LAUNCH(functions, 1, 1, 0, nullptr, x, bits, out); }

void run_empty(unsigned blocks, unsigned threads, int dynamic_bytes, bool opt_in) {
  if (!opt_in) {
    SIMT_LAUNCH((empty<0>), blocks, threads, dynamic_bytes, nullptr);
    return;
  }
  cudaFuncSetAttribute(empty<1>, cudaFuncAttributeMaxDynamicSharedMemorySize, dynamic_bytes);
  SIMT_LAUNCH((empty<1>), blocks, threads, dynamic_bytes, nullptr);
}

#ifndef __CUDACC__
void run_large_static(float* out) { SIMT_LAUNCH(large_static, 1, 1, 0, nullptr, out); }
int destroyed_objects() { return destroyed; }
#endif

}  // namespace selftest
