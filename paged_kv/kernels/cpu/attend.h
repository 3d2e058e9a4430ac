// Attention over packed pages: checks, memory, and the order of the work.
#pragma once

#include "spans.h"

namespace {

// Hands out parts of a piece of memory; without one it counts what is needed.
struct Arena {
  char* data;
  int64_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* found = (T*)(data + used);
    used += (count * (int64_t)sizeof(T) + 63) & ~63;
    return found;
  }
};

INLINE Error check_row(const Attend& a, const Segment& segment, int64_t row, int64_t pages_of,
                       int64_t* bad) {
  int64_t page_size = segment.blocks.layout->page_size, count = segment.counts[row];
  *bad = count;
  if (count < 0 || pieces(pages_of, page_size) > segment.columns) return kBadCount;
  for (int64_t i = 0; i < pieces(pages_of, page_size); ++i) {
    *bad = segment.table[row * segment.table_stride + i];
    if (*bad < 0 || *bad >= segment.blocks.pages) return kBadPage;
    if (a.weights.data && &segment == a.segments && *bad >= a.weights.pages) return kBadPage;
    if (a.scores.data && &segment == a.segments && *bad >= a.scores.pages) return kBadPage;
  }
  return kFine;
}

INLINE Error check(Attend& a) {
  for (int64_t row = 0; row < a.rows; ++row) {
    a.bad_row = row;
    a.bad_value = a.starts[row + 1];
    if (a.starts[row] < (row ? a.starts[row - 1] : 0) || a.starts[row + 1] < a.starts[row] ||
        a.starts[row + 1] > a.tokens)
      return kBadStarts;
    for (int64_t s = 0; s < a.num_segments; ++s) {
      // The side data of all entries lies by the first segment's table.
      int64_t held = a.segments[s].counts[row];
      bool all = s == 0 && a.num_segments == 2 && (a.weights.data || a.scores.data);
      if (all && a.segments[1].counts[row] > 0) held += a.segments[1].counts[row];
      if (Error error = check_row(a, a.segments[s], row, held, &a.bad_value)) return error;
    }
  }
  return kFine;
}

INLINE int64_t tile_tokens(const Call& call) { return larger(1, kTile / call.group); }

INLINE void lay_out(Job& job, Arena& arena, bool count_only) {
  const Attend& a = *job.a;
  int64_t width = a.tokens * a.heads;
  for (int64_t s = 0; s < a.num_segments; ++s) {
    int64_t groups = larger(1, a.segments[s].blocks.layout->key.num_scales / 2);
    job.queries[s] = arena.take<float>(width * job.key_size);
    job.query_sums[s] = arena.take<float>(width * groups);
  }
  job.row_spans = arena.take<int64_t>(a.rows + 1);
  job.row_mass = arena.take<int64_t>(a.rows);
  int64_t spans = 0, mass = 0;
  for (int64_t row = 0; row < a.rows; ++row) {
    if (!count_only) job.row_spans[row] = spans, job.row_mass[row] = mass;
    spans += cut_row(a, row, 0, nullptr);
    mass += a.kv_heads * job.mass_line(row);
  }
  if (!count_only) job.row_spans[a.rows] = spans;
  job.num_spans = spans * a.kv_heads;
  job.spans = arena.take<Span>(job.num_spans);
  job.span_tops = arena.take<float>(job.num_spans * job.group);
  job.span_sums = arena.take<float>(job.num_spans * job.group);
  job.partials = arena.take<float>(job.num_spans * job.group * job.value_size);
  bool scores = a.scores.data != nullptr;
  int64_t numerators = scores && !job.whole ? job.num_spans * job.group * kSpan : 0;
  job.numerators = arena.take<float>(numerators);
  job.seen = arena.take<uint8_t>(scores ? a.segments[0].blocks.pages : 0);
  job.mass = scores ? arena.take<float>(mass) : nullptr;
  job.tops = scores ? arena.take<float>(width) : nullptr;
  job.shares = scores ? arena.take<float>(width) : nullptr;
}

