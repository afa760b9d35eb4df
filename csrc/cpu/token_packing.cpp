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
constexpr int64_t kTextBytes = 512 * 1024;  // scattered rows of a table in memory: a second thread gains little

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
    auto run =
        std::upper_bound(runs.begin(), runs.end(), begin, [](int64_t m, const Run& r) { return m < r.first; }) - 1;
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

int64_t embed_text(const int64_t* ids, int64_t n, int64_t token, const char* table, int64_t vocabulary,
                   int64_t row_bytes, char* out) {
  std::vector<int64_t> text;
  for (int64_t i = 0; i < n; ++i) {
    if (ids[i] == token) continue;
    if (ids[i] < 0 || ids[i] >= vocabulary) return i;
    text.push_back(i);
  }
  const int64_t grain = std::max<int64_t>(1, kTextBytes / std::max<int64_t>(1, row_bytes));
  parallel_for(static_cast<int64_t>(text.size()), grain, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) copy(out + text[k] * row_bytes, table + ids[text[k]] * row_bytes, row_bytes);
  });
  return -1;
}

namespace {

// One row: keep, its status, and the tiles' first rows counted from the row's own start.
void scan_row(const PackInput& in, int64_t b, int64_t tile, bool* keep, int64_t* status, int64_t* tile_rows) {
  const int64_t first = b * in.columns;
  const auto visual = [&](int64_t n) { return in.ids[first + n] == in.token && in.present(first + n); };
  const auto known = [&](int64_t id) { return id >= 0 && id < in.vocabulary; };
  int64_t seen = 0, length = 0, attended = 0, bad_run = -1, bad_id = -1;
  for (int64_t n = 0; n < in.columns;) {
    const int64_t begin = n;
    while (n < in.columns && visual(n)) ++n;
    if (n == begin) {
      const bool present = in.present(first + n);
      if (present && bad_id < 0 && !known(in.ids[first + n])) bad_id = n;
      keep[first + n++] = present;
      length += present;
      attended += present;
      continue;
    }
    if (bad_id < 0 && !known(in.token)) bad_id = begin;
    if (bad_run < 0 && (n - begin) % in.full) bad_run = n - 1;
    for (int64_t k = begin; k < n; k += in.full, ++tile) {
      const int64_t size = std::min(in.full, n - k);
      const int64_t stays = tile < in.tiles && in.compress[tile] ? std::min(in.small, size) : size;
      if (tile < in.tiles) tile_rows[tile] = length;
      std::fill_n(keep + first + k, stays, true);
      std::fill_n(keep + first + k + stays, size - stays, false);
      length += stays;
    }
    seen += n - begin;
    attended += n - begin;
  }
  const int64_t found[kStatus] = {seen, length, bad_run, bad_id, attended};
  std::copy_n(found, kStatus, status + b * kStatus);
}

void write_row(const PackInput& in, const Span& span, int64_t b, int64_t tile, int64_t tiles, int64_t pad_id,
               const bool* keep, int64_t* integers, int64_t plane, float* weights, int64_t* tile_rows) {
  int64_t* ids = integers;
  int64_t *mask = ids + plane, *positions = mask + plane, *kept = positions + plane, *labels = kept + plane;
  const auto pad = [&](int64_t begin, int64_t end) {
    std::fill(ids + begin, ids + end, pad_id);
    std::fill(mask + begin, mask + end, 0);
    std::fill(positions + begin, positions + end, 0);
    std::fill(kept + begin, kept + end, -1);
    if (in.labels) std::fill(labels + begin, labels + end, -100);
    if (in.weights) std::fill(weights + begin, weights + end, 0.0f);
  };
  for (int64_t t = tile; t < tile + tiles; ++t) tile_rows[t] += span.start;
  pad(span.begin, span.start);
  int64_t o = span.start;
  for (int64_t i = b * in.columns, end = i + in.columns; i < end; ++i) {
    const int64_t begin = i;
    while (i < end && keep[i]) ++i;
    const int64_t count = i - begin;
    std::copy_n(in.ids + begin, count, ids + o);
    std::fill_n(mask + o, count, 1);
    for (int64_t k = 0; k < count; ++k) positions[o + k] = o - span.start + k;
    for (int64_t k = 0; k < count; ++k) kept[o + k] = begin + k;
    if (in.labels) std::copy_n(in.labels + begin, count, labels + o);
    if (in.weights) std::copy_n(in.weights + begin, count, weights + o);
    o += count;
  }
  pad(o, span.end);
}

}  // namespace

int64_t pack_tokens(PackInput in, Padding padding, bool capacity, int64_t pad_id, bool* keep, int64_t* status,
                    int64_t* integers, float* weights, int64_t* tile_rows) {
  // Rows follow each other where they are few: then each knows how many tiles come before. In parallel they are
  // counted.
  const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, in.columns));
  if (in.batch > grain)
    parallel_for(in.batch, grain, [&](int64_t from, int64_t to) {
      for (int64_t b = from; b < to; ++b) {
        int64_t count = 0;
        for (int64_t i = b * in.columns; i < (b + 1) * in.columns; ++i) count += in.ids[i] == in.token && in.present(i);
        status[kStatus * b] = count;
      }
    });
  parallel_for(in.batch, grain, [&](int64_t from, int64_t to) {
    for (int64_t b = from; b < to; ++b) scan_row(in, b, tiles_before(status, b, in.full), keep, status, tile_rows);
  });
  int64_t longest = 0, all = 0, tiles = 0;
  for (int64_t b = 0; b < in.batch; ++b) {
    const int64_t* s = status + b * kStatus;
    if (s[2] >= 0 || s[3] >= 0) return -1;
    longest = std::max(longest, s[1]);
    all += s[1];
    tiles += s[0] / in.full;
  }
  if (tiles != in.tiles) return -1;
  const bool flat = padding == Padding::none;
  const int64_t width = capacity ? in.columns * (flat ? in.batch : 1) : flat ? all : longest;
  parallel_for(in.batch, grain, [&](int64_t from, int64_t to) {
    for (int64_t b = from; b < to; ++b)
      write_row(in, span_of(status, b, in.batch, padding, width), b, tiles_before(status, b, in.full),
                status[kStatus * b] / in.full, pad_id, keep, integers, flat ? width : width * in.batch, weights,
                tile_rows);
  });
  return width;
}

}  // namespace ivl
