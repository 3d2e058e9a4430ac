// Attention of many new tokens: tiles of query vectors by chunks of entries, which become floats.
#pragma once

#include "decode.h"

namespace {

constexpr int64_t kTile = 192;   // query vectors of a tile at most, unless a token has more
constexpr int64_t kChunk = 256;  // entries of a chunk at most
constexpr int64_t kLine = kChunk + 16;  // so that lines do not share a cache's set
constexpr int64_t kDepth = 128;  // terms of a product at once: what a core's first cache holds

struct Call {
  Attend* a;
  int64_t group, key_size, value_size;
  float* queries[2];     // by segment: [kv_heads][tokens][group][key_size], scaled and rotated
  float* query_sums[2];  // by segment: [kv_heads][tokens][key groups][group]; one token only
  float *tops, *shares;  // [tokens][heads], of softmaxes: maximum and faded 1 / sum; for scores
  float* mass;           // what entries get, by row_mass
  int64_t* row_mass;     // [rows]: where a row's [kv_heads][mass_line(row)] begins

  int64_t tokens_of(int64_t row) const { return a->starts[row + 1] - a->starts[row]; }
  int64_t entries_of(int64_t row) const {
    int64_t entries = 0;
    for (int64_t s = 0; s < a->num_segments; ++s) entries += a->segments[s].counts[row];
    return entries;
  }
  // What is left of a score after some more tokens.
  float left_after(int64_t tokens) const { return (float)pow(a->decay, (double)tokens); }
  int64_t mass_line(int64_t row) const { return pieces(entries_of(row), 16) * 16 + 16; }
  float* mass_of(int64_t row, int64_t head) const {
    return mass + row_mass[row] + head * mass_line(row);
  }
  float* query(int64_t segment, int64_t head, int64_t token) const {
    return queries[segment] + (head * a->tokens + token) * group * key_size;
  }
};

// c[M][N] = (c +) a[M][k] * b[k][N], all in lines of a certain length.
template <int M, int N>
INLINE void product_block(float* c, int64_t c_line, const float* a, int64_t a_line, const float* b,
                          int64_t b_line, int64_t k, bool add) {
  vf sum[M][N] = {};
  for (int64_t i = 0; i < k; ++i) {
    vf x[N];
    for (int n = 0; n < N; ++n) x[n] = load<vf>(b + i * b_line + n * W);
    for (int m = 0; m < M; ++m) {
      vf factor = splat(a[m * a_line + i]);
      for (int n = 0; n < N; ++n) sum[m][n] = fma(factor, x[n], sum[m][n]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) {
      float* to = c + m * c_line + n * W;
      store(to, add ? load<vf>(to) + sum[m][n] : sum[m][n]);
    }
}

template <int N>
static void product_columns(float* c, int64_t c_line, const float* a, int64_t a_line,
                            const float* b, int64_t b_line, int64_t rows, int64_t k, bool add) {
  constexpr int M = W == 4 ? 3 : 6;
  int64_t m = 0;
  for (; m + M <= rows; m += M)
    product_block<M, N>(c + m * c_line, c_line, a + m * a_line, a_line, b, b_line, k, add);
  for (; m + 2 <= rows; m += 2)
    product_block<2, N>(c + m * c_line, c_line, a + m * a_line, a_line, b, b_line, k, add);
  for (; m < rows; ++m)
    product_block<1, N>(c + m * c_line, c_line, a + m * a_line, a_line, b, b_line, k, add);
}

// columns: a multiple of 16.
static void product_slice(float* c, int64_t c_line, const float* a, int64_t a_line, const float* b,
                    int64_t b_line, int64_t rows, int64_t columns, int64_t k, bool add) {
  constexpr int N = W == 8 ? 2 : 4;
  int64_t n = 0;
  for (; n + N * W <= columns; n += N * W)
    product_columns<N>(c + n, c_line, a, a_line, b + n, b_line, rows, k, add);
  if constexpr (W == 16)
    for (; n + 2 * W <= columns; n += 2 * W)
      product_columns<2>(c + n, c_line, a, a_line, b + n, b_line, rows, k, add);
  if constexpr (W == 16)
    for (; n < columns; n += W)
      product_columns<1>(c + n, c_line, a, a_line, b + n, b_line, rows, k, add);
}

static void product(float* c, int64_t c_line, const float* a, int64_t a_line, const float* b,
                    int64_t b_line, int64_t rows, int64_t columns, int64_t k, bool add) {
  for (int64_t i = 0; i < k; i += kDepth)
    product_slice(c, c_line, a + i, a_line, b + i * b_line, b_line, rows, columns,
                  smaller(kDepth, k - i), add || i);
}

// keys: [key size][kLine] of a page's first `slots` slots.
template <class F>
INLINE void expand_keys(const Layout& l, const uint8_t* block, int64_t slots, float* keys) {
  int64_t groups = F::affine ? l.key.num_scales / 2 : 1, words = l.key.data_bytes / 4 / groups;
  for (int64_t slot = 0; slot < slots; slot += W) {
    const uint8_t *word = block + 4 * slot, *scales = block + l.key_scale_offset + 2 * slot;
    float* to = keys + slot;
    for (int64_t group = 0; group < groups; ++group, scales += 2 * l.page_size) {
      vf scale = F::scaled ? bf16_lanes(scales) : splat(1.f);
      vf least = F::affine ? bf16_lanes(scales + 2 * groups * l.page_size) : splat(0.f);
      for (int64_t w = 0; w < words; ++w, word += 4 * l.page_size) {
        vi bits = load<vi>(word);
        auto element = [&](auto index) {
          vf x = F::template unpack<decltype(index)::value>(bits);
          store(to, F::scaled ? fma(x, scale, least) : x);
          to += kLine;
        };
        each<F::per_word>(element);
      }
    }
  }
}

// values: [slots][value size].
template <class F>
INLINE void expand_values(const Layout& l, const uint8_t* block, int64_t slots, float* values) {
  int64_t groups = F::affine ? l.value.num_scales / 2 : 1, size = l.value.size / groups;
  for (int64_t slot = 0; slot < slots; ++slot) {
    const uint8_t* bytes = block + l.value_offset + slot * l.value.data_bytes;
    const uint8_t* scales = block + l.value_scale_offset + 2 * slot;
    for (int64_t group = 0; group < groups; ++group, scales += 2 * l.page_size) {
      vf scale = splat(F::scaled ? bf16_at(scales) : 1.f);
      vf least = splat(F::affine ? bf16_at(scales + 2 * groups * l.page_size) : 0.f);
      for (int64_t c = group * size; c < (group + 1) * size; c += W) {
        vf x = in_order<F>(F::value(bytes, c));
        store(values + slot * l.value.size + c, F::scaled ? fma(x, scale, least) : x);
      }
    }
  }
}

// Consecutive entries of a row, all in one segment.
struct Chunk {
  const Segment* segment;
  int64_t row, head, first_page, count, base;
};

INLINE void expand(const Chunk& chunk, bool of_values, float* numbers) {
  const Layout& l = *chunk.segment->blocks.layout;
  const int32_t* table = chunk.segment->table + chunk.row * chunk.segment->table_stride;
  with_format(of_values ? l.value.format : l.key.format, [&](auto format) {
    using F = decltype(format);
    for (int64_t at = 0; at < chunk.count; at += l.page_size) {
      int64_t page = table[chunk.first_page + at / l.page_size];
      const uint8_t* block = block_of(chunk.segment->blocks, 0, page, chunk.head);
      int64_t slots = smaller(l.page_size, chunk.count - at);
      if (of_values) expand_values<F>(l, block, slots, numbers + at * l.value.size);
      else expand_keys<F>(l, block, slots, numbers + at);
    }
  });
}

// f(chunk) for the first `visible` entries of a row.
template <class Call_>
INLINE void each_chunk(const Attend& a, int64_t row, int64_t head, int64_t visible, Call_&& f) {
  int64_t base = 0;
  for (int64_t s = 0; s < a.num_segments; ++s) {
    const Segment& segment = a.segments[s];
    int64_t page_size = segment.blocks.layout->page_size, held = segment.counts[row];
    int64_t pages = larger(1, kChunk / page_size);
    for (int64_t page = 0; page * page_size < held; page += pages) {
      int64_t at = page * page_size, start = base + at;
      int64_t count = smaller(smaller(pages * page_size, held - at), visible - start);
      if (count > 0) f(Chunk{&segment, row, head, page, count, start});
    }
    base += held;
  }
}

}  // namespace
