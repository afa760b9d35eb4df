#include "ivl/token_packing.h"

#include <algorithm>
#include <cstring>
#include <vector>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "ivl/parallel.h"

namespace ivl {
namespace {

constexpr int64_t kBytesPerTask = 64 * 1024;

// From this size on rows are written around the caches: reading what is about to be overwritten costs a third of the
// traffic. Smaller buffers are better left in the cache for the layer that reads them next.
constexpr int64_t kStreamBytes = 24 << 20;

#if defined(__SSE2__)
template <bool kStream>
void copy_lines(char* to, const char* from, int64_t bytes) {
  const int64_t head = std::min<int64_t>(bytes, -reinterpret_cast<uintptr_t>(to) % 64);
  std::memcpy(to, from, head);
  int64_t i = head;
  for (; i + 64 <= bytes; i += 64) {
    const __m128i* source = reinterpret_cast<const __m128i*>(from + i);
    __m128i* target = reinterpret_cast<__m128i*>(to + i);
    __m128i line[4];
    for (int k = 0; k < 4; ++k) line[k] = _mm_loadu_si128(source + k);
    for (int k = 0; k < 4; ++k) kStream ? _mm_stream_si128(target + k, line[k]) : _mm_store_si128(target + k, line[k]);
  }
  std::memcpy(to + i, from + i, bytes - i);
  if (kStream) _mm_sfence();
}

// Not memcpy: its string instructions are slow on some virtual machines.
void copy(char* to, const char* from, int64_t bytes) { copy_lines<false>(to, from, bytes); }
void stream(char* to, const char* from, int64_t bytes) { copy_lines<true>(to, from, bytes); }
#else
void copy(char* to, const char* from, int64_t bytes) { std::memcpy(to, from, bytes); }
void stream(char* to, const char* from, int64_t bytes) { copy(to, from, bytes); }
#endif

// Consecutive placeholders in one batch row: positions [position, position + length) take rows [first, first + length).
struct Run {
  int64_t position, first, length;
};

int64_t find_runs(const RowGrid& grid, const int64_t* ids, int64_t n, int64_t token, std::vector<Run>& runs) {
  int64_t count = 0;
  for (int64_t i = 0; i < n;) {
    const int64_t row_end = std::min(n, (i / grid.columns + 1) * grid.columns);
    while (i < row_end) {
      if (ids[i] != token) {
        ++i;
        continue;
      }
      const int64_t begin = i;
      while (i < row_end && ids[i] == token) ++i;
      runs.push_back({begin, count, i - begin});
      count += i - begin;
    }
  }
  return count;
}

// Calls move(grid row, row index, rows) on stretches that are contiguous on both sides.
template <class F>
void for_stretches(const RowGrid& grid, const std::vector<Run>& runs, int64_t count, F&& move) {
  const int64_t grain = std::max<int64_t>(1, kBytesPerTask / std::max<int64_t>(1, grid.row_bytes));
  const bool contiguous = grid.token_stride == grid.row_bytes;
  parallel_for(count, grain, [&](int64_t begin, int64_t end) {
    auto run = std::upper_bound(runs.begin(), runs.end(), begin, [](int64_t m, const Run& r) { return m < r.first; }) - 1;
    for (int64_t m = begin; m < end; ++run) {
      const int64_t stop = std::min(end, run->first + run->length), step = contiguous ? stop - m : 1;
      for (; m < stop; m += step) move(grid.row(run->position + m - run->first), m, step);
    }
  });
}

// First row of batch row b in the packed buffer, and the range it may pad.
struct Span {
  int64_t begin, end, start;
};

Span span_of(const int64_t* status, int64_t b, int64_t batch, Padding padding, int64_t width) {
  const int64_t length = status[kStatus * b + 1];
  if (padding == Padding::left) return {b * width, (b + 1) * width, (b + 1) * width - length};
  if (padding == Padding::right) return {b * width, (b + 1) * width, b * width};
  int64_t start = 0;
  for (int64_t r = 0; r < b; ++r) start += status[kStatus * r + 1];
  return {start, b + 1 == batch ? width : start + length, start};
}

int64_t tiles_before(const int64_t* status, int64_t b, int64_t full) {
  int64_t tokens = 0;
  for (int64_t r = 0; r < b; ++r) tokens += status[kStatus * r];
  return tokens / full;
}

}  // namespace

int64_t place_rows(RowGrid grid, const int64_t* ids, int64_t n, int64_t token, const char* rows, int64_t count) {
  std::vector<Run> runs;
  const int64_t found = find_runs(grid, ids, n, token, runs);
  const auto move = count * grid.row_bytes < kStreamBytes ? copy : stream;
  if (found == count)
    for_stretches(grid, runs, count, [&](char* to, int64_t m, int64_t step) {
      move(to, rows + m * grid.row_bytes, step * grid.row_bytes);
    });
  return found;
}

int64_t take_rows(RowGrid grid, const int64_t* ids, int64_t n, int64_t token, char* rows, int64_t count) {
  std::vector<Run> runs;
  const int64_t found = find_runs(grid, ids, n, token, runs);
  if (found == count)
    for_stretches(grid, runs, count, [&](const char* from, int64_t m, int64_t step) {
      copy(rows + m * grid.row_bytes, from, step * grid.row_bytes);
    });
  return found;
}

int64_t embed_text(const int64_t* ids, int64_t n, int64_t token, const char* table, int64_t vocabulary, int64_t row_bytes,
                   char* out) {
  std::vector<int64_t> text;
  for (int64_t i = 0; i < n; ++i) {
    if (ids[i] == token) continue;
    if (ids[i] < 0 || ids[i] >= vocabulary) return i;
    text.push_back(i);
  }
  const int64_t grain = std::max<int64_t>(1, kBytesPerTask / std::max<int64_t>(1, row_bytes));
  parallel_for(static_cast<int64_t>(text.size()), grain, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) copy(out + text[k] * row_bytes, table + ids[text[k]] * row_bytes, row_bytes);
  });
  return -1;
}

