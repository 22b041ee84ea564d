// A block's shared memory: dynamic bytes and static arrays, each between guards.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

namespace simt {

class SharedMemory {
 public:
  static constexpr std::size_t arena_bytes = 512 << 10;  // 256 KiB at most, 48 KiB of statics, and their guards
  static constexpr std::size_t static_limit = 48 << 10;

  struct Array {
    const char* site;  // null: the dynamic one
    const char* name;
    std::size_t begin, bytes;
    std::size_t end() const { return begin + bytes; }
  };

  char* base() const { return arena_; }
  Array& dynamic() { return arrays_[0]; }
  std::size_t static_bytes() const { return static_bytes_; }

  void begin_launch(std::size_t dynamic_bytes) {
    arrays_.clear();
    used_ = static_bytes_ = 0;
    add(nullptr, "dynamic shared memory", dynamic_bytes, 16);
  }

  // All bits set: NaN in every floating-point type, -1 in integers.
  void begin_block() const {
    for (const Array& a : arrays_) std::memset(arena_ + a.begin, 0xff, a.bytes);
  }

  // Null: not yet in this launch.
  Array* find(const char* site) {
    for (Array& a : arrays_)
      if (a.site == site) return &a;
    return nullptr;
  }

  // Null: no room. The address is aligned as asked and no better, so that a kernel cannot rely on more by luck.
  Array* add(const char* site, const char* name, std::size_t bytes, std::size_t alignment) {
    const std::size_t begin = (used_ + guard_bytes + 2 * alignment - 1) / (2 * alignment) * (2 * alignment) + alignment;
    const std::size_t end = begin + bytes + guard_bytes;
    if (bytes > arena_bytes || end > arena_bytes) return nullptr;
    fill_guard(used_, begin);
    std::memset(arena_ + begin, 0xff, bytes);
    fill_guard(begin + bytes, end);
    arrays_.push_back({site, name, begin, bytes});
    used_ = begin + bytes;
    if (site) static_bytes_ += bytes;
    return &arrays_.back();
  }

  // What was written outside of the arrays, as part of a sentence; empty: nothing.
  std::string overwritten() const {
    std::size_t from = 0;
    for (std::size_t i = 0; i <= arrays_.size(); ++i) {
      const std::size_t to = i < arrays_.size() ? arrays_[i].begin : used_ + guard_bytes;
      for (std::size_t at = from; at < to; ++at)
        if (arena_[at] != guard(at)) return "a thread wrote " + place(at);
      if (i < arrays_.size()) from = arrays_[i].end();
    }
    return {};
  }

  // "byte 12 of shared array 'part'", or where outside of all arrays.
  std::string place(std::size_t at) const {
    const Array* before = nullptr;
    for (const Array& a : arrays_) {
      if (at >= a.begin && at < a.end()) return "byte " + std::to_string(at - a.begin) + " of " + title(a);
      if (a.end() <= at && (a.bytes || !before)) before = &a;
    }
    if (!before) return "a byte before the start of " + title(arrays_[0]);
    return "byte " + std::to_string(at - before->begin) + " of " + title(*before) + ", which has " +
           std::to_string(before->bytes) + " bytes";
  }

  bool inside(std::size_t at, std::size_t bytes) const {
    for (const Array& a : arrays_)
      if (at >= a.begin && at + bytes <= a.end()) return true;
    return false;
  }

 private:
  static constexpr std::size_t guard_bytes = 256;
  // Also NaN in every floating-point type, but not what begin_block() writes.
  static char guard(std::size_t at) { return static_cast<char>(at % 2 ? 0xff : 0xa7); }
  static std::string title(const Array& a) {
    return a.site ? "shared array '" + std::string(a.name) + "'" : std::string(a.name);
  }
  void fill_guard(std::size_t from, std::size_t to) const {
    for (std::size_t at = from; at < to; ++at) arena_[at] = guard(at);
  }

  // A page's alignment makes offsets and addresses equally aligned.
  std::unique_ptr<char[]> memory_{new char[arena_bytes + 4096]};
  char* arena_ = memory_.get() + (4096 - reinterpret_cast<std::uintptr_t>(memory_.get()) % 4096) % 4096;
  std::vector<Array> arrays_;
  std::size_t used_ = 0, static_bytes_ = 0;
};

}  // namespace simt
