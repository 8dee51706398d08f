// Softmax statistics and gradients of hidden_states @ lm_head_weight.T, in tiles that stay in cache.
//
//   forward   weight panel, packed once, reused by all rows -> tile of raw logits -> states
//   backward  panel of raw logits -> dz in its place -> dW panel; then dX from all panels
//
// Panels are shared by the threads; the states of blocks of panels are merged in block order, and
// every product has the same shape. Results depend neither on threads nor on the other rows.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <utility>

#include "linear.h"

namespace codistill {
namespace {

// States of rows [first, last) over a block of panels. raw: [panels][rows.padded][kPanel], or null.
template <typename T, typename W>
void block_states(const Rows& rows, const Weight& shape, const T* x, int64_t stride_x, const W* weight,
                  const float* bias, int64_t block, int64_t first, int64_t last, float* raw,
                  State* states) {
  std::vector<uint32_t> packed(packed_words<T>(stride_x, kPanel));
  std::vector<float> tile(raw == nullptr ? kRows * kPanel : 0);
  const int64_t stop = std::min((block + 1) * kBlock, shape.panels);
  std::fill(states + first, states + std::min(last, rows.count), empty_state());
  for (int64_t panel = block * kBlock; panel < stop; ++panel) {
    const int64_t column = panel * kPanel, valid = shape.valid(panel);
    pack_transposed<T>(weight + column * shape.hidden, valid, shape.hidden, stride_x, kPanel,
                       packed.data());
    for (int64_t row = first; row < last; row += kRows) {
      float* c = raw == nullptr ? tile.data() : raw + (panel * rows.padded + row) * kPanel;
      multiply_panel<T>(stride_x, x + row * stride_x, packed.data(), c);
      for (int64_t i = row; i < std::min(row + kRows, rows.count); ++i, c += kPanel) {
        if (bias != nullptr)
          for (int64_t j = 0; j < valid; ++j) c[j] += bias[column + j];
        const int64_t target = rows.target(i, column, valid);
        states[i] = merge(states[i], row_state(c, valid, rows.scale(i), target));
      }
    }
  }
  release<T>();
}

template <typename T, typename W>
void forward(const Rows& rows, const Weight& shape, const T* x, int64_t stride_x, const W* weight,
             const float* bias, float* raw, float* out) {
  const int64_t blocks = num_blocks(shape.panels);
  std::vector<State> states(blocks * rows.count);
  for_blocks(blocks, rows.padded, [&](int64_t block, int64_t first, int64_t last) {
    block_states(rows, shape, x, stride_x, weight, bias, block, first, last, raw,
                 states.data() + block * rows.count);
  });
  for (int64_t row = 0; row < rows.count; ++row) {
    State state = states[row];
    for (int64_t block = 1; block < blocks; ++block)
      state = merge(state, states[block * rows.count + row]);
    const float parts[] = {state.sum.max, state.sum.rest, state.weighted, state.target};
    for (int64_t i = 0; i < 4; ++i) out[i * rows.count + row] = parts[i];
  }
}

// One panel of raw logits becomes dz, as T, from the panel's start on: row i comes from raw row
// kept[i] >= i, so nothing is overwritten before it is read. db: [kPanel] sums, or null.
// The target's entry, often as large as all others together, goes to at_target [rows] unrounded and is
// left out of dz.
template <typename T>
void panel_gradients(const Rows& rows, const int64_t* kept, const float* coefficients,
                     const float* log_softmax, int64_t column, int64_t valid, float* panel,
                     float* at_target, float* db) {
  alignas(64) float dz[kPanel];
  T* out = reinterpret_cast<T*>(panel);
  const int64_t n = rows.count;
  for (int64_t i = 0; i < n; ++i, out += kPanel) {
    const Coefficients c{coefficients[i],    coefficients[n + i], coefficients[2 * n + i],
                         log_softmax[i],     log_softmax[n + i],  log_softmax[2 * n + i]};
    const int64_t target = rows.target(i, column, valid);
    row_gradient(panel + kept[i] * kPanel, valid, rows.scale(i), target, c, dz);
    if (db != nullptr)
      for (int64_t j = 0; j < valid; ++j) db[j] += dz[j];
    if (target >= 0) at_target[i] = std::exchange(dz[target], 0.0f);
    for (int64_t j = 0; j < kPanel; ++j) out[j] = static_cast<T>(dz[j]);
  }
  std::fill(out, out + (rows.padded - n) * kPanel, T(0));
}

// dw [kPanel rows] (+)= dz^T @ x, for dz [rows, kPanel] and x packed.
template <typename T>
void add_weight_gradients(int64_t rows, const T* dz, const uint32_t* x, int64_t stride_dw,
                          std::vector<T>& transposed, bool add, float* dw) {
  const int64_t slice = slice_width();
  // As many rows at a time as stay in L2: dw goes through the cache once for each such part.
  constexpr int64_t kPart = 4 * kDepth<T>;
  transposed.resize(kPanel * kPart);
  for (int64_t k0 = 0; k0 < rows; k0 += kPart) {
    const int64_t depth = std::min(kPart, rows - k0);
    for (int64_t i0 = 0; i0 < depth; i0 += 16)
      for (int64_t j = 0; j < kPanel; ++j)
        for (int64_t i = i0; i < i0 + 16; ++i)
          transposed[j * kPart + i] = dz[(k0 + i) * kPanel + j];
    for (int64_t h = 0; h < stride_dw; h += slice) {
      const uint32_t* b = x + packed_words<T>(rows, h) + packed_words<T>(k0, slice);
      for (int64_t j = 0; j < kPanel; j += kRows)
        multiply<T>(depth, transposed.data() + j * kPart, kPart, b, dw + j * stride_dw + h,
                    stride_dw, add || k0 > 0);
    }
  }
}

// out [size] += factor * in.
template <typename V>
void add_scaled(float factor, const V* in, int64_t size, float* out) {
  for (int64_t i = 0; i < size; ++i) out[i] += factor * static_cast<float>(in[i]);
}

// dx [rows [first, last), columns [h0, h1)] += dz @ weight, panel after panel.
template <typename T, typename W>
void add_hidden_gradients(const Rows& rows, const Weight& shape, const float* raw, int64_t raw_rows,
                          const W* weight, int64_t first, int64_t last, int64_t h0, int64_t h1,
                          int64_t stride_dx, float* dx) {
  const int64_t slice = slice_width(), slice_words = packed_words<T>(kPanel, slice);
  std::vector<uint32_t> packed(packed_words<T>(kPanel, h1 - h0));
  for (int64_t panel = 0; panel < shape.panels; ++panel) {
    pack<T>(weight + panel * kPanel * shape.hidden + h0, shape.valid(panel), shape.hidden,
            std::min(h1, shape.hidden) - h0, kPanel, packed.data());
    const T* dz = reinterpret_cast<const T*>(raw + panel * raw_rows * kPanel);
    for (int64_t row = first; row < last; row += kRows)
      for (int64_t h = h0; h < h1; h += slice)
        multiply<T>(kPanel, dz + row * kPanel, kPanel, packed.data() + (h - h0) / slice * slice_words,
                    dx + row * stride_dx + h, stride_dx, /*add=*/true);
  }
  release<T>();
}

template <typename T, typename W>
void backward(const Rows& rows, const Weight& shape, float* raw, int64_t raw_rows, const T* x,
              int64_t stride_x, const W* weight, const int64_t* kept, const float* coefficients,
              const float* log_softmax, float* dx, float* dw, bool add_dw, float* db) {
  const int64_t slice = slice_width(), stride = round_up(shape.hidden, slice);
  std::vector<uint32_t> packed(dw == nullptr ? 0 : packed_words<T>(rows.padded, stride));
  if (dw != nullptr)
    at::parallel_for(0, stride / slice, 1, [&](int64_t begin, int64_t end) {
      const int64_t h = begin * slice;
      pack<T>(x + h, rows.count, stride_x, std::min(end * slice, shape.hidden) - h, rows.padded,
              packed.data() + packed_words<T>(rows.padded, h));
    });
  std::vector<float> at_target(rows.count, 0.0f);
  at::parallel_for(0, shape.panels, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> transposed;
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t column = panel * kPanel;
      float* dz = raw + panel * raw_rows * kPanel;
      panel_gradients<T>(rows, kept, coefficients, log_softmax, column, shape.valid(panel), dz,
                         at_target.data(), db == nullptr ? nullptr : db + column);
      if (dw == nullptr) continue;
      add_weight_gradients<T>(rows.padded, reinterpret_cast<const T*>(dz), packed.data(), stride,
                              transposed, add_dw, dw + column * stride);
      for (int64_t i = 0; i < rows.count; ++i)
        if (rows.target(i, column, shape.valid(panel)) >= 0)
          add_scaled(at_target[i], x + i * stride_x, shape.hidden, dw + rows.token_ids[i] * stride);
    }
    release<T>();
  });
  if (dx == nullptr) return;
  // Columns first: each part packs its own columns of the weight, so no panel is packed twice.
  const int64_t threads = at::get_num_threads(), slices = stride / slice, tiles = rows.padded / kRows;
  const int64_t across = std::min(threads, slices), width = (slices + across - 1) / across * slice;
  const int64_t down = std::min(tiles, (threads + across - 1) / across);
  const int64_t height = (tiles + down - 1) / down * kRows;
  at::parallel_for(0, across * down, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t h = item % across * width, first = item / across * height;
      if (h < stride && first < rows.padded)
        add_hidden_gradients<T>(rows, shape, raw, raw_rows, weight, first,
                                std::min(first + height, rows.padded), h, std::min(h + width, stride),
                                stride, dx);
    }
  });
  at::parallel_for(0, rows.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      if (rows.target(i, 0, shape.vocab) >= 0)
        add_scaled(at_target[i], weight + rows.token_ids[i] * shape.hidden, shape.hidden,
                   dx + i * stride);
  });
}

