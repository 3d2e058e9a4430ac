// The spans of rows with one new token: each is a task, then they are joined.
#pragma once

#include "prefill_tile.h"

namespace {

struct Job : Call {
  Span* spans;
  int64_t num_spans;
  int64_t* row_spans;  // [rows + 1]: how many spans per head lie before a row's
  float *span_tops, *span_sums;  // [spans][group]
  float* partials;               // [spans][group][value_size]
  float* numerators;             // [spans][group][kSpan], for scores, unless threads have their own
  bool whole;                    // a thread does all spans of a head, then joins them
  bool shared;                   // a page belongs to several rows
  uint8_t* seen;                 // [pages], to find that out

  int64_t spans_of(int64_t row) const { return row_spans[row + 1] - row_spans[row]; }
  // A row's spans of one head lie together.
  int64_t first_span(int64_t row, int64_t head) const {
    return row_spans[row] * a->kv_heads + head * spans_of(row);
  }
};

// How many spans a row's head has; written to `spans`, if that is not null.
INLINE int64_t cut_row(const Attend& a, int64_t row, int64_t head, Span* spans) {
  int64_t found = 0, base = 0;
  if (a.starts[row + 1] - a.starts[row] != 1) return 0;
  for (int64_t s = 0; s < a.num_segments; ++s) {
    int64_t page_size = a.segments[s].blocks.layout->page_size, held = a.segments[s].counts[row];
    int64_t pages = kSpan / page_size;
    for (int64_t page = 0; page * page_size < held; page += pages, ++found) {
      int64_t count = smaller(pages * page_size, held - page * page_size);
      if (spans)
        spans[found] = {(int32_t)row, (int32_t)head, (int32_t)s, (int32_t)page,
                        (int32_t)pieces(count, page_size), (int32_t)count, base + page * page_size};
    }
    base += held;
  }
  return found;
}

// Where the pages of a span are, and what to fetch meanwhile: first values, then the next keys.
INLINE void find_pages(const Segment& segment, const Span& span, Pass& p) {
  const Layout& l = *segment.blocks.layout;
  const int32_t* table = segment.table + span.row * segment.table_stride;
  int64_t all = pieces(segment.counts[span.row], l.page_size);
  p.layout = &l;
  p.pages = span.pages;
  p.count = span.count;
  auto block = [&](int64_t page) {
    return block_of(segment.blocks, 0, table[smaller(page, all - 1)], span.head);
  };
  int64_t keys = larger(1, kAhead / l.value_offset);
  int64_t values = larger(1, kAhead / (l.page_size * l.value.data_bytes));
  for (int64_t i = 0; i < p.pages; ++i) p.blocks[i] = block(span.first_page + i);
  for (int64_t i = 0; i < p.pages; ++i) {
    int64_t key = i + keys, value = i + values;
    bool more_keys = key < p.pages, more_values = value < p.pages;
    const uint8_t* of_keys = p.blocks[more_keys ? key : smaller(key - p.pages, p.pages - 1)];
    const uint8_t* of_values = more_values ? p.blocks[value] : block(span.first_page + value);
    p.ahead[i] = of_keys + (more_keys ? 0 : l.value_offset);
    p.ahead[p.pages + i] = of_values + (more_values ? l.value_offset : 0);
    p.ahead_scales[i] = of_keys + l.key_scale_offset;
    p.ahead_scales[p.pages + i] = of_values + l.key_scale_offset;
  }
}

// numerators: where they are kept, or null.
static void attend_span(const Job& job, int64_t index, float* numerators) {
  const Attend& a = *job.a;
  const Span& span = job.spans[index];
  const Segment& segment = a.segments[span.segment];
  const Layout& l = *segment.blocks.layout;
  alignas(64) float logits[kGroup * kSpan], factors[kFactors * kSpan], weights[kSpan];
  Pass p;
  find_pages(segment, span, p);
  if (a.weights.data)
    side_of(a, a.weights, span.row, span.head, span.base, span.count, weights);
  p.factors = factors;
  int64_t groups = larger(1, l.key.num_scales / 2);
  const float* query = job.query(span.segment, span.head, a.starts[span.row]);
  const float* sums = job.query_sums[span.segment] +
                      (span.head * a.tokens + a.starts[span.row]) * groups * job.group;
  for (int64_t first = 0; first < job.group; first += kGroup) {
    int64_t members = smaller(kGroup, job.group - first), at = index * job.group + first;
    p.query = query + first * job.key_size;
    p.query_sums = sums + first * groups;
    p.logits = numerators ? numerators + first * kSpan : logits;
    p.output = job.partials + at * job.value_size;
    with_format(l.key.format, [&](auto format) {
      passes_of<decltype(format)>(members).key(p);
    });
    for (int64_t g = 0; g < members; ++g) {
      job.span_tops[at + g] = -(float)INFINITY;
      job.span_sums[at + g] = soften(p.logits + g * kSpan, p.count, (float)a.softcap,
                                     a.weights.data ? weights : nullptr, job.span_tops + at + g);
    }
    with_format(l.value.format, [&](auto format) {
      passes_of<decltype(format)>(members).value(p);
    });
  }
}

// The spans' tops and sums become factors of their numerators (in span_sums), for one query head.
INLINE void weigh_spans(const Job& job, int64_t row, int64_t head, int64_t g) {
  int64_t first = job.first_span(row, head), count = job.spans_of(row);
  float top = -(float)INFINITY, sum = 0;
  auto at = [&](int64_t i) { return (first + i) * job.group + g; };
  for (int64_t i = 0; i < count; ++i)
    if (!(job.span_tops[at(i)] <= top)) top = job.span_tops[at(i)];
  auto keep = [&](int64_t i) {
    float own = job.span_tops[at(i)];
    return own == -(float)INFINITY ? 0.f : exponential(splat(own - top))[0];
  };
  for (int64_t i = 0; i < count; ++i) sum += job.span_sums[at(i)] * keep(i);
  float closed = top;
  float share = close_softmax(job.a->sinks, head * job.group + g, &closed, &sum);
  for (int64_t i = 0; i < count; ++i) job.span_sums[at(i)] = keep(i) * share;
}

static void join_head(const Job& job, int64_t row, int64_t head, int64_t g) {
  const Attend& a = *job.a;
  int64_t first = job.first_span(row, head), count = job.spans_of(row), size = job.value_size;
  float output[kMaxEntryBytes / 4];
  memset(output, 0, 4 * size);
  weigh_spans(job, row, head, g);
  int32_t segment = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (job.spans[first + i].segment != segment)
      rotate(output, size, a.segments[segment].blocks.layout->value.rotation);
    segment = job.spans[first + i].segment;
    int64_t at = (first + i) * job.group + g;
    vf share = splat(job.span_sums[at]);
    for (int64_t c = 0; c < size; c += W)
      store(output + c, fma(load<vf>(job.partials + at * size + c), share, load<vf>(output + c)));
  }
  rotate(output, size, a.segments[segment].blocks.layout->value.rotation);
  write_output(a, a.starts[row], head * job.group + g, output, size);
}

