// Races in shared memory, accesses outside of it, and misaligned accesses anywhere, found by the compiler's help: in a
// source that is compiled with -fsanitize=thread, every load and store first calls one of the functions below. They
// replace the thread sanitizer's own library, which is not linked.
//
// Two accesses of one byte race when different threads make them, one of them writes, and neither a barrier of the
// block nor, within a warp, a __syncwarp() lies between them. A shuffle or a vote does not order memory.
// Atomics are left out; so are memcpy and memset, where they remain calls.
#include <cstdlib>

#include "simt/machine.h"

namespace simt {

namespace {

struct Access {
  std::uint32_t moment;  // 0: never
  std::uint16_t thread;
};

struct Byte {
  Access write, reads[2];  // the last two readers: a third one's race with a later write can be missed
};

// calloc: pages of zeros that cost nothing until a kernel's shared memory reaches them.
struct Shadow {
  Byte* bytes = static_cast<Byte*>(std::calloc(SharedMemory::arena_bytes, sizeof(Byte)));
  ~Shadow() { std::free(bytes); }
};

bool ordered(const Access& before) {
  if (before.thread == watch.thread || before.moment < watch.block_sync) return true;
  return before.thread / 32 == watch.thread / 32 && before.moment < watch.warp_sync;
}

[[noreturn]] void report(const char* before, const Access& access, const char* now, std::size_t at) {
  stop("data race in shared memory: thread " + std::to_string(access.thread) + " " + before + " and thread " +
       std::to_string(watch.thread) + " " + now + " " + shared_memory().place(at) + " without a barrier between them");
}

void look(Byte& byte, bool writes, std::size_t at) {
  const Access me{watch.now, static_cast<std::uint16_t>(watch.thread)};
  if (!ordered(byte.write)) report("writes", byte.write, writes ? "writes" : "reads", at);
  if (writes) {
    for (const Access& read : byte.reads)
      if (!ordered(read)) report("reads", read, "writes", at);
    byte.write = me;
  } else {
    if (byte.reads[0].thread != me.thread) byte.reads[1] = byte.reads[0];
    byte.reads[0] = me;
  }
}

[[gnu::noinline]] void look_at_shared(std::size_t at, std::size_t bytes, bool writes) {
  static thread_local Shadow shadow;
  if (!shared_memory().inside(at, bytes))
    stop(std::string("it ") + (writes ? "writes " : "reads ") + shared_memory().place(at));
  if (!watch.races) return;
  for (std::size_t i = at; i < at + bytes; ++i) look(shadow.bytes[i], writes, i);
}

inline void seen(const void* pointer, std::size_t bytes, bool writes) {
  if (!watch.arena) return;
  const std::size_t at = static_cast<std::size_t>(static_cast<const char*>(pointer) - watch.arena);
  if (at < SharedMemory::arena_bytes) look_at_shared(at, bytes, writes);
}

inline void seen_aligned(const void* pointer, std::size_t bytes, bool writes) {
  if (!watch.arena) return;
  const std::size_t off = reinterpret_cast<std::uintptr_t>(pointer) % bytes;
  if (off != 0) stop(misaligned(off, bytes));
  seen(pointer, bytes, writes);
}

}  // namespace

}  // namespace simt

#define SIMT_HOOK __attribute__((visibility("hidden"))) void
#define SIMT_ACCESS(bytes)                                                         \
  SIMT_HOOK __tsan_read##bytes(void* p) { simt::seen_aligned(p, bytes, false); }   \
  SIMT_HOOK __tsan_write##bytes(void* p) { simt::seen_aligned(p, bytes, true); }   \
  SIMT_HOOK __tsan_unaligned_read##bytes(void* p) { simt::seen(p, bytes, false); } \
  SIMT_HOOK __tsan_unaligned_write##bytes(void* p) { simt::seen(p, bytes, true); }

extern "C" {
SIMT_ACCESS(1)
SIMT_ACCESS(2)
SIMT_ACCESS(4)
SIMT_ACCESS(8)
SIMT_ACCESS(16)
SIMT_HOOK __tsan_read_range(void* p, std::size_t bytes) { simt::seen(p, bytes, false); }
SIMT_HOOK __tsan_write_range(void* p, std::size_t bytes) { simt::seen(p, bytes, true); }
SIMT_HOOK __tsan_func_entry(void*) {}
SIMT_HOOK __tsan_func_exit() {}
SIMT_HOOK __tsan_vptr_update(void**, void*) {}
SIMT_HOOK __tsan_init() {}
}
