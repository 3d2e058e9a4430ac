// All kernels on random sizes, for -fsanitize=address,undefined: every buffer ends where its last
// number does, so that whatever is read or written beyond it is found. Usage: sanitized SEED ROUNDS
#include "kernels.h"

#include <stdio.h>

#include <algorithm>
#include <memory>
#include <random>
#include <vector>

namespace {

std::mt19937_64 source;
int64_t pick(int64_t low, int64_t high) {
  return low + (int64_t)(source() % (uint64_t)(high - low + 1));
}

// Memory of exactly so many bytes, of random bits or of floats.
template <class T>
struct Buffer {
  std::unique_ptr<T[]> data;
  explicit Buffer(int64_t count) : data(new T[count]) {
    for (int64_t i = 0; i < count; ++i)
      data[i] = sizeof(T) == 4 ? (T)((double)pick(-999, 999) / 500) : (T)source();
  }
  operator T*() const { return data.get(); }
};

Part make_part(int64_t format, int64_t size) {
  int64_t bits[] = {32, 16, 16, 8, 4, 8};
  int64_t groups = size / (size % 32 ? 16 : 32);
  int64_t scales = format == kInt4 ? 2 * groups : format == kInt8 || format == kFp8;
  return {format, size, size * bits[format] / 8, scales, format == kInt4 ? size & -size : 1};
}

Layout make_layout(int64_t format, int64_t key_size, int64_t value_size, int64_t page_size) {
  Layout l{make_part(format, key_size), make_part(format, value_size), page_size, 0, 0, 0, 0};
  l.value_offset = page_size * l.key.data_bytes;
  l.key_scale_offset = l.value_offset + page_size * l.value.data_bytes;
  l.value_scale_offset = l.key_scale_offset + 2 * page_size * l.key.num_scales;
  l.block_bytes = l.value_scale_offset + 2 * page_size * l.value.num_scales;
  return l;
}

Blocks make_blocks(const Layout& l, uint8_t* data, int64_t pages, int64_t heads) {
  return {data, &l, 1, pages, heads, 0, heads * l.block_bytes, l.block_bytes};
}

int64_t any_size() { return 16 * pick(1, 9); }
void expect(bool holds, const char* what) {
  if (holds) return;
  fprintf(stderr, "%s\n", what);
  exit(1);
}

void attend_round() {
  int64_t key_size = any_size(), value_size = any_size(), page_size = 16 * pick(1, 8);
  int64_t rows = pick(1, 4), kv_heads = pick(1, 3), group = pick(1, 10), dtype = pick(0, 2);
  Layout layouts[2] = {make_layout(pick(0, 5), key_size, value_size, page_size),
                       make_layout(dtype, key_size, value_size, 16 * pick(1, 8))};
  Attend a{};
  a.num_segments = pick(1, 2);
  std::vector<int32_t> counts[2], starts{0};
  int64_t longest = 0, pages = pick(1, 6);
  for (int64_t row = 0; row < rows; ++row) {
    for (auto& own : counts) own.push_back((int32_t)pick(0, 700));
    longest = larger(longest, counts[0][row] + counts[1][row]);
    starts.push_back(starts[row] + (int32_t)(pick(0, 1) ? 1 : pick(0, 40)));
  }
  std::vector<std::vector<int32_t>> tables;
  std::vector<Buffer<uint8_t>> blocks;
  for (int64_t s = 0; s < 2; ++s) {
    int64_t columns = pieces(longest, layouts[s].page_size) + 1;
    tables.emplace_back(rows * columns);
    for (auto& page : tables[s]) page = (int32_t)pick(0, pages - 1);
    blocks.emplace_back(pages * kv_heads * layouts[s].block_bytes);
    Blocks own = make_blocks(layouts[s], blocks[s], pages, kv_heads);
    a.segments[s] = {own, tables[s].data(), columns, columns, counts[s].data()};
  }
  a.tokens = starts[rows], a.rows = rows, a.heads = group * kv_heads, a.kv_heads = kv_heads;
  int64_t width = dtype == kFloat32 ? 4 : 2;
  Buffer<uint8_t> queries(a.tokens * a.heads * key_size * width);
  Buffer<uint8_t> output(a.tokens * a.heads * value_size * width);
  Buffer<float> sinks(a.heads), weights(pages * kv_heads * page_size);
  Buffer<float> scores(pages * kv_heads * page_size);
  a.output = output, a.queries = queries, a.dtype = dtype, a.starts = starts.data();
  a.query_head_stride = key_size, a.query_token_stride = a.heads * key_size;
  a.output_head_stride = value_size, a.output_token_stride = a.heads * value_size;
  a.scale = 0.1, a.softcap = pick(0, 1) * 3.0, a.sinks = pick(0, 1) ? sinks.data.get() : nullptr;
  if (pick(0, 1)) a.weights = {weights, pages, kv_heads * page_size, page_size};
  if (pick(0, 1)) a.scores = {scores, pages, kv_heads * page_size, page_size};
  a.decay = pick(0, 1) ? 1.0 : 0.9;
  expect(paged_kv_attend(&a) == kFine, "attend");
  tables[0][0] = (int32_t)pages;
  bool unused = counts[0][0] == 0;
  expect(paged_kv_attend(&a) == (unused ? kFine : kBadPage) || a.num_segments == 2, "bad page");
}

void entries_round() {
  int64_t pages = pick(1, 4), heads = pick(1, 3), tokens = pick(0, 90), dtype = pick(0, 2);
  Layout l = make_layout(pick(0, 5), any_size(), any_size(), 16 * pick(1, 8));
  Buffer<uint8_t> data(pages * heads * l.block_bytes);
  Blocks blocks = make_blocks(l, data, pages, heads);
  int64_t width = dtype == kFloat32 ? 4 : 2, key = l.key.size, value = l.value.size;
  Buffer<uint8_t> keys(tokens * heads * key * width), values(tokens * heads * value * width);
  std::vector<int64_t> slots;
  for (int64_t i = 0; i < tokens; ++i) slots.push_back(pick(-1, pages * l.page_size - 1));
  std::vector<int64_t> same(slots);  // one thread may write a slot only
  std::sort(same.begin(), same.end());
  if (std::unique(same.begin(), same.end()) == same.end()) {
    Write w{blocks, keys, values, dtype, heads * key, key, heads * value, value,
            slots.data(), tokens, 0, 0};
    expect(paged_kv_write(&w) == kFine, "write");
  }
  for (int64_t of_values = 0; of_values < 2; ++of_values) {
    int64_t size = of_values ? value : key, zero = 0, page = pages - 1, head = heads - 1;
    int64_t offset = l.page_size - 1;
    Places first{&zero, &zero, &zero, &zero}, last{&zero, &page, &head, &offset};
    Buffer<float> numbers(l.page_size * size);
    Entries e{blocks, of_values, 1, last, first, numbers, 0, 0};
    expect(paged_kv_move(&e) == kFine && paged_kv_gather(&e) == kFine, "move, gather");
    Buffer<float> one(size);
    e.numbers = one, e.target = last;
    expect(paged_kv_store(&e) == kFine, "store");
    offset = l.page_size;
    expect(paged_kv_store(&e) == kBadSlot, "bad slot");
  }
}

void mass_round() {
  int64_t heads = pick(1, 3), group = pick(1, 4), queries = group * pick(1, 20);
  int64_t entries = pick(1, 300), size = any_size();
  Buffer<float> q(heads * queries * size), k(heads * entries * size), sinks(heads * group);
  Buffer<float> mass(heads * entries);
  std::vector<int64_t> asked(heads * queries), held(heads * entries);
  for (auto& place : asked) place = pick(-1, 300);
  for (auto& place : held) place = pick(0, 9) ? pick(0, 300) : INT64_MAX;
  Mass m{q, k, pick(0, 1) ? sinks.data.get() : nullptr, asked.data(), held.data(), mass,
         heads, queries, entries, size, group, pick(0, 1), 0.1, pick(0, 1) * 2.0};
  expect(paged_kv_attention_mass(&m) == kFine, "mass");
}

void select_round() {
  int64_t first = pick(1, 2), middle = pick(1, 2), last = pick(1, 3), size = pick(1, 300);
  int64_t rows = first * middle * last, limit = pick(0, size);
  Buffer<float> scores(rows * size);
  std::vector<int64_t> positions(size), counts(rows);
  for (auto& position : positions) position = pick(0, 9) ? pick(0, 99) : INT64_MAX;
  for (auto& count : counts) count = pick(-1, size + 1);  // also more than may be chosen
  Buffer<uint8_t> keep(size), lost(rows * size), chosen(rows * size);
  for (int64_t i = 0; i < size; ++i) keep[i] &= 1, scores[i] = (float)pick(-1, 1);
  for (int64_t i = 0; i < rows * size; ++i) lost[i] &= 1;
  int64_t strides[] = {middle * last * size, last * size, size};
  Rows all{scores, {strides[0], strides[1], strides[2]}}, losers = all;
  Rows one{positions.data(), {0, 0, 0}}, kept{keep, {0, 0, 0}};
  Rows wanted{counts.data(), {middle * last, last, 1}};
  Lowest l{all, one, kept, wanted, chosen, {first, middle, last}, size, limit};
  expect(paged_kv_lowest(&l) == kFine, "lowest");
  losers.data = lost;
  Buffer<int64_t> source(rows * limit), target(rows * limit);
  Pairs p{losers, kept, source, target, {first, middle, last}, size, limit, size - 1};
  expect(paged_kv_pair_moves(&p) == kFine && paged_kv_first_places(&p) == kFine, "moves");
}

}  // namespace

int main(int, char** arguments) {
  source.seed((uint64_t)atoll(arguments[1]));
  for (int64_t round = 0; round < atoll(arguments[2]); ++round) {
    attend_round();
    entries_round();
    mass_round();
    select_round();
  }
}