// numerators: of all spans of the head.
static void sum_numerators(const Job& job, int64_t row, int64_t head, const float* numerators) {
  float* mass = job.mass_of(row, head);
  int64_t first = job.first_span(row, head);
  for (int64_t s = first; s < first + job.spans_of(row); ++s, numerators += job.group * kSpan) {
    const Span& span = job.spans[s];
    for (int64_t i = 0; i < span.count; i += W) {
      vf total = {};
      for (int64_t g = 0; g < job.group; ++g)
        total = fma(load<vf>(numerators + g * kSpan + i), splat(job.span_sums[s * job.group + g]),
                    total);
      store(mass + span.base + i, total);
    }
  }
}

INLINE void add_scores(const Job& job, int64_t row, int64_t head) {
  const Attend& a = *job.a;
  const Segment& first = a.segments[0];
  int64_t page_size = first.blocks.layout->page_size, entries = job.entries_of(row);
  const float* mass = job.mass_of(row, head);
  float left = job.left_after(job.tokens_of(row));
  auto scores = [&](int64_t i) {
    int64_t page = first.table[row * first.table_stride + i / page_size];
    return a.scores.data + page * a.scores.page_stride + head * a.scores.head_stride;
  };
  for (int64_t i = 0; i < entries; i += page_size, mass += page_size) {
    const float* later = scores(smaller(i + 8 * page_size, entries - 1));
    for (int64_t slot = 0; slot < page_size; slot += 16) fetch(later + slot);
    float* own = scores(i);
    int64_t count = smaller(page_size, entries - i), slot = 0;
    for (; slot + W <= count; slot += W)
      store(own + slot, load<vf>(own + slot) * left + load<vf>(mass + slot));
    for (; slot < count; ++slot) own[slot] = own[slot] * left + mass[slot];
  }
}

INLINE void join(const Job& job, int64_t row, int64_t head, const float* numerators) {
  for (int64_t g = 0; g < job.group; ++g) join_head(job, row, head, g);
  if (!job.mass) return;
  sum_numerators(job, row, head, numerators);
  if (!job.shared) add_scores(job, row, head);
}

}  // namespace
