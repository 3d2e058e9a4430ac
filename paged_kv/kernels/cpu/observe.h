// attention_mass of dense keys: what each entry gets from some queries, in all or from one at most.
// Lanes are queries, so keys are read as they are and the softmax over entries needs no sum across
// lanes.
#pragma once

#include "attend.h"

namespace {

constexpr int64_t kColumns = 32;  // queries at once
constexpr int64_t kLines = 96;    // entries at once
constexpr int kVectors = kColumns / W;

struct Columns {  // of one head
  const Mass* mass;
  int64_t head, first, count;          // which queries
  float *queries, *numerators, *tops;  // [size][kColumns], [entries][kColumns], [pieces][kColumns]
  float *top, *sum, *sinks;            // [kColumns]
  int32_t* positions;                  // [kColumns]
};

INLINE void load_columns(const Columns& c) {
  const Mass& m = *c.mass;
  for (int64_t q = 0; q < kColumns; ++q) {
    int64_t at = c.head * m.queries_per_head + c.first + q;
    bool there = q < c.count;
    int64_t position = there ? m.query_positions[at] : -1;
    c.positions[q] = (int32_t)larger(smaller(position, INT32_MAX - 1), -1);
    c.top[q] = -(float)INFINITY;
    c.sum[q] = 0;
    int64_t member = (c.first + q) / (m.queries_per_head / m.group);
    c.sinks[q] = there && m.sinks ? m.sinks[c.head * m.group + member] : -(float)INFINITY;
    for (int64_t i = 0; i < m.size; ++i)
      c.queries[i * kColumns + q] = there ? m.queries[at * m.size + i] * (float)m.scale : 0.f;
  }
}

// Logits of some entries become numerators of a softmax with the maximum so far.
INLINE void soften_lines(const Columns& c, float* logits, const int64_t* positions, int64_t lines,
                         float softcap) {
  for (int v = 0; v < kVectors; ++v) {
    float* own = logits + v * W;
    vi asked = load<vi>(c.positions + v * W);
    vf top = load<vf>(c.top + v * W), before = top;
    for (int64_t e = 0; e < lines; ++e) {
      vf x = load<vf>(own + e * kColumns);
      if (softcap > 0) x = tanh_of(x / splat(softcap)) * softcap;
      vi held = splat((int32_t)smaller(positions[e], INT32_MAX));
      x = held <= asked ? x : splat(-(float)INFINITY);
      store(own + e * kColumns, x);
      top = max(x, top);
    }
    vf shift = top == splat(-(float)INFINITY) ? splat(0.f) : top;
    vf sum = load<vf>(c.sum + v * W) * exponential(before - shift);
    for (int64_t e = 0; e < lines; ++e) {
      vf x = exponential(load<vf>(own + e * kColumns) - shift);
      store(own + e * kColumns, x);
      sum += x;
    }
    store(c.top + v * W, top);
    store(c.sum + v * W, sum);
  }
}

// c.sum becomes 1 / sum, the sink included; 0 for a query that sees nothing.
INLINE void close_columns(const Columns& c) {
  for (int64_t q = 0; q < kColumns; ++q) {
    float before = c.top[q];
    const float* sinks = c.sinks[q] == -(float)INFINITY ? nullptr : c.sinks;
    c.sum[q] = close_softmax(sinks, q, c.top + q, c.sum + q);
    c.top[q] = before;  // close_softmax's factor is for numerators of this maximum
  }
}

template <bool kLargest>
static void observe_columns(const Columns& c, float* found) {
  const Mass& m = *c.mass;
  const float* keys = m.keys + c.head * m.entries * m.size;
  const int64_t* positions = m.key_positions + c.head * m.entries;
  load_columns(c);
  for (int64_t first = 0, piece = 0; first < m.entries; first += kLines, ++piece) {
    int64_t lines = smaller(kLines, m.entries - first);
    float* logits = c.numerators + first * kColumns;
    product(logits, kColumns, keys + first * m.size, m.size, c.queries, kColumns, lines, kColumns,
            m.size, false);
    soften_lines(c, logits, positions + first, lines, (float)m.softcap);
    memcpy(c.tops + piece * kColumns, c.top, 4 * kColumns);
  }
  close_columns(c);
  vf factors[kVectors];
  for (int64_t e = 0; e < m.entries; ++e) {
    for (int v = 0; v < kVectors && e % kLines == 0; ++v) {
      vf top = load<vf>(c.top + v * W), own = load<vf>(c.tops + e / kLines * kColumns + v * W);
      vf keep = exponential(own == splat(-(float)INFINITY) ? own : own - top);
      factors[v] = keep * load<vf>(c.sum + v * W);
    }
    vf total = {};
    for (int v = 0; v < kVectors; ++v) {
      vf numerator = load<vf>(c.numerators + e * kColumns + v * W);
      total = kLargest ? max(numerator * factors[v], total) : fma(numerator, factors[v], total);
    }
    if (!kLargest) found[e] += sum_of(total);
    else if (float most = max_of(total); !(most <= found[e])) found[e] = most;
  }
}

}  // namespace

extern "C" EXPORT int paged_kv_attention_mass(Mass* m) {
  bool failed = false;
#pragma omp parallel
  {
    int64_t tops = pieces(m->entries, kLines);
    Scratch memory(4 * kColumns * (m->size + m->entries + tops + 4));
#pragma omp critical
    failed |= !memory.data;
#pragma omp barrier
#pragma omp for schedule(dynamic)
    for (int64_t head = 0; head < (failed ? 0 : m->heads); ++head) {
      Columns c{};
      c.mass = m;
      c.head = head;
      c.queries = (float*)memory.data;
      c.numerators = c.queries + kColumns * m->size;
      c.tops = c.numerators + kColumns * m->entries;
      c.top = c.tops + kColumns * tops;
      c.sum = c.top + kColumns;
      c.sinks = c.sum + kColumns;
      c.positions = (int32_t*)(c.sinks + kColumns);
      float* found = m->mass + head * m->entries;
      memset(found, 0, 4 * m->entries);
      for (c.first = 0; c.first < m->queries_per_head; c.first += kColumns) {
        c.count = smaller(kColumns, m->queries_per_head - c.first);
        if (m->largest) observe_columns<true>(c, found);
        else observe_columns<false>(c, found);
      }
    }
  }
  return failed ? kNoMemory : kFine;
}
