// Kernels of tile_image for one instruction set. Pillow resizes along x, rounds to 8 bits, then along y, and rounds
// again; both roundings clip, so their order is part of the result. Its arithmetic is exact: integers, weights of 22
// bits. So is this, or a tie that falls otherwise in a row of equal pixels would show as two levels.
//
// Along x a vector holds one column of kLanes rows; along y, neighbours of one row. What lies between the two passes
// is planar, so that the second one writes whole vectors of a tile.

namespace ivl::IVL_NAMESPACE {
namespace {

constexpr int64_t kBand = 8;  // result rows of a task along y

// For each result: where its taps begin, how many, and their weights (`most` apart).
struct Taps {
  int64_t most = 0;
  std::vector<int64_t> first, count;
  std::vector<int32_t> weight;  // in units of 2^-kBits
};

constexpr int kBits = 22;

// a = -0.5, Pillow's.
inline double bicubic(double x) {
  x = std::abs(x);
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  if (x < 2) return ((-0.5 * x + 2.5) * x - 4) * x + 2;
  return 0;
}

inline Taps taps(int64_t from, int64_t to) {
  const double scale = static_cast<double>(from) / to, stretch = std::max(scale, 1.0), support = 2 * stretch;
  Taps result;
  result.most = static_cast<int64_t>(std::ceil(support)) * 2 + 1;
  result.first.resize(to);
  result.count.resize(to);
  result.weight.resize(to * result.most);
  std::vector<double> values(result.most);
  for (int64_t i = 0; i < to; ++i) {
    const double center = (i + 0.5) * scale;
    const int64_t first = std::max<int64_t>(0, static_cast<int64_t>(center - support + 0.5));
    const int64_t last = std::min(from, static_cast<int64_t>(center + support + 0.5));
    double total = 0;
    for (int64_t k = 0; k < last - first; ++k)
      total += values[k] = bicubic((k + first - center + 0.5) / stretch);
    for (int64_t k = 0; k < last - first; ++k)
      result.weight[i * result.most + k] = static_cast<int32_t>(std::round(values[k] / total * (1 << kBits)));
    result.first[i] = first;
    result.count[i] = last - first;
  }
  return result;
}

// Not __builtin_convertvector alone: GCC takes bytes one by one.
inline vu widened(const uint8_t* p) {
#if IVL_VECTOR_BYTES == 64
  return (vu)_mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif IVL_VECTOR_BYTES == 32
  return (vu)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  Vec<uint8_t, kLanes> bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(bytes, vu);
#endif
}

inline vu load(const uint32_t* p) {
  vu v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void transpose(vu (&v)[kLanes]) {
  vf moved[kLanes];
  std::memcpy(moved, v, sizeof v);
  transpose(moved);
  std::memcpy(v, moved, sizeof v);
}

// Of a sum of weighted levels: the nearest level, halves up.
inline vi level(vu sum) {
  const vi v = (vi)(sum + (1u << (kBits - 1))) >> kBits, low = {}, high = vi{} + 255;
  const vi positive = v < low ? low : v;
  return positive > high ? high : positive;
}

inline void put_levels(uint8_t* p, vu sum, int64_t n) {
#if IVL_VECTOR_BYTES == 64
  const __m128i bytes = _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)level(sum));
#elif IVL_VECTOR_BYTES == 32
  const __m256i both = (__m256i)level(sum);
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
  const __m128i bytes = _mm_packus_epi16(words, words);
#else
  const Vec<uint8_t, kLanes> bytes = __builtin_convertvector(level(sum), Vec<uint8_t, kLanes>);
#endif
  if (n == kLanes) {
    std::memcpy(p, &bytes, kLanes);
  } else {
    std::memcpy(p, &bytes, n);
  }
}

// One of the two pictures made of a photograph: the grid of tiles, or the thumbnail.
struct Target {
  int64_t columns, rows, first_tile;  // in tiles
  int64_t width;
  Taps x, y;
  uint8_t* between;  // [3, photograph rows, width]
};

// kLanes rows of a photograph from `row` on, transposed: [width * 3][kLanes]. Rows past the last repeat it.
inline void transposed(const TileImageArgs& args, const uint8_t* photo, int64_t row, uint32_t* out) {
  const uint8_t* p[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) p[i] = photo + std::min(row + i, args.height - 1) * args.row_stride;
  const int64_t n = args.width * 3;
  vu v[kLanes];
  int64_t at = 0;
  for (; at + kLanes <= n; at += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) v[i] = widened(p[i] + at);
    transpose(v);
    std::memcpy(out + at * kLanes, v, sizeof v);
  }
  for (; at < n; ++at)
    for (int64_t i = 0; i < kLanes; ++i) out[at * kLanes + i] = p[i][at];
}