// A token's query vectors of a KV head, scaled and rotated: by vector, or for one token by number.
static void prepare_query(const Job& job, int64_t segment, int64_t head, int64_t token,
                          bool by_number) {
  const Attend& a = *job.a;
  const Part& part = a.segments[segment].blocks.layout->key;
  int64_t size = part.size, groups = larger(1, part.num_scales / 2);
  float *to = job.query(segment, head, token), x[kMaxEntryBytes / 4];
  float* sums = job.query_sums[segment] + (head * a.tokens + token) * groups * job.group;
  for (int64_t g = 0; g < job.group; ++g) {
    int64_t at = token * a.query_token_stride + (head * job.group + g) * a.query_head_stride;
    to_floats(x, (const char*)a.queries + at * (a.dtype == kFloat32 ? 4 : 2), a.dtype, size);
    for (int64_t i = 0; i < size; ++i) x[i] *= (float)a.scale;
    rotate(x, size, part.rotation);
    if (!by_number) {
      memcpy(to + g * size, x, 4 * size);
      continue;
    }
    int64_t first = g / kGroup * kGroup, members = smaller(kGroup, job.group - first);
    for (int64_t i = 0; i < size; ++i) to[first * size + i * members + g - first] = x[i];
    for (int64_t group = 0; group < groups; ++group) {
      float sum = 0;
      for (int64_t i = 0; i < size / groups; ++i) sum += x[group * (size / groups) + i];
      sums[first * groups + group * members + g - first] = sum;
    }
  }
}

INLINE void prepare_row(const Job& job, int64_t row, int64_t head) {
  const Attend& a = *job.a;
  bool one = job.tokens_of(row) == 1;
  if (one) cut_row(a, row, head, job.spans + job.first_span(row, head));
  for (int64_t s = 0; s < a.num_segments; ++s)
    for (int64_t token = a.starts[row]; token < a.starts[row + 1]; ++token)
      prepare_query(job, s, head, token, one);
}

// The tiles of rows with several tokens, the long ones first; then their masses.
INLINE void attend_tiles(const Job& job, float* memory) {
  const Attend& a = *job.a;
  int64_t step = tile_tokens(job);
  for (int64_t row = 0; row < a.rows; ++row) {
    int64_t tokens = job.tokens_of(row), tiles = tokens > 1 ? pieces(tokens, step) : 0;
#pragma omp for schedule(dynamic) nowait
    for (int64_t i = 0; i < tiles * a.kv_heads; ++i) {
      int64_t first = (tiles - 1 - i / a.kv_heads) * step;
      attend_tile(job, Tile{row, i % a.kv_heads, first, smaller(step, tokens - first)}, memory);
    }
  }
}

INLINE void sum_tiles(const Job& job, float* memory) {
  const Attend& a = *job.a;
  for (int64_t row = 0; row < a.rows; ++row) {
    int64_t entries = job.tokens_of(row) > 1 ? job.entries_of(row) : 0;
#pragma omp for schedule(dynamic) collapse(2) nowait
    for (int64_t head = 0; head < a.kv_heads; ++head)
      for (int64_t slice = 0; slice < pieces(entries, 8 * kChunk); ++slice)
        each_chunk(a, row, head, entries, [&](const Chunk& chunk) {
          if (chunk.base / (8 * kChunk) == slice)
            add_mass(job, chunk, tile_tokens(job), job.mass_of(row, head) + chunk.base, memory);
        });
  }
}

// One-token rows: a head per task, or where there are few of these, a span.
INLINE void attend_heads(const Job& job, float* numerators) {
  const Attend& a = *job.a;
#pragma omp for schedule(dynamic) collapse(2)
  for (int64_t row = 0; row < a.rows; ++row)
    for (int64_t head = 0; head < a.kv_heads; ++head) {
      if (job.tokens_of(row) != 1) continue;
      prepare_row(job, row, head);
      int64_t size = numerators ? job.group * kSpan : 0, first = job.first_span(row, head);
      for (int64_t i = 0; i < job.spans_of(row); ++i)
        attend_span(job, first + i, numerators ? numerators + i * size : nullptr);
      join(job, row, head, numerators);
    }
}

