// Vectors of floats: 16 with AVX-512, 8 with AVX2, 4 anywhere. Everything else is written on these.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(PAGED_KV_AVX512) || defined(PAGED_KV_AVX2)
#include <immintrin.h>
#endif

namespace {

#if defined(PAGED_KV_AVX512)
constexpr int W = 16;
#elif defined(PAGED_KV_AVX2)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));

#define INLINE static inline __attribute__((always_inline))

template <class V>
INLINE V load(const void* from) {
  V v;
  memcpy(&v, from, sizeof v);
  return v;
}

template <class V>
INLINE void store(void* to, V v) {
  memcpy(to, &v, sizeof v);
}

#if defined(PAGED_KV_AVX512)

INLINE vf splat(float x) { return (vf)_mm512_set1_ps(x); }
INLINE vi splat(int32_t x) { return (vi)_mm512_set1_epi32(x); }
INLINE vf fma(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
INLINE vf round_even(vf x) { return (vf)_mm512_roundscale_ps((__m512)x, 8); }
// Each of W bytes, or of W 16-bit numbers, in a lane of its own.
INLINE vi signed_bytes(const uint8_t* p) {
  return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p));
}
INLINE vi unsigned_bytes(const uint8_t* p) {
  return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
}
INLINE vi halves(const uint8_t* p) {
  return (vi)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
}
// float16 numbers, whose bits are the low halves of the lanes.
INLINE vf half_to_float(vi bits) {
  return (vf)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)bits));
}
// max|a|, without a second look at NaN: callers test for it.
INLINE vf max(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE vf min(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }

#elif defined(PAGED_KV_AVX2)

INLINE vf splat(float x) { return (vf)_mm256_set1_ps(x); }
INLINE vi splat(int32_t x) { return (vi)_mm256_set1_epi32(x); }
INLINE vf fma(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
INLINE vf round_even(vf x) { return (vf)_mm256_round_ps((__m256)x, 8); }
INLINE vi signed_bytes(const uint8_t* p) {
  return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
}
INLINE vi unsigned_bytes(const uint8_t* p) {
  return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
}
INLINE vi halves(const uint8_t* p) {
  return (vi)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
}
INLINE vf half_to_float(vi bits) {
  __m256i low = _mm256_and_si256((__m256i)bits, _mm256_set1_epi32(0xffff));
  __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0x08);
  return (vf)_mm256_cvtph_ps(_mm256_castsi256_si128(packed));
}
INLINE vf max(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE vf min(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }

#else

INLINE vf splat(float x) { return vf{x, x, x, x}; }
INLINE vi splat(int32_t x) { return vi{x, x, x, x}; }
INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }
INLINE vf round_even(vf x) {
  const vf magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds; larger numbers are whole
  vf rounded = (x + magic) - magic;
  return (vi)((x < 4194304.f) & (x > -4194304.f)) ? rounded : x;
}
INLINE vi signed_bytes(const uint8_t* p) {
  const int8_t* s = (const int8_t*)p;
  return vi{s[0], s[1], s[2], s[3]};
}
INLINE vi unsigned_bytes(const uint8_t* p) { return vi{p[0], p[1], p[2], p[3]}; }
INLINE vi halves(const uint8_t* p) {
  uint16_t h[4];
  memcpy(h, p, sizeof h);
  return vi{h[0], h[1], h[2], h[3]};
}
INLINE vf half_to_float(vi bits) {
  vi magnitude = (bits & 0x7fff) << 13;
  vi normal = magnitude + (112 << 23);
  // A denormal number is what adding it to the smallest normal one adds.
  vf least = (vf)splat(113 << 23);
  vi tiny = (vi)((vf)(magnitude + (113 << 23)) - least);
  vi large = normal + (112 << 23);  // infinity and NaN
  vi found = magnitude < (1 << 23) ? tiny : normal;
  found = magnitude >= (31 << 23) ? large : found;
  return (vf)(found | ((bits & 0x8000) << 16));
}
INLINE vf max(vf a, vf b) { return a > b ? a : b; }
INLINE vf min(vf a, vf b) { return a < b ? a : b; }

#endif

INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }
INLINE vi to_int(vf x) { return __builtin_convertvector(x, vi); }
INLINE vf absolute(vf x) { return (vf)((vi)x & 0x7fffffff); }
INLINE bool any(vi mask) {
  int32_t found = 0, lanes[W];
  store(lanes, mask);
  for (int i = 0; i < W; ++i) found |= lanes[i];
  return found != 0;
}