void pack_scan(PackInput in, bool* keep, int64_t* status) {
  for (int64_t b = 0; b < in.batch; ++b) {
    int64_t count = 0;
    for (int64_t i = b * in.columns; i < (b + 1) * in.columns; ++i) count += in.ids[i] == in.token && in.present(i);
    status[kStatus * b] = count;
  }
  parallel_for(in.batch, std::max<int64_t>(1, 8192 / std::max<int64_t>(1, in.columns)), [&](int64_t from, int64_t to) {
    for (int64_t b = from; b < to; ++b) {
      int64_t tile = tiles_before(status, b, in.full), seen = 0, inside = 0, length = 0, attended = 0, bad_run = -1, bad_id = -1;
      for (int64_t n = 0; n < in.columns; ++n) {
        const int64_t i = b * in.columns + n, id = in.ids[i];
        const bool present = in.present(i), visual = present && id == in.token;
        if (!visual && inside != 0 && bad_run < 0) bad_run = n - 1;
        bool stays = present;
        if (visual) {
          stays = inside < in.small || tile >= in.tiles || !in.compress[tile];
          if (++inside == in.full) inside = 0, ++tile;
          ++seen;
        }
        if (present && bad_id < 0 && (id < 0 || id >= in.vocabulary)) bad_id = n;
        keep[i] = stays;
        length += stays;
        attended += present;
      }
      if (inside != 0 && bad_run < 0) bad_run = in.columns - 1;
      status[kStatus * b + 1] = length;
      status[kStatus * b + 2] = bad_run;
      status[kStatus * b + 3] = bad_id;
      status[kStatus * b + 4] = attended;
    }
  });
}

void pack_write(PackInput in, const bool* keep, const int64_t* status, const int64_t* labels, const float* weights,
                Padding padding, int64_t width, int64_t pad_id, PackOutput out) {
  const auto pad = [&](int64_t begin, int64_t end) {
    std::fill(out.ids + begin, out.ids + end, pad_id);
    std::fill(out.mask + begin, out.mask + end, 0);
    std::fill(out.positions + begin, out.positions + end, 0);
    std::fill(out.kept + begin, out.kept + end, -1);
    if (labels) std::fill(out.labels + begin, out.labels + end, -100);
    if (weights) std::fill(out.weights + begin, out.weights + end, 0.0f);
  };
  parallel_for(in.batch, std::max<int64_t>(1, 8192 / std::max<int64_t>(1, in.columns)), [&](int64_t from, int64_t to) {
    for (int64_t b = from; b < to; ++b) {
      const Span span = span_of(status, b, in.batch, padding, width);
      int64_t tile = tiles_before(status, b, in.full), inside = 0, o = span.start;
      pad(span.begin, span.start);
      for (int64_t i = b * in.columns; i < (b + 1) * in.columns; ++i) {
        if (in.ids[i] == in.token && in.present(i)) {
          if (inside == 0 && tile < in.tiles) out.tile_rows[tile] = o;
          if (++inside == in.full) inside = 0, ++tile;
        }
        if (!keep[i]) continue;
        out.ids[o] = in.ids[i];
        out.mask[o] = 1;
        out.positions[o] = o - span.start;
        out.kept[o] = i;
        if (labels) out.labels[o] = labels[i];
        if (weights) out.weights[o] = weights[i];
        ++o;
      }
      pad(o, span.end);
    }
  });
}

}  // namespace ivl
