// Attention of one new token: its entries are cut into spans, each gives a partial softmax.
#pragma once

#include "page.h"

namespace {

constexpr int64_t kSpan = 512;  // entries of a span at most; a multiple of 128 and 16
constexpr int64_t kGroup = 8;   // query heads at once
#ifndef AHEAD
#define AHEAD 4096
#endif
#ifndef LOC
#define LOC 3
#endif
constexpr int64_t kAhead = AHEAD;  // bytes that are fetched ahead

struct Span {
  int32_t row, head, segment, first_page, pages, count;
  int64_t base;     // index of its first entry among the row's
};

// What a pass over a span reads and writes; G query heads.
struct Pass {
  const Layout* layout;
  const uint8_t* blocks[kSpan / 16];
  const uint8_t* ahead[kSpan / 8];  // what to fetch during each page's keys, then its values
  int64_t pages, count;
  const float *query, *query_sums;  // [size][G], [key groups][G]
  float* logits;                    // [G][kSpan], then the softmax's numerators
  float* factors;                   // [G][kSpan], scratch
  float* output;                    // [G][value size]
};

INLINE vf bf16_lanes(const uint8_t* p) { return bf16_to_float(halves(p)); }
INLINE void fetch(const void* p) { __builtin_prefetch(p, 0, LOC); }

// Logits of N * W slots of a page.
template <class F, int G, int N>
INLINE void key_columns(const Pass& p, int64_t page, int64_t slot) {
  const Layout& l = *p.layout;
  constexpr int kChains = G * N < 8 && F::per_word > 1 ? 2 : 1;  // sums that do not wait for another
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
    int64_t used = smaller(page_size, pieces(p.count - page * page_size, W) * W), slot = 0;
    for (; slot + N * W <= page_size && slot < used; slot += N * W)
      key_columns<F, G, N>(p, page, slot);
    for (; slot < used; slot += W) key_columns<F, G, 1>(p, page, slot);
  }
}

// Numerators times the values' scales, into factors; returns the sum of numerators times minimums.
template <class F, int G>
INLINE void scale_factors(const Pass& p, int64_t group, int64_t groups, float* minimums) {
  const Layout& l = *p.layout;
  for (int g = 0; g < G; ++g) {
    vf total = {};
    for (int64_t page = 0, at = 0; page < p.pages; ++page) {
      const uint8_t* scales = p.blocks[page] + l.value_scale_offset + 2 * group * l.page_size;
      for (int64_t slot = 0; slot < l.page_size && at < p.count; slot += W, at += W) {
        vf own = load<vf>(p.logits + g * kSpan + at);
        store(p.factors + g * kSpan + at, own * bf16_lanes(scales + 2 * slot));
        if (!F::affine) continue;
        vf least = own * bf16_lanes(scales + 2 * (groups * l.page_size + slot));
        total += lane_index() < splat((int32_t)(p.count - at)) ? least : splat(0.f);
      }
    }
    minimums[g] = F::affine ? sum_of(total) : 0.f;
  }
}

// U * W channels from number c on.
template <class F, int G, int U>
INLINE void value_columns(const Pass& p, const float* factors, const float* minimums, int64_t c,
                          bool first) {
  const Layout& l = *p.layout;
  vf sum[G][U] = {};
  for (int64_t page = 0, at = 0; page < p.pages; ++page) {
    const uint8_t *value = p.blocks[page] + l.value_offset, *next = p.ahead[p.pages + page];
    int64_t slots = smaller(l.page_size, p.count - page * l.page_size);
    for (int64_t slot = 0; slot < slots; ++slot, ++at, value += l.value.data_bytes) {
      if (first)
        for (int64_t b = 0; b < l.value.data_bytes; b += 64) fetch(next + slot * l.value.data_bytes + b);
      vf x[U];
      for (int u = 0; u < U; ++u) x[u] = F::value(value, c + u * W);
      for (int g = 0; g < G; ++g) {
        vf factor = splat(factors[g * kSpan + at]);
        for (int u = 0; u < U; ++u) sum[g][u] = fma(factor, x[u], sum[g][u]);
      }
    }
  }
  for (int g = 0; g < G; ++g)
    for (int u = 0; u < U; ++u)
      store(p.output + g * l.value.size + c + u * W, in_order<F>(sum[g][u]) + minimums[g]);
}

template <class F, int G>
static void value_pass(const Pass& p) {
  constexpr int kRegisters = W == 16 ? 16 : 12;  // for sums
  constexpr int U = kRegisters / G >= 8 ? 8 : kRegisters / G >= 4 ? 4 : kRegisters / G >= 2 ? 2 : 1;
  const Part& part = p.layout->value;
  int64_t groups = F::affine ? part.num_scales / 2 : 1, size = part.size / groups;
  for (int64_t group = 0; group < groups; ++group) {
    float minimums[G] = {};
    if (F::scaled) scale_factors<F, G>(p, group, groups, minimums);
    const float* factors = F::scaled ? p.factors : p.logits;
    int64_t c = group * size, end = c + size;
    for (; c + U * W <= end; c += U * W)
      value_columns<F, G, U>(p, factors, minimums, c, c == 0);
    for (; c < end; c += W) value_columns<F, G, 1>(p, factors, minimums, c, c == 0);
  }
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

// Turns logits into numerators of a softmax: e^(logit - top), top the largest and what it was
// before; gives their sum. weights: [count, to W], finite, or null. Behind the last entry, to W, become 0.
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
