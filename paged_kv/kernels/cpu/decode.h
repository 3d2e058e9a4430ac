// Attention of one new token: its entries are cut into spans, each gives a partial softmax.
#pragma once

#include "page.h"

namespace {

constexpr int64_t kSpan = 512;  // entries of a span at most; a multiple of 128 and 16
constexpr int64_t kGroup = 8;   // query heads at once
constexpr int64_t kFactors = 16;  // heads by groups of channels at once
constexpr int64_t kAhead = 8192;  // bytes that are fetched ahead: pages lie anywhere

struct Span {
  int32_t row, head, segment, first_page, pages, count;
  int64_t base;     // index of its first entry among the row's
};

// What a pass over a span reads and writes; G query heads.
struct Pass {
  const Layout* layout;
  const uint8_t* blocks[kSpan / 16];
  const uint8_t* ahead[kSpan / 8];  // what to fetch during each page's keys, then its values
  const uint8_t* ahead_scales[kSpan / 8];
  int64_t pages, count;
  const float *query, *query_sums;  // [size][G], [key groups][G]
  float* logits;                    // [G][kSpan], then the softmax's numerators
  float* factors;                   // [kFactors][kSpan], scratch
  float* output;                    // [G][value size]
};

INLINE vf bf16_lanes(const uint8_t* p) { return bf16_to_float(halves(p)); }
INLINE void fetch(const void* p) { __builtin_prefetch(p, 0, 3); }
INLINE void fetch_scales(const Layout& l, const uint8_t* scales) {
  for (int64_t b = 0; b < l.block_bytes - l.key_scale_offset; b += 64) fetch(scales + b);
}

// Logits of N * W slots of a page.
template <class F, int G, int N>
INLINE void key_columns(const Pass& p, int64_t page, int64_t slot) {
  const Layout& l = *p.layout;
  // With few sums, each in two parts, so that additions need not wait for another.
  constexpr int kChains = G * N < 8 && F::per_word > 1 ? 2 : 1;
  int64_t groups = F::affine ? l.key.num_scales / 2 : 1, words = l.key.data_bytes / 4 / groups;
  const uint8_t *word = p.blocks[page] + 4 * slot, *next = p.ahead[page] + 4 * slot;
  const uint8_t* scales = p.blocks[page] + l.key_scale_offset + 2 * slot;
  const float* q = p.query;
  vf total[G][N] = {};
  for (int64_t group = 0; group < groups; ++group) {
    vf sum[kChains][G][N] = {};
    for (int64_t w = 0; w < words; ++w, word += 4 * l.page_size, next += 4 * l.page_size) {
      for (int64_t b = 0; b < 4 * N * W; b += 64) fetch(next + b);
      vi bits[N];
      for (int n = 0; n < N; ++n) bits[n] = load<vi>(word + 4 * n * W);
      auto element = [&](auto index) {
        constexpr int I = decltype(index)::value;
        for (int n = 0; n < N; ++n) {
          vf x = F::template unpack<I>(bits[n]);
          for (int g = 0; g < G; ++g)
            sum[I % kChains][g][n] = fma(splat(q[I * G + g]), x, sum[I % kChains][g][n]);
        }
      };
      each<F::per_word>(element);
      q += F::per_word * G;
    }
    for (int n = 0; n < N; ++n) {
      vf scale = F::scaled ? bf16_lanes(scales + 2 * (group * l.page_size + n * W)) : splat(1.f);
      for (int g = 0; g < G; ++g) {
        vf own = sum[0][g][n];
        if (kChains == 2) own = own + sum[kChains - 1][g][n];
        total[g][n] = fma(own, scale, total[g][n]);
        if (!F::affine) continue;
        vf least = bf16_lanes(scales + 2 * ((groups + group) * l.page_size + n * W));
        total[g][n] = fma(splat(p.query_sums[group * G + g]), least, total[g][n]);
      }
    }
  }
  for (int g = 0; g < G; ++g)
    for (int n = 0; n < N; ++n)
      store(p.logits + g * kSpan + page * l.page_size + slot + n * W, total[g][n]);
}

template <class F, int G>
static void key_pass(const Pass& p) {
  constexpr int N = W == 16 || G < 6 ? 2 : 1;
  int64_t page_size = p.layout->page_size;
  for (int64_t page = 0; page < p.pages; ++page) {
    fetch_scales(*p.layout, p.ahead_scales[page]);
    int64_t used = smaller(page_size, pieces(p.count - page * page_size, W) * W), slot = 0;
    for (; slot + N * W <= page_size && slot < used; slot += N * W)
      key_columns<F, G, N>(p, page, slot);
    for (; slot < used; slot += W) key_columns<F, G, 1>(p, page, slot);
  }
}

// Numerators times a group's scales, into factors; minimums get their sums with the minimums.
template <class F, int G>
INLINE void scale_factors(const Pass& p, int64_t group, int64_t groups, float* factors,
                          float* minimums) {
  const Layout& l = *p.layout;
  vf total[G] = {};
  for (int64_t page = 0, at = 0; page < p.pages; ++page) {
    const uint8_t* scales = p.blocks[page] + l.value_scale_offset + 2 * group * l.page_size;
    for (int64_t slot = 0; slot < l.page_size && at < p.count; slot += W, at += W) {
      vf scale = bf16_lanes(scales + 2 * slot), least = {};
      if (F::affine) least = bf16_lanes(scales + 2 * (groups * l.page_size + slot));
      if (F::affine && p.count - at < W)  // behind the last entry is whatever the page holds
        least = lane_index() < splat((int32_t)(p.count - at)) ? least : splat(0.f);
      for (int g = 0; g < G; ++g) {
        vf own = load<vf>(p.logits + g * kSpan + at);
        store(factors + g * kSpan + at, own * scale);
        if (F::affine) total[g] = fma(own, least, total[g]);
      }
    }
  }
  for (int g = 0; g < G; ++g) minimums[g] = F::affine ? sum_of(total[g]) : 0.f;
}

// U * W channels from number c on; every S * W of them have factors of their own.
template <class F, int G, int U, int S>
INLINE void value_columns(const Pass& p, int64_t c) {
  const Layout& l = *p.layout;
  const float* factors = F::scaled ? p.factors : p.logits;
  float minimums[U / S][G] = {};
  int64_t groups = F::affine ? l.value.num_scales / 2 : 1, size = l.value.size / groups;
  for (int s = 0; s < U / S && F::scaled; ++s)
    scale_factors<F, G>(p, (c + s * S * W) / size, groups, p.factors + s * G * kSpan, minimums[s]);
  vf sum[G][U] = {};
  for (int64_t page = 0, at = 0; page < p.pages; ++page) {
    const uint8_t* value = p.blocks[page] + l.value_offset;
    const uint8_t* next = p.ahead[p.pages + page];
    int64_t slots = smaller(l.page_size, p.count - page * l.page_size);
    if (c == 0) fetch_scales(l, p.ahead_scales[p.pages + page]);
    for (int64_t slot = 0; slot < slots; ++slot, ++at) {
      for (int64_t b = 0; b < l.value.data_bytes && c == 0; b += 64) fetch(next + b);
      vf x[U];
      for (int u = 0; u < U; ++u) x[u] = F::value(value, c + u * W);
      for (int g = 0; g < G; ++g)
        for (int s = 0; s < U / S; ++s) {
          vf factor = splat(factors[(s * G + g) * kSpan + at]);
          for (int u = s * S; u < s * S + S; ++u) sum[g][u] = fma(factor, x[u], sum[g][u]);
        }
      value += l.value.data_bytes;
      next += l.value.data_bytes;
    }
  }
  for (int g = 0; g < G; ++g)
    for (int u = 0; u < U; ++u)
      store(p.output + g * l.value.size + c + u * W, in_order<F>(sum[g][u]) + minimums[u / S][g]);
}

template <class F, int G>
static void value_pass(const Pass& p) {
  constexpr int kMost = (W == 16 ? 16 : 12) / G;  // vectors of sums
  constexpr int U = kMost >= 8 ? 8 : kMost >= 4 ? 4 : kMost >= 2 ? 2 : 1;
  constexpr int kShared = F::affine && U > 2 ? 2 : U;
  int64_t size = p.layout->value.size, c = 0;
  bool shared = !F::affine || size / (p.layout->value.num_scales / 2) % (kShared * W) == 0;
  for (; shared && c + U * W <= size; c += U * W) value_columns<F, G, U, kShared>(p, c);
  if constexpr (F::affine)
    for (; c + U * W <= size; c += U * W) value_columns<F, G, U, 1>(p, c);
  for (; c < size; c += W) value_columns<F, G, 1, 1>(p, c);
}

using PassFunction = void (*)(const Pass&);

struct Passes {
  PassFunction key, value;
};

template <class F>
INLINE Passes passes_of(int64_t group) {
  static constexpr Passes table[kGroup] = {
      {key_pass<F, 1>, value_pass<F, 1>}, {key_pass<F, 2>, value_pass<F, 2>},
      {key_pass<F, 3>, value_pass<F, 3>}, {key_pass<F, 4>, value_pass<F, 4>},
      {key_pass<F, 5>, value_pass<F, 5>}, {key_pass<F, 6>, value_pass<F, 6>},
      {key_pass<F, 7>, value_pass<F, 7>}, {key_pass<F, 8>, value_pass<F, 8>}};
  return table[group - 1];
}

// Turns logits into numerators of a softmax: e^(logit - top), top the largest of them and what it
// was before; gives their sum. weights: [count, to W], finite, or null. What lies behind the last
// entry, to W, becomes 0.
INLINE float soften(float* logits, int64_t count, float softcap, const float* weights, float* top) {
  const vf nothing = splat(-(float)INFINITY);
  if (softcap > 0)
    for (int64_t i = 0; i < count; i += W)
      store(logits + i, tanh_of(load<vf>(logits + i) / splat(softcap)) * softcap);
  int64_t whole = count / W * W;
  vi left = lane_index() < splat((int32_t)(count - whole));
  if (whole < count) {  // there is whatever the page holds
    store(logits + whole, left ? load<vf>(logits + whole) : nothing);
  }
  vf most = splat(*top);
  for (int64_t i = 0; i < count; i += W) most = max(load<vf>(logits + i), most);
  *top = max_of(most);
  vf shift = splat(*top == -(float)INFINITY ? 0.f : *top), total = {};
  for (int64_t i = 0; i < count; i += W) {
    vf x = exponential(load<vf>(logits + i) - shift);
    if (weights) x = x * load<vf>(weights + i);
    store(logits + i, x);
    total += x;
  }
  return sum_of(total);
}

}  // namespace