// The rows of a strip, resized along x.
inline void along_x(const TileImageArgs& args, const Target& target, int64_t row, const uint32_t* strip) {
  const int64_t count = std::min<int64_t>(kLanes, args.height - row), plane = args.height * target.width;
  for (int64_t x = 0; x < target.width; x += kLanes) {
    const int64_t n = std::min<int64_t>(kLanes, target.width - x);
    vu v[3][kLanes] = {};
    for (int64_t i = 0; i < n; ++i) {
      const int32_t* w = target.x.weight.data() + (x + i) * target.x.most;
      const uint32_t* column = strip + target.x.first[x + i] * 3 * kLanes;
      vu sums[3] = {};
      for (int64_t k = 0; k < target.x.count[x + i]; ++k, column += 3 * kLanes) {
        const vu weight = vu{} + static_cast<uint32_t>(w[k]);
        for (int c = 0; c < 3; ++c) sums[c] += weight * load(column + c * kLanes);
      }
      for (int c = 0; c < 3; ++c) v[c][i] = sums[c];
    }
    for (int c = 0; c < 3; ++c) {
      transpose(v[c]);
      uint8_t* to = target.between + c * plane + row * target.width + x;
      for (int64_t i = 0; i < count; ++i) put_levels(to + i * target.width, v[c][i], n);
    }
  }
}

// One row of a target, resized along y and normalised, into the row of each of its tiles.
template <class T>
void along_y(const TileImageArgs& args, const Target& target, int64_t y, T* out) {
  const int64_t tile = args.tile, height = args.height;
  const int32_t* w = target.y.weight.data() + y * target.y.most;
  const int64_t taps = target.y.count[y];
  for (int c = 0; c < 3; ++c) {
    const uint8_t* rows = target.between + (c * height + target.y.first[y]) * target.width;
    const vf scale = splat(args.scale[c]), shift = splat(args.shift[c]);
    for (int64_t column = 0; column < target.columns; ++column) {
      const int64_t which = target.first_tile + y / tile * target.columns + column;
      T* to = out + ((which * 3 + c) * tile + y % tile) * tile;
      const uint8_t* from = rows + column * tile;
      const auto finish = [&](vu sum) { return fma(__builtin_convertvector(level(sum), vf), scale, shift); };
      int64_t x = 0;
      for (; x + 4 * kLanes <= tile; x += 4 * kLanes) {
        vu sums[4] = {};
        for (int64_t k = 0; k < taps; ++k)
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i)
            sums[i] += static_cast<uint32_t>(w[k]) * widened(from + k * target.width + x + i * kLanes);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) store(to + x + i * kLanes, finish(sums[i]));
      }
      for (; x < tile; x += kLanes) {
        const int64_t n = std::min<int64_t>(kLanes, tile - x);
        vu sum = {};
        for (int64_t k = 0; k < taps; ++k) {
          uint8_t levels[kLanes] = {};
          std::memcpy(levels, from + k * target.width + x, n);
          sum += static_cast<uint32_t>(w[k]) * widened(levels);
        }
        store_some(to + x, finish(sum), n);
      }
    }
  }
}

template <class T>
void tile_image(const TileImageArgs& args) {
  const int64_t tile = args.tile, tiles = args.columns * args.rows;
  std::vector<Target> targets;
  int64_t bytes = 0;
  for (int i = 0; i < 1 + args.thumbnail; ++i) {
    Target t = {};
    t.columns = i ? 1 : args.columns;
    t.rows = i ? 1 : args.rows;
    t.first_tile = i ? tiles : 0;
    t.width = t.columns * tile;
    t.x = taps(args.width, t.width);
    t.y = taps(args.height, t.rows * tile);
    bytes += 3 * args.height * t.width;
    targets.push_back(std::move(t));
  }
  Scratch<uint8_t> between(bytes);
  for (int64_t i = 0, at = 0; i < static_cast<int64_t>(targets.size()); ++i) {
    targets[i].between = between.get() + at;
    at += 3 * args.height * targets[i].width;
  }
  const int64_t strips = (args.height + kLanes - 1) / kLanes, bands = (args.rows * tile + kBand - 1) / kBand;
  const int64_t more = args.thumbnail ? (tile + kBand - 1) / kBand : 0;
  for (int64_t frame = 0; frame < args.frames; ++frame) {
    const uint8_t* photo = args.photos + frame * args.frame_stride;
    T* out = static_cast<T*>(args.out) + frame * (tiles + args.thumbnail) * 3 * tile * tile;
    run_tasks(strips, [&](int64_t strip) {
      Scratch<uint32_t> columns(args.width * 3 * kLanes);
      transposed(args, photo, strip * kLanes, columns.get());
      for (const Target& target : targets) along_x(args, target, strip * kLanes, columns.get());
    });
    run_tasks(bands + more, [&](int64_t task) {
      const Target& target = targets[task >= bands];
      const int64_t begin = (task - (task >= bands ? bands : 0)) * kBand;
      for (int64_t y = begin; y < std::min(begin + kBand, target.rows * tile); ++y) along_y(args, target, y, out);
    });
  }
}

}  // namespace
}  // namespace ivl::IVL_NAMESPACE