INLINE void attend_spans(const Job& job) {
  const Attend& a = *job.a;
  int64_t size = job.group * kSpan;
#pragma omp for schedule(dynamic)
  for (int64_t i = 0; i < job.num_spans; ++i)
    attend_span(job, i, job.mass ? job.numerators + i * size : nullptr);
#pragma omp for schedule(dynamic) collapse(2)
  for (int64_t row = 0; row < a.rows; ++row)
    for (int64_t head = 0; head < a.kv_heads; ++head)
      if (job.tokens_of(row) == 1)
        join(job, row, head, job.numerators + job.first_span(row, head) * size);
}

INLINE void run(const Job& job, float* tiles, float* numerators) {
  const Attend& a = *job.a;
  if (tiles || !job.whole) {
#pragma omp for schedule(dynamic) collapse(2)
    for (int64_t row = 0; row < a.rows; ++row)
      for (int64_t head = 0; head < a.kv_heads; ++head)
        if (!job.whole || job.tokens_of(row) > 1) prepare_row(job, row, head);
  }
  if (tiles) attend_tiles(job, tiles);
  if (job.whole) attend_heads(job, numerators);
  else attend_spans(job);
  if (!job.mass) return;
  if (tiles) sum_tiles(job, tiles);
#pragma omp barrier
#pragma omp for schedule(dynamic)
  for (int64_t head = 0; head < a.kv_heads; ++head)
    for (int64_t row = 0; row < a.rows; ++row)
      if (job.tokens_of(row) > 1 || (job.shared && job.tokens_of(row))) add_scores(job, row, head);
}

// Whether a page belongs to several rows; seen: a byte for each page.
INLINE bool any_shared(const Attend& a, uint8_t* seen) {
  const Segment& first = a.segments[0];
  memset(seen, 0, first.blocks.pages);
  bool found = false;
  for (int64_t row = 0; row < a.rows; ++row) {
    int64_t entries = 0;
    for (int64_t s = 0; s < a.num_segments; ++s) entries += a.segments[s].counts[row];
    for (int64_t i = 0; i < pieces(entries, first.blocks.layout->page_size); ++i)
      found |= seen[first.table[row * first.table_stride + i]]++;
  }
  return found;
}

}  // namespace

extern "C" EXPORT int paged_kv_attend(Attend* a) {
  if (Error error = check(*a)) return error;
  Job job{};
  job.a = a;
  job.group = a->heads / a->kv_heads;
  job.key_size = a->segments[0].blocks.layout->key.size;
  job.value_size = a->segments[0].blocks.layout->value.size;
  job.whole = a->rows * a->kv_heads >= 4 * threads();
  Arena arena{nullptr};
  lay_out(job, arena, true);
  Scratch memory(arena.used);
  if (!memory.data) return kNoMemory;
  arena = Arena{memory.data};
  lay_out(job, arena, false);
  job.shared = job.mass && any_shared(*a, job.seen);
  int64_t tiles = 0, longest = 0;
  for (int64_t row = 0; row < a->rows; ++row) {
    if (job.tokens_of(row) > 1) tiles = TileScratch::floats(job, tile_tokens(job) * job.group);
    longest = larger(longest, job.spans_of(row));
  }
  int64_t numerators = job.mass && job.whole ? longest * job.group * kSpan : 0;
  bool failed = false;
#pragma omp parallel
  {
    Scratch own(4 * (tiles + numerators));
#pragma omp critical
    failed |= !own.data;
#pragma omp barrier
    float* at = (float*)own.data;
    if (!failed) run(job, tiles ? at : nullptr, numerators ? at + tiles : nullptr);
  }
  return failed ? kNoMemory : kFine;
}