#if defined(PAGED_KV_AVX512)
INLINE float sum_of(vf x) { return _mm512_reduce_add_ps((__m512)x); }
INLINE float max_of(vf x) { return _mm512_reduce_max_ps((__m512)x); }
#else
INLINE float sum_of(vf x) {
  float lanes[W];
  store(lanes, x);
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}
INLINE float max_of(vf x) {
  float lanes[W];
  store(lanes, x);
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; ++i)
      if (!(lanes[i] > lanes[i + half])) lanes[i] = lanes[i + half];
  return lanes[0];
}
#endif
INLINE float min_of(vf x) { return -max_of(-x); }

// f(integral constant) for 0 .. N - 1.
template <int I>
struct Index {
  static constexpr int value = I;
};

template <int N, int I = 0, class Call>
INLINE void each(Call& call) {
  if constexpr (I < N) {
    call(Index<I>());
    each<N, I + 1>(call);
  }
}

INLINE vi lane_index() {
  vi index;
  for (int i = 0; i < W; ++i) index[i] = i;
  return index;
}

// e^x for x <= 88, as exact as x is; 0 far below; NaN stays NaN.
INLINE vf exponential(vf x) {
  x = max(splat(-200.f), x);  // in this order a NaN stays
  vf t = x * 1.44269504f, n = round_even(t), r = t - n;  // e^x = 2^n 2^r, |r| <= 0.5
  vf p = splat(0.00015353357f);
  p = fma(p, r, splat(0.00133988761f));
  p = fma(p, r, splat(0.00961843739f));
  p = fma(p, r, splat(0.0555033247f));
  p = fma(p, r, splat(0.240226479f));
  p = fma(p, r, splat(0.693147203f));
  p = fma(p, r, splat(1.f));
#if defined(PAGED_KV_AVX512)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  vf power = (vf)((to_int(n) + 127) << 23);
  return x < -87.f ? splat(0.f) : p * power;
#endif
}

INLINE vf tanh_of(vf x) {
  vf bounded = x > 12.f ? splat(12.f) : x;
  bounded = x < -12.f ? splat(-12.f) : bounded;
  vf power = exponential(bounded * 2.f);
  return (power - 1.f) / (power + 1.f);
}

INLINE vf bf16_to_float(vi low_halves) { return (vf)(low_halves << 16); }

// The nearest bfloat16, as float; ties to even.
INLINE float bf16_round(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (x != x) return __builtin_nanf("");
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
  memcpy(&x, &bits, 4);
  return x;
}

INLINE uint16_t bf16_bits(float x) {
  float rounded = bf16_round(x);
  uint32_t bits;
  memcpy(&bits, &rounded, 4);
  return (uint16_t)(bits >> 16);
}

INLINE float bf16_at(const uint8_t* p) {
  uint16_t half;
  memcpy(&half, p, 2);
  uint32_t bits = (uint32_t)half << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// The nearest float16's bits, lane by lane; ties to even, too large ones become infinite.
INLINE vi float_to_half(vf x) {
  vi bits = (vi)x, sign = (bits >> 16) & 0x8000;
  vi magnitude = bits & 0x7fffffff;
  vi normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  normal = normal > 0x7c00 ? splat(0x7c00) : normal;
  // Below 2^-14 the steps are 2^-24: adding 0.5, whose last place is that, rounds to them.
  vi tiny = (vi)((vf)magnitude + 0.5f) - (126 << 23);
  vi half = magnitude < (113 << 23) ? tiny : normal;
  half = magnitude > (255 << 23) ? splat(0x7e00) : half;
  return half | sign;
}

}  // namespace
