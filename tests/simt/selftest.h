// The self-test kernels of kernels.cuh, as functions of host memory.
#pragma once

namespace selftest {

enum class Fault {
  none,
  divergent_barrier,  // two call sites
  barrier_after_exit,
  exit_before_barrier,
  exited_lane,
  lane_not_in_mask,
  other_operation,
  other_mask,
  deadlock,
  past_dynamic,
  before_dynamic,
  past_static,
  exception,
  bad_width,
  nested_launch,
};
inline constexpr const char* fault_names[] = {"none",        "divergent_barrier", "barrier_after_exit", "exit_before_barrier",
                                              "exited_lane", "lane_not_in_mask",  "other_operation",    "other_mask",
                                              "deadlock",    "past_dynamic",      "before_dynamic",     "past_static",
                                              "exception",   "bad_width",         "nested_launch"};

void run_block_sum(bool with_barrier, const float* x, float* out, int rows, int n, int threads);  // x [rows, n]
void run_warp_rotate(bool with_sync, const int* x, int* out);                                     // [32]
void run_scan(bool with_barrier, const int* x, int* out, int n);                                  // [n]
void run_faulty(Fault fault, float* out, int threads);                                              // out [threads]
void run_arrays(int* out);                                                                        // [128]
void run_uninitialised(float* out, int blocks);                                                   // [blocks, 2]
void run_vector_copy(bool asserted, const float* from, float* to, int vectors);                   // [4 * vectors]
void run_shuffles(const float* x, float* out, int n, int argument, int width);                    // [n] -> [4, n]
void run_shuffles(const double* x, double* out, int n, int argument, int width);
void run_shuffles(const long long* x, long long* out, int n, int argument, int width);
void run_votes(const int* x, int* out, int n);                                                    // [n] -> [12, n]
void run_atomics(const int* x, int* out, int n);                                                  // [n] -> [8]
void run_histogram(bool atomic, const int* x, int* out, int n);                                   // [n] -> [4]
void run_indices(int* out, const unsigned (&grid)[3], const unsigned (&block)[3]);                // [blocks, threads, 6]
void run_barriers(int threads, int steps);
void run_exchanges(int threads, int steps, int* out);                                             // [threads]
void run_functions(float x, unsigned bits, float* out);                                           // [16]
void run_empty(unsigned blocks, unsigned threads, int dynamic_bytes, bool opt_in);
void run_large_static(float* out);
int destroyed_objects();  // by the fibers of run_faulty

}  // namespace selftest
