// expected_attention: what entries can expect of a model's queries, from statistics of these.
#pragma once

#include "select.h"

namespace {

constexpr int64_t kMaxHead = 1024;  // numbers of a key

// A key before RoPE: turned back by its position.
INLINE void turn_back(const Expected& e, const float* key, const float* cos, const float* sin,
                      float* x) {
  int64_t half = e.half, far = e.neox ? half : 1, step = e.neox ? 1 : 2;
  for (int64_t i = 0; i < half; ++i) {
    float a = key[i * step], b = key[i * step + far];
    x[i * step] = a * cos[i] - b * sin[i];
    x[i * step + far] = b * cos[i] + a * sin[i];
  }
  for (int64_t i = 2 * half; i < e.size; ++i) x[i] = key[i];
}

// linear . x + quadratic . x^2, in W sums; size is a multiple of W.
INLINE float quadratic_form(const float* linear, const float* quadratic, const float* x,
                            int64_t size) {
  vf sum = {};
  for (int64_t i = 0; i < size; i += W) {
    vf v = load<vf>(x + i);
    sum = fma(fma(load<vf>(quadratic + i), v, load<vf>(linear + i)), v, sum);
  }
  return sum_of(sum);
}

INLINE float norm_of(const float* x, int64_t size) {
  vf sum = {};
  int64_t i = 0;
  for (; i + W <= size; i += W) sum = fma(load<vf>(x + i), load<vf>(x + i), sum);
  float total = sum_of(sum);
  for (; i < size; ++i) total += x[i] * x[i];
  return sqrtf(total);
}

static void expect_row(const Expected& e, int64_t row) {
  int64_t head = row % e.sizes[2], layer = row / (e.sizes[2] * e.sizes[1]);
  int64_t first = (layer * e.sizes[2] + head) * e.group;  // of the row's query heads
  const float *cos = row_of<float>(e.cos, e.sizes, row), *sin = row_of<float>(e.sin, e.sizes, row);
  alignas(64) float x[kMaxHead];
  for (int64_t entry = 0; entry < e.entries; ++entry) {
    int64_t at = row * e.entries + entry;
    turn_back(e, e.keys + at * e.size, cos + entry * e.half, sin + entry * e.half, x);
    float total = 0;
    for (int64_t member = first; member < first + e.group; ++member) {
      const float *linear = e.linear + member * e.size, *quadratic = e.quadratic + member * e.size;
      float found = quadratic_form(linear, quadratic, x, e.size) - e.normaliser[member];
      total += expf(found > 0 ? 0 : found);
    }
    e.found[at] = total / e.group * norm_of(e.values + at * e.value_size, e.value_size);
  }
}

}  // namespace

extern "C" EXPORT int paged_kv_expected_attention(Expected* e) {
  int64_t rows = e->sizes[0] * e->sizes[1] * e->sizes[2];
#pragma omp parallel for schedule(static) if (rows * e->entries >= 4096)
  for (int64_t row = 0; row < rows; ++row) expect_row(*e, row);
  return kFine;
}
