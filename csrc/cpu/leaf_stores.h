// From stored types to the compute type and back. A part of leaves.cpp, which is compiled once per instruction set.
#pragma once

#include "leaves.h"

namespace fastwrs::cpu {
inline namespace FASTWRS_ISA {

template <class P>
void widen_run(const P* __restrict x, compute_t<P>* __restrict out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = widen(x[i]);
}

template <class P>
void narrow_run(const compute_t<P>* __restrict x, P* __restrict out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = narrow(x[i], P());
}

template <class P>
void scale_run(const compute_t<P>* x, P* out, int64_t n, compute_t<P> factor) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) out[i] = narrow(x[i] * factor, P());
}

template <class P>
void scale_columns(const compute_t<P>* x, P* out, int64_t n, const compute_t<P>* factors, int64_t cols) {
  for (int64_t begin = 0; begin < n; begin += cols) {
    const int64_t m = n - begin < cols ? n - begin : cols;
#pragma GCC ivdep
    for (int64_t j = 0; j < m; ++j) out[begin + j] = narrow(x[begin + j] * factors[j], P());
  }
}

}  // namespace FASTWRS_ISA
}  // namespace fastwrs::cpu
