// Where threads meet: barriers of the block, operations of a warp, and what is said when they do not.
#include <bit>
#include <cstdio>
#include <cstring>

#include "simt/machine.h"

namespace simt {

int Machine::barrier(Barrier kind, const char* name, int predicate, const Where& where) {
  if (abandoning_) return 0;
  if (exited_)
    throw error(std::string(name) + " at " + place(where) + " is divergent, " + whereabouts(last_exited_) + " has exited");
  if (arrived_.threads == 0) {
    arrived_ = {0, current_, 0, name, where};
  } else if (arrived_.name != name || arrived_.where.line() != where.line() || arrived_.where.column() != where.column() ||
             std::strcmp(arrived_.where.file_name(), where.file_name()) != 0) {
    throw error(std::string(name) + " at " + place(where) + " is divergent, " + whereabouts(arrived_.first));
  }
  arrived_.counted += predicate != 0;
  threads_[current_]->state = State::at_barrier;
  if (++arrived_.threads == size_) release_barrier(kind);
  suspend();
  return barrier_result_;
}

void Machine::release_barrier(Barrier kind) {
  const unsigned counted = arrived_.counted;
  barrier_result_ = kind == Barrier::count ? static_cast<int>(counted) : kind == Barrier::all ? counted == size_ : counted != 0;
  arrived_ = {};
  ++counters_.barriers;
  watch_.block_sync = ++watch_.now;
  for (unsigned t = 0; t < size_; ++t) {
    threads_[t]->state = State::running;
    ready_.push(t);
  }
  ready_.settle(size_);
}

std::uint64_t Machine::warp_operation(const WarpOperation& operation, unsigned mask, std::uint64_t value, unsigned source,
                                      const Where& where) {
  if (abandoning_) return 0;
  const unsigned lane = current_ % warp_size, first = current_ - lane;
  Warp& warp = warps_[current_ / warp_size];
  Thread& me = *threads_[current_];
  me.operation = &operation;
  me.mask = mask;
  me.value = value;
  me.source = source;
  me.where = where;
  if (!(mask >> lane & 1) || mask & warp.gone) throw bad_mask();
  if (mask & warp.waiting) check_same(first + std::countr_zero(mask & warp.waiting));
  me.state = State::at_warp;
  warp.waiting |= 1u << lane;
  if ((warp.waiting & mask) == mask) complete(first, mask);
  suspend();
  return me.result;
}

Error Machine::warp_error(const std::string& how) const {
  const Thread& me = *threads_[current_];
  char hex[16];
  std::snprintf(hex, sizeof hex, "0x%08x", me.mask);
  return error(me.operation->name + (" at " + place(me.where)) + " with mask " + hex + " " + how);
}

Error Machine::bad_mask() const {
  const unsigned lane = current_ % warp_size, first = current_ - lane, mask = threads_[current_]->mask;
  if (!(mask >> lane & 1)) return warp_error("does not name the calling lane " + std::to_string(lane));
  const unsigned other = std::countr_zero(mask & warps_[current_ / warp_size].gone);
  return warp_error("names lane " + std::to_string(other) +
                    (first + other < size_ ? ", which has exited"
                                           : ", which a block of " + std::to_string(size_) + " threads does not have"));
}

void Machine::check_same(unsigned other) const {
  const Thread &me = *threads_[current_], &it = *threads_[other];
  if (it.operation != me.operation || it.mask != me.mask) throw warp_error("is divergent, " + whereabouts(other));
}

void Machine::complete(unsigned first, unsigned mask) {
  const Thread& me = *threads_[current_];
  const WarpOperation& operation = *me.operation;
  std::uint64_t all = 0;
  bool any = false;
  for (unsigned lanes = mask; lanes; lanes &= lanes - 1) {
    const Thread& t = *threads_[first + std::countr_zero(lanes)];
    check_same(first + std::countr_zero(lanes));
    if (operation.how == WarpOperation::ballot) all |= std::uint64_t{t.value != 0} << std::countr_zero(lanes);
    if (operation.how == WarpOperation::fold) all = any ? operation.combine(all, t.value) : t.value;
    any = true;
  }
  for (unsigned lanes = mask; lanes; lanes &= lanes - 1) {
    const unsigned t = first + std::countr_zero(lanes);
    Thread& thread = *threads_[t];
    const unsigned from = thread.source % warp_size;
    thread.result = operation.how != WarpOperation::gather ? all
                    : mask >> from & 1                     ? threads_[first + from]->value
                                                           : ~std::uint64_t{0};
    thread.state = State::running;
    ready_.push(t);
  }
  ready_.settle(std::popcount(mask));
  Warp& warp = warps_[first / warp_size];
  warp.waiting &= ~mask;
  if (operation.how == WarpOperation::synchronise) warp.sync = ++watch_.now;  // shuffles and votes order no memory
  ++counters_.warp_operations;
}

Error Machine::deadlock() const {
  for (unsigned t = 0; t < size_; ++t) {
    if (threads_[t]->state != State::at_warp) continue;
    const unsigned missing = threads_[t]->mask & ~warps_[t / warp_size].waiting;
    const unsigned other = t - t % warp_size + std::countr_zero(missing);
    return error_in_block("deadlock: " + whereabouts(t) + ", while " + whereabouts(missing ? other : t));
  }
  return error_in_block("deadlock");
}

std::string Machine::whereabouts(unsigned thread) const {
  const Thread& t = *threads_[thread];
  const std::string who = "thread " + point(t.index, launch_->block);
  if (t.state == State::at_barrier) return who + " waits at " + arrived_.name + " at " + place(arrived_.where);
  if (t.state != State::at_warp) return who;
  char hex[16];
  std::snprintf(hex, sizeof hex, "0x%08x", t.mask);
  return who + " waits at " + t.operation->name + " at " + place(t.where) + " with mask " + hex;
}

Error Machine::error(const std::string& what) const {
  return error_in_block("thread " + point(threads_[current_]->index, launch_->block) + ": " + what);
}

Error Machine::error_in_block(const std::string& what) const {
  return Error("simt: " + kernel_name() + ", block " + point(blockIdx, launch_->grid) + ", " + what);
}

// Without the parentheses that the launch macro needs.
std::string Machine::kernel_name() const {
  const std::string name = launch_->name;
  return name.starts_with('(') && name.ends_with(')') ? name.substr(1, name.size() - 2) : name;
}

std::string point(const uint3& p, const dim3& size) {
  if (size.y == 1 && size.z == 1) return std::to_string(p.x);
  return "(" + std::to_string(p.x) + ", " + std::to_string(p.y) + ", " + std::to_string(p.z) + ")";
}

std::string place(const Where& where) {
  const char* slash = std::strrchr(where.file_name(), '/');
  return (slash ? slash + 1 : where.file_name()) + (":" + std::to_string(where.line()));
}

}  // namespace simt