float* data_or_null(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() ? tensor->data_ptr<float>() : nullptr;
}

// x is whole tiles of rows and of columns; beyond the rows and the hidden size it is zero.
at::Tensor linear_forward(const at::Tensor& x, const at::Tensor& weight,
                          const std::optional<at::Tensor>& bias, const at::Tensor& token_ids,
                          const at::Tensor& temperature, double softcap,
                          const std::optional<at::Tensor>& raw) {
  const Rows rows(token_ids, temperature, softcap);
  const Weight shape(weight);
  const auto out = at::empty({4, rows.count}, x.options().dtype(at::kFloat));
  if (rows.count == 0) return out;
  with_types(x, weight, [&](const auto* x_data, const auto* weight_data) {
    forward(rows, shape, x_data, x.size(1), weight_data, data_or_null(bias), data_or_null(raw),
            out.template data_ptr<float>());
  });
  return out;
}

void linear_backward(const at::Tensor& raw, const at::Tensor& x, const at::Tensor& weight,
                     const at::Tensor& kept, const at::Tensor& token_ids,
                     const at::Tensor& temperature, double softcap, const at::Tensor& coefficients,
                     const at::Tensor& log_softmax, const std::optional<at::Tensor>& dx,
                     const std::optional<at::Tensor>& dw, bool add_dw,
                     const std::optional<at::Tensor>& db) {
  const Rows rows(token_ids, temperature, softcap);
  const Weight shape(weight);
  with_types(x, weight, [&](const auto* x_data, const auto* weight_data) {
    backward(rows, shape, raw.data_ptr<float>(), raw.size(1), x_data, x.size(1), weight_data,
             kept.const_data_ptr<int64_t>(), coefficients.const_data_ptr<float>(),
             log_softmax.const_data_ptr<float>(), data_or_null(dx), data_or_null(dw), add_dw,
             data_or_null(db));
  });
}

}  // namespace
}  // namespace codistill

TORCH_LIBRARY_FRAGMENT(codistill_cpu, m) {
  using namespace codistill;
  // Shapes in kernels/codistill_kernels/_linear_cpu.py, the only caller.
  m.def(
      "linear_forward(Tensor x, Tensor weight, Tensor? bias, Tensor token_ids, Tensor temperature, "
      "float softcap, Tensor(a!)? raw) -> Tensor",
      &linear_forward);
  m.def(
      "linear_backward(Tensor(a!) raw, Tensor x, Tensor weight, Tensor kept, Tensor token_ids, "
      "Tensor temperature, float softcap, Tensor coefficients, Tensor log_softmax, Tensor(b!)? dx, "
      "Tensor(c!)? dw, bool add_dw, Tensor(d!)? db) -> ()",
      &linear_backward);
  m.def("multiplies_bf16() -> bool", &multiplies_bf16);
  m.def("tile_shape() -> (int, int, int)", [] {
    return std::make_tuple(kRows, kPanel, slice_width());
  });
}
