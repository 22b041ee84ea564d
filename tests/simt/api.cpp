// What tests/simt/host/machine.h declares.
#include <map>
#include <memory>
#include <mutex>

#include "simt/machine.h"

namespace simt {

namespace {

std::mutex mutex;
Settings current_settings;
Counters total;
std::map<const void*, std::size_t> dynamic_allowed;  // by kernel, as cudaFuncSetAttribute keeps it: for good

Machine& required(const char* what) {
  if (!running) throw Error(std::string("simt: ") + what + " outside of a kernel");
  return *running;
}

}  // namespace

Settings settings() {
  const std::lock_guard lock(mutex);
  return current_settings;
}

void configure(const Settings& settings) {
  if (settings.device.shared_optin < 48 << 10 || settings.device.shared_optin > 256 << 10)
    throw Error("simt: shared_optin is expected within 48 and 256 KiB");
  const std::lock_guard lock(mutex);
  current_settings = settings;
}

Counters counters() {
  const std::lock_guard lock(mutex);
  return total;
}

void reset_counters() {
  const std::lock_guard lock(mutex);
  total = {};
}

void allow_dynamic_shared(const void* kernel, std::size_t bytes) {
  const std::lock_guard lock(mutex);
  dynamic_allowed[kernel] = bytes;
}

void launch(const Launch& launch) {
  static thread_local const auto owner = std::make_unique<Machine>();
  Machine& machine = *owner;
  if (running) fail("a kernel launches a kernel");
  std::size_t allowed = 0;
  {
    const std::lock_guard lock(mutex);
    if (const auto found = dynamic_allowed.find(launch.kernel); found != dynamic_allowed.end()) allowed = found->second;
  }
  struct Count {
    const Machine& machine;
    ~Count() {
      const std::lock_guard lock(mutex);
      const Counters& c = machine.counters();
      total.launches += c.launches;
      total.blocks += c.blocks;
      total.barriers += c.barriers;
      total.warp_operations += c.warp_operations;
      total.switches += c.switches;
    }
  } count{machine};
  machine.run(launch, settings(), allowed);
}

int barrier(Barrier kind, const char* name, int predicate, const Where& where) {
  return required(name).barrier(kind, name, predicate, where);
}

std::uint64_t warp_operation(const WarpOperation& operation, unsigned mask, std::uint64_t value, unsigned source,
                             const Where& where) {
  return required(operation.name).warp_operation(operation, mask, value, source, where);
}

unsigned lane() { return required("a warp operation").thread() % Machine::warp_size; }

void* shared_bytes(const char* site, const char* name, std::size_t bytes, std::size_t alignment) {
  return required("a shared array").shared_bytes(site, name, bytes, alignment);
}

void* dynamic_shared(const char*) {
  SharedMemory& shared = required("dynamic shared memory").shared();
  return shared.base() + shared.dynamic().begin;
}

void check_aligned(const void* pointer, std::size_t bytes) {
  const std::size_t off = reinterpret_cast<std::uintptr_t>(pointer) % bytes;
  if (off != 0) fail(misaligned(off, bytes));
}

void fail(const std::string& what) {
  if (running) throw running->error(what);
  throw Error("simt: " + what);
}

const SharedMemory& shared_memory() { return running->shared(); }
void stop(const std::string& what) { running->stop(what); }

}  // namespace simt
