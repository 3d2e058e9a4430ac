// Numbers to bytes and back; the same bytes as paged_kv.quant's codecs make.
#pragma once

#include "page.h"

namespace {

// The nearest number that the format's code can be; NaN and infinity become NaN.
INLINE float scale_for(float largest, float limit, bool finite) {
  float scale = bf16_round(largest / limit);
  return finite && scale - scale == 0 ? scale : __builtin_nanf("");
}

INLINE bool all_finite(const float* x, int64_t size) {
  vi odd = {};
  for (int64_t c = 0; c < size; c += W) odd |= absolute(load<vf>(x + c)) >= splat((float)INFINITY);
  for (int64_t c = 0; c < size; c += W) odd |= load<vf>(x + c) != load<vf>(x + c);
  return !any(odd);
}

INLINE float symmetric_scale(const float* x, int64_t size, float limit) {
  vf largest = {};
  for (int64_t c = 0; c < size; c += W) largest = max(largest, absolute(load<vf>(x + c)));
  return scale_for(max_of(largest), limit, all_finite(x, size));
}

INLINE void encode_int8(const float* x, int64_t size, uint8_t* bytes) {
  float scale = symmetric_scale(x, size, 127);
  for (int64_t c = 0; c < size; c += W) {
    vf code = round_even(load<vf>(x + c) / splat(scale > 0 ? scale : 1.f));
    vi whole = to_int(min(max(code, splat(-127.f)), splat(127.f)));
    for (int i = 0; i < W; ++i) bytes[c + i] = scale > 0 ? (uint8_t)whole[i] : 0;
  }
  uint16_t bits = bf16_bits(scale);
  memcpy(bytes + size, &bits, 2);
}

INLINE vi to_e4m3(vf x) {
  vi bits = (vi)x, magnitude = bits & 0x7fffffff;
  vi normal = ((magnitude + 0x7ffff + ((magnitude >> 20) & 1)) >> 20) - (120 << 3);
  vi tiny = to_int(round_even(absolute(x) * 512.f));
  return (magnitude < (121 << 23) ? tiny : normal) | ((bits >> 24) & 0x80);
}

INLINE void encode_fp8(const float* x, int64_t size, uint8_t* bytes) {
  float scale = symmetric_scale(x, size, 448);
  for (int64_t c = 0; c < size; c += W) {
    vf number = load<vf>(x + c) / splat(scale > 0 ? scale : 1.f);
    vi code = to_e4m3(min(max(number, splat(-448.f)), splat(448.f)));
    for (int i = 0; i < W; ++i) bytes[c + i] = scale > 0 ? (uint8_t)code[i] : 0;
  }
  uint16_t bits = bf16_bits(scale);
  memcpy(bytes + size, &bits, 2);
}

// x is rotated in place.
INLINE void encode_int4(float* x, const Part& part, uint8_t* bytes) {
  bool finite = all_finite(x, part.size);
  rotate(x, part.size, part.rotation);
  int64_t groups = part.num_scales / 2, size = part.size / groups;
  for (int64_t group = 0; group < groups; ++group) {
    const float* numbers = x + group * size;
    vf low = load<vf>(numbers), high = low;
    vi odd = {};
    for (int64_t c = 0; c < size; c += W) {
      vf number = load<vf>(numbers + c);
      low = min(low, number);
      high = max(high, number);
      odd |= number != number;
    }
    float least = any(odd) ? __builtin_nanf("") : bf16_round(min_of(low));
    float scale = scale_for(max_of(high) - least, 15, finite && least - least == 0);
    float factor = scale > 0 ? scale : 1.f;
    for (int64_t c = 0; c < size; c += W) {
      vf code = round_even((load<vf>(numbers + c) - least) / splat(factor));
      vi whole = to_int(min(max(code, splat(0.f)), splat(15.f)));
      if (!(scale > 0)) whole = splat(0);
      for (int i = 0; i < W; i += 2)
        bytes[(group * size + c + i) / 2] = (uint8_t)(whole[i] | whole[i + 1] << 4);
    }
    uint16_t bits[2] = {bf16_bits(scale), bf16_bits(least)};
    memcpy(bytes + part.data_bytes + 2 * group, &bits[0], 2);
    memcpy(bytes + part.data_bytes + 2 * (groups + group), &bits[1], 2);
  }
}

// part.num_bytes of part.size numbers, which may be changed.
INLINE void encode(const Part& part, float* x, uint8_t* bytes) {
  if (part.format == kInt8) rotate(x, part.size, part.rotation);
  if (part.format == kInt8) return encode_int8(x, part.size, bytes);
  if (part.format == kInt4) return encode_int4(x, part, bytes);
  if (part.format == kFp8) return encode_fp8(x, part.size, bytes);
  from_floats(bytes, x, part.format, part.size);
}

template <class F>
INLINE void decode_as(const Part& part, const uint8_t* bytes, float* x) {
  int64_t groups = F::affine ? part.num_scales / 2 : 1, size = part.size / groups;
  for (int64_t group = 0; group < groups; ++group) {
    const uint8_t* scales = bytes + part.data_bytes + 2 * group;
    vf scale = splat(F::scaled ? bf16_at(scales) : 1.f);
    vf least = splat(F::affine ? bf16_at(scales + 2 * groups) : 0.f);
    for (int64_t c = group * size; c < (group + 1) * size; c += W) {
      vf number = in_order<F>(F::value(bytes, c));
      if (F::scaled) number = number * scale;
      if (F::affine) number = number + least;
      store(x + c, number);
    }
  }
}

static void decode(const Part& part, const uint8_t* bytes, float* x) {
  with_format(part.format, [&](auto format) { decode_as<decltype(format)>(part, bytes, x); });
  rotate(x, part.size, part.rotation);
}

}  // namespace
