// The scheduler without Python, to try it in other builds: swapcontext instead of the assembly, AddressSanitizer.
// Prints one line per fault that a kernel makes, and fails on a wrong sum.
#include <cstdio>
#include <exception>
#include <iterator>
#include <vector>

#include "core/cuda/simt.h"
#include "simt/selftest.h"

namespace {

bool sums_agree(int threads) {
  std::vector<float> x(3 * 700), out(3);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 7);
  selftest::run_block_sum(true, x.data(), out.data(), 3, 700, threads);
  for (float sum : out)
    if (sum != 2100) return false;
  return true;
}

}  // namespace

int main() {
  int wrong = 0;
  for (std::uint64_t schedule = 0; schedule < 3; ++schedule) {
    simt::Settings settings;
    settings.schedule = schedule;
    simt::configure(settings);
    for (int threads : {1, 31, 32, 33, 256, 1024}) wrong += !sums_agree(threads);
    for (std::size_t fault = 0; fault < std::size(selftest::fault_names); ++fault) {
      std::vector<float> out(64);
      try {
        selftest::run_faulty(static_cast<selftest::Fault>(fault), out.data(), 64);
        std::printf("%s: nothing\n", selftest::fault_names[fault]);
      } catch (const std::exception& e) {
        std::printf("%s: %s\n", selftest::fault_names[fault], e.what());
      }
      wrong += !sums_agree(256);
    }
  }
  std::printf("%d wrong sums\n", wrong);
  return wrong != 0;
}
