// The softmax of a tile of query vectors, chunk by chunk.
#pragma once

#include "prefill.h"

namespace {

struct Tile {
  int64_t row, head, first, tokens;  // tokens are counted in the row
};

struct TileScratch {
  float *keys, *values, *logits, *output, *weights, *tops, *sums;
  static int64_t floats(const Call& call, int64_t vectors) {
    return kLine * (call.key_size + call.value_size + 1) + vectors * (kLine + call.value_size + 2);
  }
  TileScratch(float* at, const Call& call, int64_t vectors) {
    keys = at;
    values = keys + kLine * call.key_size;
    logits = values + kLine * call.value_size;
    output = logits + vectors * kLine;
    weights = output + vectors * call.value_size;
    tops = weights + kLine;
    sums = tops + vectors;
  }
};

// float [count, to W] of what lies beside the entries from `base` on of a row; then 0.
INLINE void side_of(const Attend& a, const Side& side, int64_t row, int64_t head, int64_t base,
                    int64_t count, float* found) {
  const Segment& first = a.segments[0];
  int64_t page_size = first.blocks.layout->page_size;
  for (int64_t i = count; i % W; ++i) found[i] = 0;
  for (int64_t i = 0; i < count; ++i) {
    int64_t entry = base + i, page = first.table[row * first.table_stride + entry / page_size];
    found[i] = side.data[page * side.page_stride + head * side.head_stride + entry % page_size];
  }
}

// How many of a chunk's entries a token sees, counted in its row.
INLINE int64_t seen(const Call& call, const Chunk& chunk, int64_t token) {
  int64_t visible = call.entries_of(chunk.row) - call.tokens_of(chunk.row) + token + 1;
  return larger(0, smaller(chunk.count, visible - chunk.base));
}

INLINE void logits_of(const Call& call, const Tile& tile, const Chunk& chunk, float* keys,
                      float* logits) {
  int64_t segment = chunk.segment - call.a->segments;
  const float* q = call.query(segment, tile.head, call.a->starts[tile.row] + tile.first);
  product(logits, kLine, q, call.key_size, keys, kLine, tile.tokens * call.group,
          pieces(chunk.count, 16) * 16, call.key_size, false);
}

// One row of logits becomes numerators; the output so far is brought to the new maximum.
INLINE void soften_more(float* logits, int64_t count, int64_t columns, float softcap,
                        const float* weights, float* output, int64_t size, float* top, float* sum) {
  float before = *top;
  float own = count ? soften(logits, count, softcap, weights, top) : 0.f;
  for (int64_t i = pieces(count, W) * W; i < columns; i += W) store(logits + i, splat(0.f));
  if (*top != before && before != -(float)INFINITY) {
    float keep = exponential(splat(before - *top))[0];
    for (int64_t c = 0; c < size; c += W) store(output + c, load<vf>(output + c) * keep);
    *sum *= keep;
  }
  *sum += own;
}

// Takes the sink in, if there is one; gives what the output is to be multiplied with.
INLINE float close_softmax(const float* sinks, int64_t head, float* top, float* sum) {
  if (sinks) {
    float before = *top;
    *top = sinks[head] > before ? sinks[head] : before;
    float keep = before == -(float)INFINITY ? 0.f : exponential(splat(before - *top))[0];
    *sum = *sum * keep + exponential(splat(sinks[head] - *top))[0];
    return keep / *sum;
  }
  return *sum == 0 ? 0.f : 1.f / *sum;
}

INLINE void write_output(const Attend& a, int64_t token, int64_t head, float* x, int64_t size) {
  int64_t at = token * a.output_token_stride + head * a.output_head_stride;
  from_floats((char*)a.output + at * (a.dtype == kFloat32 ? 4 : 2), x, a.dtype, size);
}

INLINE void finish_tile(const Call& call, const Tile& tile, TileScratch& s) {
  const Attend& a = *call.a;
  for (int64_t m = 0; m < tile.tokens * call.group; ++m) {
    int64_t token = a.starts[tile.row] + tile.first + m / call.group;
    int64_t head = tile.head * call.group + m % call.group;
    float* output = s.output + m * call.value_size;
    vf factor = splat(close_softmax(a.sinks, head, s.tops + m, s.sums + m));
    for (int64_t c = 0; c < call.value_size; c += W)
      store(output + c, load<vf>(output + c) * factor);
    write_output(a, token, head, output, call.value_size);
    if (!a.scores.data) continue;
    call.tops[token * a.heads + head] = s.tops[m];
    float left = call.left_after(a.starts[tile.row + 1] - 1 - token);
    call.shares[token * a.heads + head] = s.sums[m] == 0 ? 0.f : left / s.sums[m];
  }
}

static void attend_tile(const Call& call, const Tile& tile, float* memory) {
  const Attend& a = *call.a;
  int64_t vectors = tile.tokens * call.group, size = call.value_size;
  TileScratch s(memory, call, vectors);
  memset(s.output, 0, 4 * vectors * size);
  for (int64_t m = 0; m < vectors; ++m) s.tops[m] = -(float)INFINITY, s.sums[m] = 0;
  const Segment* current = a.segments;
  auto unrotate = [&] {
    for (int64_t m = 0; m < vectors; ++m)
      rotate(s.output + m * size, size, current->blocks.layout->value.rotation);
  };
  int64_t before = call.entries_of(tile.row) - call.tokens_of(tile.row);
  each_chunk(a, tile.row, tile.head, before + tile.first + tile.tokens, [&](const Chunk& chunk) {
    if (chunk.segment != current) unrotate();
    current = chunk.segment;
    expand(chunk, false, s.keys);
    logits_of(call, tile, chunk, s.keys, s.logits);
    expand(chunk, true, s.values);
    float* weights = a.weights.data ? s.weights : nullptr;
    if (weights) side_of(a, a.weights, tile.row, tile.head, chunk.base, chunk.count, weights);
    int64_t columns = pieces(chunk.count, W) * W;
    for (int64_t token = 0, m = 0; token < tile.tokens; ++token) {
      int64_t count = seen(call, chunk, tile.first + token);
      for (int64_t g = 0; g < call.group; ++g, ++m)
        soften_more(s.logits + m * kLine, count, columns, (float)a.softcap, weights,
                    s.output + m * size, size, s.tops + m, s.sums + m);
    }
    product(s.output, size, s.logits, kLine, s.values, size, vectors, size, chunk.count, true);
  });
  unrotate();
  finish_tile(call, tile, s);
}

// mass [count]: what the chunk's entries get from all of the row's tokens, faded; tops are known.
static void add_mass(const Call& call, const Chunk& chunk, int64_t tile_tokens, float* mass,
                     float* memory) {
  const Attend& a = *call.a;
  TileScratch s(memory, call, tile_tokens * call.group);
  float* weights = a.weights.data ? s.weights : nullptr;
  if (weights) side_of(a, a.weights, chunk.row, chunk.head, chunk.base, chunk.count, weights);
  expand(chunk, false, s.keys);
  float total[kChunk] = {};
  int64_t tokens = call.tokens_of(chunk.row);
  for (int64_t first = 0; first < tokens; first += tile_tokens) {
    Tile tile{chunk.row, chunk.head, first, smaller(tile_tokens, tokens - first)};
    if (!seen(call, chunk, first + tile.tokens - 1)) continue;
    logits_of(call, tile, chunk, s.keys, s.logits);
    for (int64_t m = 0; m < tile.tokens * call.group; ++m) {
      int64_t token = first + m / call.group, count = seen(call, chunk, token);
      int64_t at = (a.starts[tile.row] + token) * a.heads + tile.head * call.group + m % call.group;
      float *own = s.logits + m * kLine, top = call.tops[at];
      if (count) soften(own, count, (float)a.softcap, weights, &top);
      for (int64_t i = 0; i < count; i += W)
        store(total + i, fma(load<vf>(own + i), splat(call.shares[at]), load<vf>(total + i)));
    }
  }
  memcpy(mass, total, 4 * chunk.count);
}

}  // namespace
