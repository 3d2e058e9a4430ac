// write, gather, store and move: entries by place.
#pragma once

#include "codecs.h"

namespace {

INLINE Error check_place(const Blocks& b, const Places& p, int64_t i) {
  if (p.layer[i] < 0 || p.layer[i] >= b.layers) return kBadLayer;
  if (p.page[i] < 0 || p.page[i] >= b.pages) return kBadPage;
  if (p.head[i] < 0 || p.head[i] >= b.heads) return kBadHead;
  if (p.offset[i] < 0 || p.offset[i] >= b.layout->page_size) return kBadSlot;
  return kFine;
}

// NOWHERE of kernels/index.py.
INLINE bool is_left_out(const Places& p, int64_t i) { return p.offset[i] == INT64_MIN; }

INLINE Error check_places(Entries& e, const Places& p, bool may_leave_out = false) {
  for (int64_t i = 0; i < e.count; ++i) {
    if (may_leave_out && is_left_out(p, i)) continue;
    Error error = check_place(e.blocks, p, i);
    if (error == kFine) continue;
    const int64_t* found[] = {p.page, p.offset, p.layer, p.head};
    int which = error == kBadPage ? 0 : error == kBadSlot ? 1 : error == kBadLayer ? 2 : 3;
    e.bad_row = i;
    e.bad_value = found[which][i];
    return error;
  }
  return kFine;
}

INLINE uint8_t* place(const Blocks& b, const Places& p, int64_t i) {
  return block_of(b, p.layer[i], p.page[i], p.head[i]);
}

static void write_entry(const Blocks& b, bool value, uint8_t* block, int64_t slot,
                        const void* numbers, int64_t dtype) {
  const Part& part = value ? b.layout->value : b.layout->key;
  alignas(64) uint8_t bytes[kMaxEntryBytes];
  if (part.format == dtype)
    return store_entry(*b.layout, value, block, slot, (const uint8_t*)numbers);
  alignas(64) float x[kMaxEntryBytes / 4];
  to_floats(x, numbers, dtype, part.size);
  encode(part, x, bytes);
  store_entry(*b.layout, value, block, slot, bytes);
}

static void write_token(const Write& w, int64_t token) {
  int64_t page_size = w.blocks.layout->page_size, slot = w.slots[token];
  int64_t width = w.dtype == kFloat32 ? 4 : 2;
  for (int64_t head = 0; slot >= 0 && head < w.blocks.heads; ++head) {
    uint8_t* block = block_of(w.blocks, 0, slot / page_size, head);
    int64_t key = token * w.key_token_stride + head * w.key_head_stride;
    int64_t value = token * w.value_token_stride + head * w.value_head_stride;
    write_entry(w.blocks, false, block, slot % page_size, (const char*)w.keys + key * width,
                w.dtype);
    write_entry(w.blocks, true, block, slot % page_size, (const char*)w.values + value * width,
                w.dtype);
  }
}

}  // namespace

extern "C" {

EXPORT int paged_kv_write(Write* w) {
  int64_t end = w->blocks.pages * w->blocks.layout->page_size;
  for (int64_t token = 0; token < w->tokens; ++token) {
    if (w->slots[token] < end) continue;
    w->bad_row = token;
    w->bad_value = w->slots[token];
    return kBadSlot;
  }
#pragma omp parallel for schedule(static) if (w->tokens * w->blocks.heads >= 64)
  for (int64_t token = 0; token < w->tokens; ++token) write_token(*w, token);
  return kFine;
}

EXPORT int paged_kv_gather(Entries* e) {
  if (Error error = check_places(*e, e->source)) return error;
  const Layout& layout = *e->blocks.layout;
  const Part& part = e->of_values ? layout.value : layout.key;
  // A place is a page here: all of its slots are read.
#pragma omp parallel for schedule(static) if (e->count > 4)
  for (int64_t i = 0; i < e->count; ++i) {
    alignas(64) uint8_t bytes[kMaxEntryBytes];
    const uint8_t* block = place(e->blocks, e->source, i);
    for (int64_t slot = 0; slot < layout.page_size; ++slot) {
      load_entry(layout, e->of_values, block, slot, bytes);
      decode(part, bytes, e->numbers + (i * layout.page_size + slot) * part.size);
    }
  }
  return kFine;
}

EXPORT int paged_kv_store(Entries* e) {
  if (Error error = check_places(*e, e->target, true)) return error;
  const Part& part = e->of_values ? e->blocks.layout->value : e->blocks.layout->key;
#pragma omp parallel for schedule(static) if (e->count >= 64)
  for (int64_t i = 0; i < e->count; ++i)
    if (!is_left_out(e->target, i))
      write_entry(e->blocks, e->of_values, place(e->blocks, e->target, i), e->target.offset[i],
                  e->numbers + i * part.size, kFloat32);
  return kFine;
}

EXPORT int paged_kv_move(Entries* e) {
  if (Error error = check_places(*e, e->source)) return error;
  if (Error error = check_places(*e, e->target)) return error;
#pragma omp parallel for schedule(static) if (e->count >= 64)
  for (int64_t i = 0; i < e->count; ++i) {
    alignas(64) uint8_t bytes[kMaxEntryBytes];
    const Layout& layout = *e->blocks.layout;
    load_entry(layout, e->of_values, place(e->blocks, e->source, i), e->source.offset[i], bytes);
    store_entry(layout, e->of_values, place(e->blocks, e->target, i), e->target.offset[i], bytes);
  }
  return kFine;
}
}
