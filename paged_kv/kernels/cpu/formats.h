// How stored bits become floats: one struct per page format, numbered as paged_kv.quant does.
#pragma once

#include "simd.h"

namespace {

// per_word: numbers in a 32-bit word. unpack<i>: number i of each lane's word. value: the W numbers
// from number c on of a run of bytes. Scaled formats give codes: number = code * scale, and for
// affine ones + minimum.

struct Float32 {
  static constexpr int per_word = 1;
  static constexpr bool scaled = false, affine = false;
  template <int I>
  INLINE vf unpack(vi word) {
    return (vf)word;
  }
  INLINE vf value(const uint8_t* p, int64_t c) { return load<vf>(p + 4 * c); }
};

struct BFloat16 {
  static constexpr int per_word = 2;
  static constexpr bool scaled = false, affine = false;
  template <int I>
  INLINE vf unpack(vi word) {
    return (vf)(I ? word & (int32_t)0xffff0000 : word << 16);
  }
  INLINE vf value(const uint8_t* p, int64_t c) { return bf16_to_float(halves(p + 2 * c)); }
};

struct Float16 {
  static constexpr int per_word = 2;
  static constexpr bool scaled = false, affine = false;
  template <int I>
  INLINE vf unpack(vi word) {
    return half_to_float((vi)((vu)word >> (16 * I)));
  }
  INLINE vf value(const uint8_t* p, int64_t c) { return half_to_float(halves(p + 2 * c)); }
};

struct Int8 {
  static constexpr int per_word = 4;
  static constexpr bool scaled = true, affine = false;
  template <int I>
  INLINE vf unpack(vi word) {
    return to_float((word << (24 - 8 * I)) >> 24);
  }
  INLINE vf value(const uint8_t* p, int64_t c) { return to_float(signed_bytes(p + c)); }
};

struct Int4 {
  static constexpr int per_word = 8;
  static constexpr bool scaled = true, affine = true;

  // The low four bits of each lane, as float.
  INLINE vf low(vi x) {
#if defined(PAGED_KV_AVX512)
    const vf codes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return (vf)_mm512_permutexvar_ps((__m512i)x, (__m512)codes);  // looks at four bits only
#else
    return to_float(x & 15);
#endif
  }
  template <int I>
  INLINE vf unpack(vi word) {
    return low((vi)((vu)word >> (4 * I)));
  }
  INLINE vf value(const uint8_t* p, int64_t c) {
    p += c / 2;
#if defined(PAGED_KV_AVX512)
    int64_t bytes;
    memcpy(&bytes, p, 8);
    vi both = (vi)_mm512_set1_epi64(bytes);
    const vi shifts = {0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28};
    return low((vi)((vu)both >> (vu)shifts));
#elif defined(PAGED_KV_AVX2)
    int32_t bytes;
    memcpy(&bytes, p, 4);
    const vi shifts = {0, 4, 8, 12, 16, 20, 24, 28};
    return low((vi)((vu)splat(bytes) >> (vu)shifts));
#else
    return vf{(float)(p[0] & 15), (float)(p[0] >> 4), (float)(p[1] & 15), (float)(p[1] >> 4)};
#endif
  }
};

struct Fp8 {
  static constexpr int per_word = 4;
  static constexpr bool scaled = true, affine = false;

  // e4m3 in the low byte of each lane.
  INLINE vf low(vi x) {
    vi magnitude = (x & 0x7f) << 20;
    vf normal = (vf)(magnitude + (120 << 23));
    vf tiny = normal * 2.f - 0.015625f;  // no exponent: no leading one either
    vi found = (vi)(magnitude < (1 << 23) ? tiny : normal);
    return (vf)(found | ((x & 0x80) << 24));
  }
  template <int I>
  INLINE vf unpack(vi word) {
    return low((vi)((vu)word >> (8 * I)));
  }
  INLINE vf value(const uint8_t* p, int64_t c) { return low(unsigned_bytes(p + c)); }
};

enum Code { kFloat32, kBFloat16, kFloat16, kInt8, kInt4, kFp8, kNumCodes };

// The W numbers of value() in their order, which Int4 with AVX-512 has by even and odd.
template <class F>
INLINE vf in_order(vf x) {
#if defined(PAGED_KV_AVX512)
  if (F::affine) {
    const vi order = {0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15};
    return (vf)_mm512_permutexvar_ps((__m512i)order, (__m512)x);
  }
#endif
  return x;
}

// Calls f with an object of the format's type.
template <class Call>
INLINE void with_format(int64_t code, Call&& call) {
  switch (code) {
    case kFloat32: return call(Float32());
    case kBFloat16: return call(BFloat16());
    case kFloat16: return call(Float16());
    case kInt8: return call(Int8());
    case kInt4: return call(Int4());
    default: return call(Fp8());
  }
}

// Sums and differences of lanes that are `step` apart: a + b where bit `step` of the index is 0, in
// the other lane a - b.
INLINE vf butterfly(vf x, int step) {
  vi index = lane_index();
  vf other;
#if defined(PAGED_KV_AVX512)
  other = (vf)_mm512_permutexvar_ps((__m512i)(index ^ step), (__m512)x);
#elif defined(PAGED_KV_AVX2)
  other = (vf)_mm256_permutevar8x32_ps((__m256)x, (__m256i)(index ^ step));
#else
  other = vf{x[0 ^ step], x[1 ^ step], x[2 ^ step], x[3 ^ step]};
#endif
  return (index & step) == 0 ? x + other : other - x;
}

// Blocks of `size` (a power of two from 16 on; 1 for none) times the orthonormal Hadamard matrix,
// in place, with the additions of paged_kv.kernels.page_layout.rotate: the results are equal.
INLINE void rotate(float* x, int64_t count, int64_t size) {
  if (size == 1) return;
  for (int64_t i = 0; i < count; i += W) {
    vf own = load<vf>(x + i);
    for (int step = 1; step < W; step *= 2) own = butterfly(own, step);
    store(x + i, own);
  }
  for (int64_t step = W; step < size; step *= 2)
    for (int64_t start = 0; start < count; start += 2 * step)
      for (int64_t i = start; i < start + step; i += W) {
        vf a = load<vf>(x + i), b = load<vf>(x + i + step);
        store(x + i, a + b);
        store(x + i + step, a - b);
      }
  vf factor = splat((float)(1.0 / __builtin_sqrt((double)size)));
  for (int64_t i = 0; i < count; i += W) store(x + i, load<vf>(x + i) * factor);
}

// Multiples of W numbers between float and a model's dtype.
INLINE void to_floats(float* to, const void* from, int64_t dtype, int64_t count) {
  const uint8_t* p = (const uint8_t*)from;
  for (int64_t c = 0; c < count; c += W) {
    if (dtype == kFloat32) store(to + c, Float32::value(p, c));
    if (dtype == kBFloat16) store(to + c, BFloat16::value(p, c));
    if (dtype == kFloat16) store(to + c, Float16::value(p, c));
  }
}

INLINE void from_floats(void* to, const float* from, int64_t dtype, int64_t count) {
  uint8_t* p = (uint8_t*)to;
  if (dtype == kFloat32) {
    memcpy(p, from, 4 * count);
    return;
  }
  for (int64_t c = 0; c < count; c += W) {
    uint16_t bits[W];
    vi half = float_to_half(load<vf>(from + c));
    for (int i = 0; i < W; ++i)
      bits[i] = dtype == kBFloat16 ? bf16_bits(from[c + i]) : (uint16_t)half[i];
    memcpy(p + 2 * c, bits, sizeof bits);
  }
}

}  // namespace
