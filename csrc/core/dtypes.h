// Storage types, their conversion to the type that is computed in, and the dtype triples that a step may have.
// Conversions are integer and exact floating-point operations without branches: they vectorise, round to nearest even,
// and give the same bits on every machine, also where subnormals are flushed.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace fastwrs {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

enum class Dtype : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

// X(param, grad, state): all that is allowed. fastwrs/spec.py says the same for Python.
#define FASTWRS_DTYPE_TRIPLES(X)  \
  X(float, float, float)          \
  X(double, double, double)       \
  X(bfloat16, bfloat16, float)    \
  X(bfloat16, bfloat16, bfloat16) \
  X(float16, float16, float)      \
  X(float, bfloat16, float)

// X(type): every type that a parameter may have.
#define FASTWRS_PARAM_DTYPES(X) X(float) X(double) X(bfloat16) X(float16)

template <class T>
struct DtypeOf;
template <>
struct DtypeOf<float> {
  static constexpr Dtype value = Dtype::kFloat32;
};
template <>
struct DtypeOf<double> {
  static constexpr Dtype value = Dtype::kFloat64;
};
template <>
struct DtypeOf<bfloat16> {
  static constexpr Dtype value = Dtype::kBFloat16;
};
template <>
struct DtypeOf<float16> {
  static constexpr Dtype value = Dtype::kFloat16;
};

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2; }

// The type that a parameter of type T is computed in.
template <class T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};
template <class T>
using compute_t = typename Compute<T>::type;

}  // namespace fastwrs

FASTWRS_BEGIN

FASTWRS_HD uint32_t float_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}
FASTWRS_HD float bits_float(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

FASTWRS_HD float widen(float x) { return x; }
FASTWRS_HD double widen(double x) { return x; }
FASTWRS_HD float widen(bfloat16 x) { return bits_float(uint32_t(x.bits) << 16); }
FASTWRS_HD float widen(float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  const uint32_t normal = (magnitude << 13) + (112u << 23);
  const uint32_t special = (magnitude << 13) | 0x7f800000u;
  const uint32_t subnormal = float_bits(float(int32_t(magnitude)) * 0x1p-24f);
  const uint32_t bits = magnitude >= 0x7c00u ? special : magnitude < 0x0400u ? subnormal : normal;
  return bits_float(sign | bits);
}

// narrow(x, T()) rounds x to the storage type T.
FASTWRS_HD float narrow(float x, float) { return x; }
FASTWRS_HD double narrow(double x, double) { return x; }
FASTWRS_HD bfloat16 narrow(float x, bfloat16) {
  const uint32_t u = float_bits(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const uint32_t nan = (u >> 16) | 0x40u;
  return {uint16_t((u & 0x7fffffffu) > 0x7f800000u ? nan : rounded)};
}
FASTWRS_HD float16 narrow(float x, float16) {
  const uint32_t u = float_bits(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t a = u & 0x7fffffffu;
  const uint32_t normal = (a + 0xfffu + ((a >> 13) & 1u) - (112u << 23)) >> 13;
  // Adding 2^23 rounds to a whole number of half's smallest subnormals.
  const uint32_t subnormal = float_bits(bits_float(a) * 0x1p24f + 0x1p23f) - 0x4b000000u;
  const uint32_t special = a > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t bits = a >= 0x47800000u ? special : a < 0x38800000u ? subnormal : normal;
  return {uint16_t(sign | bits)};
}

FASTWRS_END
