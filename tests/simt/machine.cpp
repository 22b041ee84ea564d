#include "simt/machine.h"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <numeric>
#include <utility>

constinit thread_local uint3 threadIdx{}, blockIdx{}, blockDim{}, gridDim{};

namespace simt {

constinit thread_local Watch watch{};
constinit thread_local Machine* running = nullptr;

void Machine::run(const Launch& launch, const Settings& settings, std::size_t dynamic_allowed) {
  launch_ = &launch;
  settings_ = settings;
  dynamic_allowed_ = dynamic_allowed;
  counters_ = {.launches = 1};
  random_ = Random(settings.schedule);
  check_launch();
  size_ = launch.block.x * launch.block.y * launch.block.z;
  struct Running {
    explicit Running(Machine* machine) { running = machine; }
    ~Running() {
      running = nullptr;
      watch.arena = nullptr;
    }
  } guard(this);
  blockDim = {launch.block.x, launch.block.y, launch.block.z};
  gridDim = {launch.grid.x, launch.grid.y, launch.grid.z};
  shared_.begin_launch(launch.dynamic_bytes);
  while (threads_.size() < size_) add_thread();
  for (unsigned t = 0, x = 0, y = 0, z = 0; t < size_; ++t) {
    threads_[t]->index = {x, y, z};
    if (++x == blockDim.x) x = 0, ++y;
    if (y == blockDim.y) y = 0, ++z;
  }
  watch_.arena = shared_.base();
  watch_.races = settings.races;
  run_blocks();
  if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
}

void Machine::check_launch() const {
  const auto refuse = [&](const std::string& what) { throw Error("simt: " + kernel_name() + ": " + what); };
  const dim3 &g = launch_->grid, &b = launch_->block;
  if (!g.x || !g.y || !g.z || !b.x || !b.y || !b.z) refuse("a dimension of the grid or the block is 0");
  if (g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535) refuse("the grid passes 2147483647 x 65535 x 65535 blocks");
  const std::uint64_t threads = std::uint64_t{b.x} * b.y * b.z;
  if (b.x > most_threads || b.y > most_threads || b.z > 64 || threads > most_threads)
    refuse("a block of " + std::to_string(threads) + " threads passes the limit of 1024 (z: 64)");
  if (launch_->dynamic_bytes > static_cast<std::size_t>(settings_.device.shared_optin))
    refuse(std::to_string(launch_->dynamic_bytes) + " bytes of dynamic shared memory pass the device's limit of " +
           std::to_string(settings_.device.shared_optin));
  check_opt_in(0);
}

// Without cudaFuncSetAttribute a block has 48 KiB, static and dynamic together.
void Machine::check_opt_in(std::size_t static_bytes) const {
  const std::size_t dynamic = launch_->dynamic_bytes;
  if (dynamic > dynamic_allowed_ && dynamic + static_bytes > SharedMemory::static_limit)
    throw Error("simt: " + kernel_name() + ": " + std::to_string(dynamic) + " bytes of dynamic and " +
                std::to_string(static_bytes) +
                " of static shared memory need cudaFuncSetAttribute(kernel, "
                "cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) before the launch");
}

void Machine::add_thread() {
  threads_.push_back(std::make_unique<Thread>());
  start(static_cast<unsigned>(threads_.size()) - 1);
}

// Brings the fiber to where it waits for its first block.
void Machine::start(unsigned index) {
  current_ = index;
  Thread& thread = *threads_[index];
  prepare(thread.context, thread.stack, index, live);
  jump(launcher_, thread.context);
}

// Blocks in order, or in a random one: CUDA promises none.
void Machine::run_blocks() {
  const dim3& grid = launch_->grid;
  const std::uint64_t blocks = std::uint64_t{grid.x} * grid.y * grid.z;
  std::vector<std::uint32_t> order;
  if (settings_.schedule && blocks <= 0xffffffffu) {
    order.resize(blocks);
    std::iota(order.begin(), order.end(), 0u);
    for (std::size_t i = 1; i < order.size(); ++i) std::swap(order[i], order[random_.below(static_cast<std::uint32_t>(i + 1))]);
  }
  for (std::uint64_t i = 0; i < blocks && !failure_; ++i) {
    const std::uint64_t at = order.empty() ? i : order[i];
    run_block({static_cast<unsigned>(at % grid.x), static_cast<unsigned>(at / grid.x % grid.y),
               static_cast<unsigned>(at / grid.x / grid.y)});
  }
}

void Machine::run_block(uint3 index) {
  blockIdx = index;
  shared_.begin_block();
  watch_.block_sync = ++watch_.now;
  exited_ = 0;
  arrived_ = {};
  for (unsigned w = 0; w * warp_size < size_; ++w) {
    const unsigned lanes = std::min(warp_size, size_ - w * warp_size);
    warps_[w] = {0, lanes == warp_size ? 0u : ~0u << lanes, watch_.now};
  }
  ready_.begin(settings_.schedule, random_);
  for (unsigned t = 0; t < size_; ++t) {
    threads_[t]->state = State::fresh;
    ready_.push(t);
  }
  ready_.settle(size_);
  const unsigned first = ready_.take();
  become(first);
  jump(launcher_, threads_[first]->context);
  if (!failure_ && exited_ < size_) failure_ = std::make_exception_ptr(deadlock());
  if (!failure_)
    if (const std::string what = shared_.overwritten(); !what.empty()) failure_ = std::make_exception_ptr(error_in_block(what));
  if (failure_) abandon();
  ++counters_.blocks;
}

// Destructors run on every suspended fiber's stack, which then waits for its next block.
void Machine::abandon() {
  abandoning_ = true;
  for (unsigned t = 0; t < size_; ++t) {
    if (threads_[t]->state == State::fresh || threads_[t]->state == State::done) continue;
    become(t);
    if (threads_[t]->state == State::stopped)
      start(t);
    else
      jump(launcher_, threads_[t]->context);
  }
  abandoning_ = false;
}

void Machine::live() {
  Machine& machine = *running;
  Thread& me = *machine.threads_[machine.current_];
  arrive(machine.launcher_);
  jump(me.context, machine.launcher_);
  for (;;) {
    try {
      me.state = State::running;
      machine.launch_->body(machine.launch_->arguments);
      machine.end_thread();
    } catch (const Abandoned&) {
    } catch (...) {
      if (!machine.failure_) machine.failure_ = std::current_exception();
    }
    me.state = State::done;
    machine.switch_away();
  }
}

void Machine::end_thread() {
  const Warp& warp = warps_[current_ / warp_size];
  const unsigned lane = current_ % warp_size, first = current_ - lane;
  for (unsigned waiting = warp.waiting; waiting; waiting &= waiting - 1) {
    const Thread& other = *threads_[first + std::countr_zero(waiting)];
    if (other.mask >> lane & 1)
      throw error("it exits while " + whereabouts(first + std::countr_zero(waiting)) + ", which names its lane");
  }
  if (arrived_.threads) throw error("it exits while " + whereabouts(arrived_.first));
  warps_[current_ / warp_size].gone |= 1u << lane;
  last_exited_ = current_;
  ++exited_;
}

void Machine::become(unsigned thread) {
  current_ = thread;
  thread_index_ = threads_[thread]->index;
  watch_.thread = thread;
  watch_.warp_sync = warps_[thread / warp_size].sync;
}

void Machine::switch_away() {
  Context& from = threads_[current_]->context;
  ++counters_.switches;
  if (failure_ || abandoning_ || ready_.empty()) return jump(from, launcher_);
  const unsigned next = ready_.take();
  const bool same = next == current_;
  become(next);
  if (!same) jump(from, threads_[next]->context);
}

void Machine::suspend() {
  switch_away();
  if (abandoning_) throw Abandoned{};
}

// Not by an exception: the caller may be code that the compiler believes not to throw.
void Machine::stop(const std::string& what) {
  failure_ = std::make_exception_ptr(error(what));
  threads_[current_]->state = State::stopped;
  jump(threads_[current_]->context, launcher_);
  std::abort();
}

void* Machine::shared_bytes(const char* site, const char* name, std::size_t bytes, std::size_t alignment) {
  if (SharedMemory::Array* array = shared_.find(site)) return shared_.base() + array->begin;
  const std::size_t all = shared_.static_bytes() + bytes;
  if (all > SharedMemory::static_limit)
    throw error("shared array '" + std::string(name) + "' brings static shared memory to " + std::to_string(all) +
                " bytes, past the limit of 49152");
  if (all + launch_->dynamic_bytes > static_cast<std::size_t>(settings_.device.shared_optin))
    throw error("shared array '" + std::string(name) + "' brings shared memory to " +
                std::to_string(all + launch_->dynamic_bytes) + " bytes, past the device's limit of " +
                std::to_string(settings_.device.shared_optin));
  check_opt_in(all);
  const SharedMemory::Array* array = shared_.add(site, name, bytes, std::max<std::size_t>(16, alignment));
  if (!array) throw error("too many shared arrays");
  return shared_.base() + array->begin;
}

}  // namespace simt
