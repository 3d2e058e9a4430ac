// lowest, pair_moves and first_places: which entries go, and where survivors move.
#pragma once

#include "page.h"

namespace {

constexpr int64_t kAlone = 1 << 14;  // entries that are not worth a second thread
constexpr int64_t kTighten = 8;      // passes after which many equal numbers may be what is left

// Where row number i of an operand begins.
template <class T>
INLINE const T* row_of(const Rows& rows, const int64_t* sizes, int64_t i) {
  int64_t last = i % sizes[2], middle = i / sizes[2] % sizes[1], first = i / sizes[2] / sizes[1];
  return (const T*)rows.data + first * rows.strides[0] + middle * rows.strides[1] +
         last * rows.strides[2];
}

INLINE int64_t rows_in(const int64_t* sizes) { return sizes[0] * sizes[1] * sizes[2]; }

INLINE int64_t not_above(const int32_t* x, int64_t size, int32_t limit) {
  int32_t found = 0;
  for (int64_t i = 0; i < size; ++i) found += x[i] <= limit;
  return found;
}

struct Bounds {
  int32_t low, high;
};

// The smallest number from b.low on, and the largest up to b.high. size: a multiple of W.
INLINE Bounds tighten(const int32_t* x, int64_t size, Bounds b) {
  vi low = splat(INT32_MAX), high = splat(INT32_MIN);
  for (int64_t i = 0; i < size; i += W) {
    vi own = load<vi>(x + i);
    vi above = own >= b.low ? own : INT32_MAX, below = own <= b.high ? own : INT32_MIN;
    low = above < low ? above : low;
    high = below > high ? below : high;
  }
  b = {low[0], high[0]};
  for (int lane = 1; lane < W; ++lane) {
    b.low = low[lane] < b.low ? low[lane] : b.low;
    b.high = high[lane] > b.high ? high[lane] : b.high;
  }
  return b;
}

// Numbers that come last join, up to a multiple of W: the new size.
INLINE int64_t fill_vector(int32_t* x, int64_t size) {
  for (; size % W; ++size) x[size] = INT32_MAX;
  return size;
}

// `count` numbers are not above it; or, if equal ones make that impossible, more than that, but
// fewer are below it. By bisection: a pass over small numbers takes less than moving them about.
// x: memory up to a multiple of W.
static int32_t cut_at(int32_t* x, int64_t size, int64_t count) {
  size = fill_vector(x, size);
  Bounds b{INT32_MIN, INT32_MAX};
  for (int64_t pass = 0; b.low < b.high; ++pass) {
    if (pass % kTighten == 0) b = tighten(x, size, b);
    int32_t middle = (int32_t)(((int64_t)b.low + b.high) >> 1);
    int64_t found = not_above(x, size, middle);
    if (found == count) return middle;
    if (found < count) b.low = middle + 1;
    else b.high = middle;
  }
  return b.low;
}

// Floats as integers of the same order; the largest for what stays. See sort_keys.
INLINE void order_scores(const float* scores, const uint8_t* keep, int64_t size, int32_t* keys) {
  for (int64_t i = 0; i < size; ++i) {
    float score = scores[i] + 0.f;  // there is only one zero
    int32_t bits;
    memcpy(&bits, &score, 4);
    bits ^= (bits >> 31) & INT32_MAX;
    keys[i] = keep[i] ? INT32_MAX : bits;
  }
}

// keys, places: memory for [size] each, up to a multiple of W.
static void choose_row(const Lowest& l, int64_t row, int32_t* keys, int32_t* places) {
  uint8_t* chosen = l.chosen + row * l.size;
  int64_t size = l.size, count = smaller(*row_of<int64_t>(l.count, l.sizes, row), l.limit);
  if (count <= 0 || count >= size) {
    memset(chosen, count > 0, size);
    return;
  }
  order_scores(row_of<float>(l.scores, l.sizes, row), row_of<uint8_t>(l.keep, l.sizes, row), size,
               keys);
  int32_t cut = cut_at(keys, size, count);
  int64_t found = not_above(keys, size, cut);
  for (int64_t i = 0; i < size; ++i) chosen[i] = keys[i] <= cut;
  if (found == count) return;
  // Of the entries with this score, those that came first.
  const int64_t* positions = row_of<int64_t>(l.positions, l.sizes, row);
  int64_t equal = 0;
  for (int64_t i = 0; i < size; ++i) {
    places[equal] = (int32_t)smaller(positions[i], INT32_MAX);
    equal += keys[i] == cut;
  }
  int32_t last = cut_at(places, equal, count - (found - equal));
  for (int64_t i = 0; i < size; ++i)
    chosen[i] = keys[i] < cut || (keys[i] == cut && smaller(positions[i], INT32_MAX) <= last);
}

INLINE uint64_t bytes_at(const uint8_t* from, int64_t count) {
  uint64_t word = 0;
  if (count >= 8) memcpy(&word, from, 8);
  else memcpy(&word, from, count);
  return word;
}

// Places of eight that hold, bytes that are 1, join a list of `listed` and at most `limit`: its new
// size.
INLINE int64_t list_places(uint64_t word, int64_t first, int64_t limit, int64_t* list,
                           int64_t listed) {
  for (; word && listed < limit; word &= word - 1)
    list[listed++] = first + __builtin_ctzll(word) / 8;
  return listed;
}

static void pair_row(const Pairs& p, int64_t row) {
  const uint8_t* losers = row_of<uint8_t>(p.losers, p.sizes, row);
  const uint8_t* freed = row_of<uint8_t>(p.freed, p.sizes, row);
  int64_t *source = p.source + row * p.limit, *target = p.target + row * p.limit;
  int64_t sources = 0, targets = 0;
  for (int64_t i = 0; i < p.size; i += 8) {
    uint64_t lost = bytes_at(losers + i, p.size - i), free = bytes_at(freed + i, p.size - i);
    if (lost == free) continue;
    sources = list_places(free & ~lost, i, p.limit, source, sources);
    targets = list_places(lost & ~free, i, p.limit, target, targets);
  }
  for (int64_t i = targets; i < sources; ++i) target[i] = p.size;
  for (int64_t i = sources; i < p.limit; ++i) {
    source[i] = sources ? source[0] : p.spare;
    target[i] = sources ? target[0] : p.spare;
  }
}

static void list_row(const Pairs& p, int64_t row) {
  const uint8_t* mask = row_of<uint8_t>(p.losers, p.sizes, row);
  int64_t *places = p.source + row * p.limit, found = 0;
  for (int64_t i = 0; i < p.size; i += 8)
    found = list_places(bytes_at(mask + i, p.size - i), i, p.limit, places, found);
  for (; found < p.limit; ++found) places[found] = p.size;
}

}  // namespace

extern "C" {

EXPORT int paged_kv_lowest(Lowest* l) {
  int64_t rows = rows_in(l->sizes);
  bool failed = false;
#pragma omp parallel if (rows * l->size > kAlone)
  {
    int64_t size = pieces(l->size, W) * W;
    Scratch memory(8 * size);
#pragma omp critical
    failed |= !memory.data;
#pragma omp barrier
    int32_t* keys = (int32_t*)memory.data;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < (failed ? 0 : rows); ++row)
      choose_row(*l, row, keys, keys + size);
  }
  return failed ? kNoMemory : kFine;
}

EXPORT int paged_kv_pair_moves(Pairs* p) {
  int64_t rows = rows_in(p->sizes);
#pragma omp parallel for schedule(static) if (rows * p->size > 8 * kAlone)
  for (int64_t row = 0; row < rows; ++row) pair_row(*p, row);
  return kFine;
}

// Of p->losers, to p->source.
EXPORT int paged_kv_first_places(Pairs* p) {
  int64_t rows = rows_in(p->sizes);
#pragma omp parallel for schedule(static) if (rows * p->size > 8 * kAlone)
  for (int64_t row = 0; row < rows; ++row) list_row(*p, row);
  return kFine;
}
}
