// Experts in few bits for one instruction set; see foreach_isa.h. The forward and the backward are those of plain experts.
#include "ivl/moe_experts_backward_kernels.h"

#include "ivl/gemm/blocks.h"

namespace ivl::IVL_NAMESPACE {
namespace {

// BlockExperts of one format, with the shape of their matrices.
template <class T, class Format>
struct ExpertBlocks {
  BlockMatrix<Format> gate_up, down;  // of expert 0; the others lie behind it
  int64_t gate_up_rows, down_rows;
  bool interleaved;
  const T* gate_up_bias;
  const T* down_bias;

  ExpertBlocks(const BlockExperts<T>& from, ExpertShape shape)
      : gate_up{from.gate_up, static_cast<const typename Format::Scale*>(from.gate_up_scales), shape.width},
        down{from.down, static_cast<const typename Format::Scale*>(from.down_scales), shape.inner},
        gate_up_rows(2 * shape.inner), down_rows(shape.width), interleaved(from.interleaved),
        gate_up_bias(from.gate_up_bias), down_bias(from.down_bias) {}

  static BlockMatrix<Format> matrix_of(const BlockMatrix<Format>& first, int64_t rows, int64_t e) {
    const int64_t scale_rows = (rows + Format::kScaleRows - 1) / Format::kScaleRows;
    return {first.values + e * rows * first.bytes(first.depth), first.scales + e * scale_rows * first.scale_columns(),
            first.depth};
  }
  BlockMatrix<Format> gate_up_of(int64_t e) const { return matrix_of(gate_up, gate_up_rows, e); }
  BlockMatrix<Format> down_of(int64_t e) const { return matrix_of(down, down_rows, e); }
};

template <class T, class Format>
BlockPanel<Format> up_panel(const ExpertBlocks<T, Format>& experts, const BlockMatrix<Format>& m, ExpertShape shape,
                            int64_t panel) {
  const int64_t column = panel * kHalf, n = std::min(kHalf, shape.inner - column);
  if constexpr (Format::kScaleRows == 1)
    if (experts.interleaved) return block_panel(m, 2 * column, n, 2 * column + 1, n, 2);
  return block_panel(m, column, n, shape.inner + column, n, 1);
}
template <class Format>
BlockPanel<Format> down_panel(const BlockMatrix<Format>& m, ExpertShape shape, int64_t panel) {
  const int64_t column = panel * kPanel, n = shape.width - column;
  return block_panel(m, column, std::min(kHalf, n), column + kHalf, std::min(kHalf, n - kHalf), 1);
}

template <class T, class Format, class F>
void with_up_panels(const ExpertBlocks<T, Format>& experts, ExpertShape shape, int64_t e, int64_t panel, F&& f) {
  const BlockMatrix<Format> m = experts.gate_up_of(e);
  f([&](int64_t p) { return up_panel(experts, m, shape, panel + p); });
}
template <class T, class Format, class F>
void with_down_panels(const ExpertBlocks<T, Format>& experts, ExpertShape shape, int64_t e, int64_t panel, F&& f) {
  const BlockMatrix<Format> m = experts.down_of(e);
  f([&](int64_t p) { return down_panel(m, shape, panel + p); });
}
template <class T, class Format>
const uint8_t* up_start(const ExpertBlocks<T, Format>& experts, ExpertShape shape, int64_t e, int64_t panel) {
  return up_panel(experts, experts.gate_up_of(e), shape, panel).first;
}
template <class T, class Format>
const uint8_t* down_start(const ExpertBlocks<T, Format>& experts, ExpertShape shape, int64_t e, int64_t panel) {
  return down_panel(experts.down_of(e), shape, panel).first;
}
template <class T, class Format>
bool in_columns(const ExpertBlocks<T, Format>&) { return false; }

template <class T, class Format, class F>
void with_down_turned(const ExpertBlocks<T, Format>& experts, ExpertShape shape, int64_t e, int64_t panel, F&& f) {
  const BlockMatrix<Format> m = experts.down_of(e);
  f([&](int64_t p) {
    const int64_t column = (panel + p) * kPanel;
    return BlockColumns<Format>{m, column, std::min(kPanel, shape.inner - column)};
  });
}
// Both orders of gate_up's rows are that of `pre`: one product goes through all of them.
template <class T, class Format, class F>
void with_up_turned(const ExpertBlocks<T, Format>& experts, ExpertShape shape, int64_t e, int64_t panel, F&& f) {
  const BlockMatrix<Format> m = experts.gate_up_of(e);
  f(2 * shape.inner, int64_t{0}, [&](int64_t p) {
    const int64_t column = (panel + p) * kPanel;
    return BlockColumns<Format>{m, column, std::min(kPanel, shape.width - column)};
  });
}
template <class T, class Format>
bool turned_in_columns(const ExpertBlocks<T, Format>&) { return true; }

// f(args) with the experts in the view of their format.
template <class T, class F>
void with_blocks(const BlockArgs<T>& args, F&& f) {
  if (args.experts.format == BlockFormat::mxfp4) f(args.with_experts(ExpertBlocks<T, Mxfp4>(args.experts, args.shape)));
  else f(args.with_experts(ExpertBlocks<T, Fp8>(args.experts, args.shape)));
}

template <class T>
void forward_blocks(const BlockArgs<T>& args, T* out, T* pre) {
  with_blocks(args, [&](const auto& blocks) { forward(blocks, out, pre); });
}

template <class T>
void backward_blocks(const BlockArgs<T>& args, const T* grad, const T* pre, const ExpertGradients<T>& to) {
  with_blocks(args, [&](const auto& blocks) { backward(blocks, grad, pre, to); });
}

}  // namespace
}  // namespace ivl::IVL_NAMESPACE
