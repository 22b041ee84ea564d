// Numbers that Python knows too. Each operation's op.cpp exports its own, and tests/ops/test_constants.py compares them.
#pragma once

#include <cstdint>

namespace fastkd {

struct Constant {
  const char* name;
  int64_t value;
};

}  // namespace fastkd

// FASTKD_CONSTANTS(op, {"name", value}, ...): `fastkd_<op>_constants` of the library; the list ends with a null name.
#define FASTKD_CONSTANTS(op, ...)                                                                       \
  extern "C" __attribute__((visibility("default"))) const fastkd::Constant* fastkd_##op##_constants() { \
    static const fastkd::Constant list[] = {__VA_ARGS__, {nullptr, 0}};                                 \
    return list;                                                                                        \
  }
