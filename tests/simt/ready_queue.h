// The threads of a block that can run, and which of them does.
#pragma once

#include <cstdint>
#include <utility>

namespace simt {

// splitmix64: the same numbers everywhere, for one seed.
class Random {
 public:
  explicit Random(std::uint64_t seed = 0) : state_(seed) {}
  std::uint32_t below(std::uint32_t n) { return static_cast<std::uint32_t>(((next() >> 32) * n) >> 32); }

 private:
  std::uint64_t next() {
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  std::uint64_t state_;
};

class ReadyQueue {
 public:
  static constexpr unsigned capacity = 1024;

  void begin(std::uint64_t schedule, Random& random) {
    head_ = size_ = 0;
    random_ = &random;
    order_ = schedule == 0 ? Order::first_in : schedule % 2 ? Order::any : Order::last_in;
  }
  bool empty() const { return size_ == 0; }

  // Threads that became ready together are pushed together: `push` each, then `settle` their number.
  void push(unsigned thread) { at(size_++) = static_cast<std::uint16_t>(thread); }
  void settle(unsigned count) {
    if (order_ != Order::last_in) return;
    for (unsigned i = 1; i < count; ++i) std::swap(at(size_ - 1 - i), at(size_ - 1 - random_->below(i + 1)));
  }

  unsigned take() {
    if (order_ == Order::last_in) return at(--size_);
    if (order_ == Order::any) std::swap(at(0), at(random_->below(size_)));
    const unsigned thread = at(0);
    ++head_, --size_;
    return thread;
  }

 private:
  enum class Order { first_in, any, last_in };
  std::uint16_t& at(unsigned i) { return items_[(head_ + i) % capacity]; }
  std::uint16_t items_[capacity];
  unsigned head_ = 0, size_ = 0;
  Order order_ = Order::first_in;
  Random* random_ = nullptr;
};

}  // namespace simt
