// What Python hands over (paged_kv.kernels.cpu.structs has the same fields), and where in a block
// the bytes of an entry lie.
#pragma once

#include <stdlib.h>

#include "formats.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

extern "C" {

struct Part {  // a codec
  int64_t format, size, data_bytes, num_scales, rotation;
};

struct Layout {
  Part key, value;
  int64_t page_size, block_bytes, value_offset, key_scale_offset, value_scale_offset;
};

struct Blocks {  // uint8 [layers, pages, heads, block_bytes]
  uint8_t* data;
  const Layout* layout;
  int64_t layers, pages, heads;
  int64_t layer_stride, page_stride, head_stride;  // bytes
};

struct Segment {
  Blocks blocks;
  const int32_t* table;  // [rows, columns]
  int64_t table_stride, columns;
  const int32_t* counts;
};

struct Side {  // float32 [pages, heads, page_size]
  float* data;
  int64_t pages, page_stride, head_stride;  // strides in numbers
};

struct Attend {
  void* output;  // [tokens, heads, value_size]
  const void* queries;
  int64_t dtype, output_token_stride, output_head_stride, query_token_stride, query_head_stride;
  const int32_t* starts;
  int64_t tokens, rows, heads, kv_heads, num_segments;
  Segment segments[2];
  double scale, softcap;
  const float* sinks;
  Side weights, scores;
  double decay;  // of scores, per token
  int64_t bad_row, bad_value;  // where an error is
};

struct Write {
  Blocks blocks;
  const void *keys, *values;  // [tokens, heads, size]
  int64_t dtype, key_token_stride, key_head_stride, value_token_stride, value_head_stride;
  const int64_t* slots;
  int64_t tokens, bad_row, bad_value;
};

struct Places {  // [count]
  const int64_t *layer, *page, *head, *offset;
};

struct Entries {  // gather, store, move
  Blocks blocks;
  int64_t of_values;  // whether values, not keys
  int64_t count;
  Places source, target;
  float* numbers;  // [count, size]
  int64_t bad_row, bad_value;
};

struct Mass {
  const float *queries, *keys, *sinks;  // [heads, queries, size], [heads, entries, size]
  const int64_t *query_positions, *key_positions;
  float* mass;  // [heads, entries]
  int64_t heads, queries_per_head, entries, size, group;
  int64_t largest;  // whether the largest probability, not the sum
  double scale, softcap;
};

struct Rows {  // [..., size], numbers of a row side by side
  const void* data;
  int64_t strides[3];  // of the leading dimensions, in elements
};

struct Lowest {
  Rows scores, positions, keep, count;  // float32, int64, bool; int64 [...]
  uint8_t* chosen;                      // bool [rows, size]
  int64_t sizes[3], size, limit;        // leading dimensions, entries of a row
};

struct Expected {  // expected_attention; rows [layers, events, heads], all but cos and sin dense
  const float *keys, *values;                       // [rows, entries, size]
  Rows cos, sin;                                    // [entries, half] of a row
  const float *linear, *quadratic, *normaliser;     // [layers, heads, group], of size or 1
  float* found;                                     // [rows, entries]
  int64_t sizes[3], entries, size, value_size, half, group, neox;
};

struct Pairs {  // pair_moves and first_places
  Rows losers, freed;        // bool
  int64_t *source, *target;  // [rows, limit]
  int64_t sizes[3], size, limit, spare;
};
}

enum Error { kFine, kBadPage, kBadCount, kBadStarts, kBadSlot, kBadLayer, kBadHead, kNoMemory };

namespace {

constexpr int64_t kMaxEntryBytes = 1 << 14;  // 2048 float32 numbers and scales

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t pieces(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Memory of one call: nothing is static, so calls may overlap.
struct Scratch {
  char* data;  // null: no memory
  explicit Scratch(int64_t bytes) : data((char*)aligned_alloc(64, (bytes + 127) & ~63)) {}
  ~Scratch() { free(data); }
  Scratch(const Scratch&) = delete;
};

INLINE int64_t threads() {
#if defined(_OPENMP)
  return omp_get_max_threads();
#else
  return 1;
#endif
}

INLINE uint8_t* block_of(const Blocks& b, int64_t layer, int64_t page, int64_t head) {
  return b.data + layer * b.layer_stride + page * b.page_stride + head * b.head_stride;
}

// An entry's key (or value) as its codec has it: data, then scales.
INLINE void load_entry(const Layout& l, bool value, const uint8_t* block, int64_t slot,
                       uint8_t* bytes) {
  const Part& part = value ? l.value : l.key;
  if (value) {
    memcpy(bytes, block + l.value_offset + slot * part.data_bytes, part.data_bytes);
  } else {
    for (int64_t w = 0; w < part.data_bytes; w += 4)
      memcpy(bytes + w, block + w * l.page_size + slot * 4, 4);
  }
  const uint8_t* scales = block + (value ? l.value_scale_offset : l.key_scale_offset);
  for (int64_t s = 0; s < part.num_scales; ++s)
    memcpy(bytes + part.data_bytes + 2 * s, scales + 2 * (s * l.page_size + slot), 2);
}

INLINE void store_entry(const Layout& l, bool value, uint8_t* block, int64_t slot,
                        const uint8_t* bytes) {
  const Part& part = value ? l.value : l.key;
  if (value) {
    memcpy(block + l.value_offset + slot * part.data_bytes, bytes, part.data_bytes);
  } else {
    for (int64_t w = 0; w < part.data_bytes; w += 4)
      memcpy(block + w * l.page_size + slot * 4, bytes + w, 4);
  }
  uint8_t* scales = block + (value ? l.value_scale_offset : l.key_scale_offset);
  for (int64_t s = 0; s < part.num_scales; ++s)
    memcpy(scales + 2 * (s * l.page_size + slot), bytes + part.data_bytes + 2 * s, 2);
}

}  // namespace
