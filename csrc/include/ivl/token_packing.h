// Token packing: which tokens stay when tiles are compressed, and visual rows into placeholder positions.
// Rows are moved as bytes, so one kernel serves every dtype.
#pragma once

#include <cstdint>

namespace ivl {

// A [batch, columns] grid of rows of `row_bytes`; row p is in batch p / columns, column p % columns. Strides in bytes.
struct RowGrid {
  char* base;
  int64_t columns, batch_stride, token_stride, row_bytes;

  char* row(int64_t p) const { return base + (p / columns) * batch_stride + (p % columns) * token_stride; }
};

// ids [n], one for each row of the grid. The rows where ids == token are filled with rows [count, row_bytes], in order.
// Returns how many there are; when that is not `count`, nothing is written.
int64_t place_rows(RowGrid grid, const int64_t* ids, int64_t n, int64_t token, const char* rows, int64_t count);

// The reverse: the rows of the grid where ids == token into rows.
int64_t take_rows(RowGrid grid, const int64_t* ids, int64_t n, int64_t token, char* rows, int64_t count);

// Row i of out [n, row_bytes] = row ids[i] of table [vocabulary, row_bytes], but where ids == token nothing is written.
// Returns the first position with an id out of range, or -1; then nothing is written at all.
int64_t embed_text(const int64_t* ids, int64_t n, int64_t token, const char* table, int64_t vocabulary,
                   int64_t row_bytes, char* out);

// What is packed: ids [batch, columns]; mask and long_mask the same, not both, or null (all true); compress [tiles]. A
// tile is `full` consecutive placeholders of which the first `small` stay when it is compressed. Ids outside
// [0, vocabulary) are reported. Labels and weights are [batch, columns] or null.
struct PackInput {
  const int64_t* ids;
  const bool* mask;
  const int64_t* long_mask;
  const bool* compress;
  const int64_t* labels;
  const float* weights;
  int64_t batch, columns, tiles, token, full, small, vocabulary;

  bool present(int64_t i) const { return mask ? mask[i] : long_mask ? long_mask[i] != 0 : true; }
};

enum class Padding { left = 0, right = 1, none = 2 };

// keep [batch, columns]. status [batch, 5]: placeholders, kept tokens, column where a run ends that is not a multiple
// of `full` (or -1), column of an id out of range (or -1), tokens present. integers: planes of the packed ids, mask,
// positions, index in the input (-1 where padding) and labels if there are any, each [batch, width], or [width] when
// padding is none; tile_rows [tiles]: first row of each tile in such a plane. In capacity mode width is what `columns`
// needs, else what the longest row, or all of them, need. Returns the width, or -1 where the status is wrong; then only
// keep and status are valid.
constexpr int64_t kStatus = 5;
int64_t pack_tokens(PackInput in, Padding padding, bool capacity, int64_t pad_id, bool* keep, int64_t* status,
                    int64_t* integers, float* weights, int64_t* tile_rows);

}  // namespace ivl
