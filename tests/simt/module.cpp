// The Python module fastkd_simt: the host scheduler's settings and counters, and the self-test kernels. Importing it
// also registers the operations' CUDA kernels as torch.ops.fastkd_simt.* for CPU tensors (csrc/*/op.cpp).
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <iterator>
#include <string>
#include <vector>

#include "core/cuda/simt.h"
#include "simt/selftest.h"

namespace py = pybind11;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

void set_device(const py::kwargs& changes) {
  simt::Settings settings = simt::settings();
  simt::Device& d = settings.device = {};
  const std::pair<const char*, int*> fields[] = {{"compute_major", &d.compute_major},
                                                 {"compute_minor", &d.compute_minor},
                                                 {"multiprocessors", &d.multiprocessors},
                                                 {"threads_per_multiprocessor", &d.threads_per_multiprocessor},
                                                 {"shared_optin", &d.shared_optin},
                                                 {"shared_per_multiprocessor", &d.shared_per_multiprocessor},
                                                 {"l2_bytes", &d.l2_bytes}};
  for (const auto& [key, value] : changes) {
    const auto name = key.cast<std::string>();
    bool known = false;
    for (const auto& [field, target] : fields) {
      if (name != field) continue;
      *target = value.cast<int>();
      known = true;
    }
    if (!known) throw py::type_error("set_device: unknown property '" + name + "'");
  }
  simt::configure(settings);
}

template <class F>
void change(const F& f) {
  simt::Settings settings = simt::settings();
  f(settings);
  simt::configure(settings);
}

void bind_settings(py::module_& m) {
  m.def(
      "set_schedule", [](std::uint64_t n) { change([n](auto& s) { s.schedule = n; }); }, py::arg("n"),
      "0: threads and blocks in order. n > 0: another order, which n chooses and which repeats exactly.");
  m.def("schedule", [] { return simt::settings().schedule; });
  m.def(
      "set_races", [](bool on) { change([on](auto& s) { s.races = on; }); }, py::arg("on"),
      "Whether a race in shared memory is an error.");
  m.def("set_device", set_device, "The properties that cudaDeviceGetAttribute reports; without arguments an H100's.");
  m.def("counters", [] {
    const simt::Counters c = simt::counters();
    py::dict d;
    d["launches"] = c.launches;
    d["blocks"] = c.blocks;
    d["barriers"] = c.barriers;
    d["warp_operations"] = c.warp_operations;
    d["switches"] = c.switches;
    return d;
  });
  m.def("reset_counters", simt::reset_counters);
}

template <class T>
Array<T> shuffles(const Array<T>& x, int argument, int width) {
  const auto n = x.size();
  Array<T> out({py::ssize_t{4}, n});
  selftest::run_shuffles(x.data(), out.mutable_data(), static_cast<int>(n), argument, width);
  return out;
}

// The kernels that reduce or move data.
void bind_data_kernels(py::module_& m) {
  m.def("block_sum", [](const Array<float>& x, int threads, bool with_barrier) {
    Array<float> out(x.shape(0));
    selftest::run_block_sum(with_barrier, x.data(), out.mutable_data(), static_cast<int>(x.shape(0)),
                            static_cast<int>(x.shape(1)), threads);
    return out;
  });
  m.def("warp_rotate", [](const Array<int>& x, bool with_sync) {
    Array<int> out(x.size());
    selftest::run_warp_rotate(with_sync, x.data(), out.mutable_data());
    return out;
  });
  m.def("scan", [](const Array<int>& x, bool with_barrier) {
    Array<int> out(x.size());
    selftest::run_scan(with_barrier, x.data(), out.mutable_data(), static_cast<int>(x.size()));
    return out;
  });
  m.def("shuffles", shuffles<float>);
  m.def("shuffles", shuffles<double>);
  m.def("shuffles", shuffles<long long>);
  m.def("votes", [](const Array<int>& x) {
    Array<int> out({py::ssize_t{12}, x.size()});
    selftest::run_votes(x.data(), out.mutable_data(), static_cast<int>(x.size()));
    return out;
  });
  m.def("atomics", [](const Array<int>& x) {
    Array<int> out(8);
    selftest::run_atomics(x.data(), out.mutable_data(), static_cast<int>(x.size()));
    return out;
  });
  m.def("histogram", [](const Array<int>& x, bool atomic) {
    Array<int> out(4);
    selftest::run_histogram(atomic, x.data(), out.mutable_data(), static_cast<int>(x.size()));
    return out;
  });
  m.def("functions", [](float x, unsigned bits) {
    Array<float> out(16);
    selftest::run_functions(x, bits, out.mutable_data());
    return out;
  });
}

// The kernels that show or break a rule.
void bind_rule_kernels(py::module_& m) {
  m.def("faulty", [](const std::string& fault, int threads) {
    const auto found = std::find(std::begin(selftest::fault_names), std::end(selftest::fault_names), fault);
    if (found == std::end(selftest::fault_names)) throw py::value_error("unknown fault " + fault);
    Array<float> out(threads);
    for (int t = 0; t < threads; ++t) out.mutable_at(t) = static_cast<float>(t);
    selftest::run_faulty(static_cast<selftest::Fault>(found - selftest::fault_names), out.mutable_data(), threads);
    return out;
  });
  m.def("destroyed_objects", selftest::destroyed_objects);
  m.def("arrays", [] {
    Array<int> out(128);
    selftest::run_arrays(out.mutable_data());
    return out;
  });
  m.def("uninitialised", [](int blocks) {
    Array<float> out({py::ssize_t{blocks}, py::ssize_t{2}});
    selftest::run_uninitialised(out.mutable_data(), blocks);
    return out;
  });
  m.def("vector_copy", [](int offset, bool asserted) {  // from `offset` floats past a 16-byte boundary
    alignas(16) float from[20];
    for (int i = 0; i < 20; ++i) from[i] = static_cast<float>(i);
    alignas(16) float to[16];
    selftest::run_vector_copy(asserted, from + offset, to, 4);
    return Array<float>(16, to);
  });
  m.def("indices", [](const std::vector<unsigned>& g, const std::vector<unsigned>& b) {
    Array<int> out({py::ssize_t{g[0] * g[1] * g[2]}, py::ssize_t{b[0] * b[1] * b[2]}, py::ssize_t{6}});
    selftest::run_indices(out.mutable_data(), {g[0], g[1], g[2]}, {b[0], b[1], b[2]});
    return out;
  });
  m.def("empty", selftest::run_empty, py::arg("blocks"), py::arg("threads"), py::arg("dynamic_bytes") = 0,
        py::arg("opt_in") = false);
  m.def("large_static", [] {
    float out;
    selftest::run_large_static(&out);
  });
  m.def("barriers", selftest::run_barriers);
  m.def("exchanges", [](int threads, int steps) {
    Array<int> out(threads);
    selftest::run_exchanges(threads, steps, out.mutable_data());
    return out;
  });
}

}  // namespace

PYBIND11_MODULE(fastkd_simt, m) {
  py::register_exception<simt::Error>(m, "Error", PyExc_RuntimeError);
  bind_settings(m);
  bind_data_kernels(m);
  bind_rule_kernels(m);
}
