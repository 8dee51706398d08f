// Gradients of a linear head from what linear.cpp holds of its logits.
//
//   finish   held panels -> dz in their place, or E = dz / f with a number f a row
//   dX       f (E @ weight): a block of it stays in cache while all panels go by
//   dW       E^T @ (f x): a tile of it stays in cache while all rows go by
//
// Each is summed in fp32, and rounded once as it is written. An element is summed in the same order
// whatever the blocks are: results do not depend on the threads.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <optional>

#include "linear.h"

namespace codistill {
namespace {

// A block of dX. Its sums, 1.5 MiB, go through the L2 a tile at a time, in order; smaller blocks, that
// stay there, took longer: the weight is packed once for every kSumRows rows, and dz is read once for
// every kSumColumns columns.
constexpr int64_t kSumRows = 1024, kSumColumns = 384;
constexpr int64_t kTransposed = 256 * 1024;  // bytes of E^T at once: they stay in the L2
constexpr int64_t kTiles = kPanel / kRows;            // of dW a panel

// dz, or E, of the kept rows: panels of [>= rows.padded, kPanel], zeros from rows.count on.
template <typename S>
struct Panels {
  const S* data;
  int64_t stride;

  const S* row(int64_t panel, int64_t row) const { return data + panel * stride + row * kPanel; }
};

// --- finish ---------------------------------------------------------------------------------------

// What turns the exponentials of a row into its gradient.
struct RowFactor {
  double power;     // of two, of all its panels
  float at_target;  // p - 1 in units of the exponentials
  float factor;     // 1 of these units in dz: c0 p = factor exp(z) 2^-power
};

RowFactor row_factor(float c0, float max, float log_sum, float target, float temperature) {
  const double power = power_of(max);
  const float unit = std::exp(static_cast<float>(power * kLn2 - max) - log_sum);
  const float logp = std::min(target - max - log_sum, 0.0f);
  // p - 1 loses all digits where p is near 1: expm1 keeps them.
  return {power, std::expm1(logp) / unit, c0 * unit / temperature};
}

// One panel of exponentials: kept rows moved together, brought to the row's power of two, with the
// target's entry.
void finish_panel(const Rows& rows, const int64_t* kept, const float* powers,
                  const std::vector<RowFactor>& factors, int64_t column, int64_t valid,
                  at::BFloat16* panel) {
  for (int64_t i = 0; i < rows.count; ++i) {
    const at::BFloat16* from = panel + kept[i] * kPanel;
    at::BFloat16* to = panel + i * kPanel;
    const double shift = powers[kept[i]] - factors[i].power;
    if (shift < 0.0) {  // exact; a whole range may be -inf, its power then means nothing
      const float scale = static_cast<float>(std::exp2(shift));
      for (int64_t j = 0; j < kPanel; ++j) to[j] = scale * static_cast<float>(from[j]);
    } else if (from != to) {
      std::copy(from, from + kPanel, to);
    }
    const int64_t target = rows.target(i, column, valid);
    if (target >= 0) to[target] = factors[i].at_target;
  }
  std::fill(panel + rows.count * kPanel, panel + rows.padded * kPanel, at::BFloat16(0));
}

// One panel of raw logits becomes dz, as T, from the panel's start on: row i comes from raw row
// kept[i] >= i, so nothing is overwritten before it is read. db: [kPanel] sums, or null.
template <typename T>
void finish_panel(const Rows& rows, const int64_t* kept, const float* coefficients,
                  const float* log_softmax, int64_t column, int64_t valid, float* panel, float* db) {
  alignas(64) float dz[kPanel];
  T* out = reinterpret_cast<T*>(panel);
  const int64_t n = rows.count;
  for (int64_t i = 0; i < n; ++i, out += kPanel) {
    const Coefficients c{coefficients[i], coefficients[n + i], coefficients[2 * n + i],
                         log_softmax[i],  log_softmax[n + i],  log_softmax[2 * n + i]};
    row_gradient(panel + kept[i] * kPanel, valid, rows.scale(i), rows.target(i, column, valid), c, dz);
    if (db != nullptr)
      for (int64_t j = 0; j < valid; ++j) db[j] += dz[j];
    for (int64_t j = 0; j < kPanel; ++j) out[j] = static_cast<T>(dz[j]);
  }
  std::fill(out, out + (rows.padded - n) * kPanel, T(0));
}

// Exponentials of all rows held; the number [K] a kept row that makes them its gradient.
at::Tensor finish_exponentials(const at::Tensor& held, const at::Tensor& powers,
                               const at::Tensor& kept, const at::Tensor& token_ids,
                               const at::Tensor& targets, const at::Tensor& temperature,
                               const at::Tensor& c0, const at::Tensor& log_softmax, int64_t vocab) {
  const Rows rows(token_ids, temperature, 0.0);
  const auto out = at::empty({rows.count}, temperature.options());
  const float *c = c0.const_data_ptr<float>(), *s = log_softmax.const_data_ptr<float>();
  std::vector<RowFactor> factors(rows.count);
  for (int64_t i = 0; i < rows.count; ++i) {
    factors[i] = row_factor(c[i], s[i], s[rows.count + i], targets.const_data_ptr<float>()[i],
                            rows.temperature[i]);
    out.data_ptr<float>()[i] = factors[i].factor;
  }
  at::parallel_for(0, held.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel)
      finish_panel(rows, kept.const_data_ptr<int64_t>(),
                   powers.const_data_ptr<float>() + panel * powers.size(1), factors, panel * kPanel,
                   std::min(kPanel, vocab - panel * kPanel),
                   held.data_ptr<at::BFloat16>() + panel * held.stride(0));
  });
  return out;
}

// Raw logits of all rows held; dz [panels, ...] is their memory, of the dtype of the products.
void finish_raw(const at::Tensor& held, const at::Tensor& dz, const at::Tensor& kept,
                const at::Tensor& token_ids, const at::Tensor& temperature, double softcap,
                const at::Tensor& coefficients, const at::Tensor& log_softmax, int64_t vocab,
                const std::optional<at::Tensor>& db) {
  const Rows rows(token_ids, temperature, softcap);
  float* sums = data_or_null(db);
  const auto finish =
      dz.scalar_type() == at::kBFloat16 ? finish_panel<at::BFloat16> : finish_panel<float>;
  at::parallel_for(0, held.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t column = panel * kPanel;
      finish(rows, kept.const_data_ptr<int64_t>(), coefficients.const_data_ptr<float>(),
             log_softmax.const_data_ptr<float>(), column, std::min(kPanel, vocab - column),
             held.data_ptr<float>() + panel * held.stride(0),
             sums == nullptr ? nullptr : sums + column);
    }
  });
}

// --- products -------------------------------------------------------------------------------------

// A gradient [rows, columns] of any float dtype, as it is written.
class Output {
 public:
  Output(const at::Tensor& tensor, bool add)
      : data_(tensor.data_ptr()),
        type_(tensor.scalar_type()),
        item_(tensor.element_size()),
        stride_(tensor.stride(0)),
        add_(add) {}

  // `height` rows of `width` columns will be written.
  void prefetch(int64_t row, int64_t column, int64_t height, int64_t width) const {
    const char* first = data<char>() + (row * stride_ + column) * item_;
    codistill::prefetch<true>(first, height, stride_ * item_, width * item_);
  }

  void write(int64_t row, int64_t column, const float* sums, float factor, int64_t size) const {
    const int64_t at = row * stride_ + column;
    switch (type_) {
      case at::kBFloat16: return write_scaled(sums, factor, size, add_, data<at::BFloat16>() + at);
      case at::kHalf: return write_scaled(sums, factor, size, add_, data<at::Half>() + at);
      case at::kDouble: return write_scaled(sums, factor, size, add_, data<double>() + at);
      default: return write_scaled(sums, factor, size, add_, data<float>() + at);
    }
  }

 private:
  template <typename V>
  V* data() const {
    return static_cast<V*>(data_);
  }

  void* data_;
  at::ScalarType type_;
  int64_t item_, stride_;
  bool add_;
};

// A tile [height, kPanel] of S as the left operand of a product of T.
template <typename T, typename S>
const T* as_operand(const S* tile, int64_t height, std::vector<T>& buffer) {
  if constexpr (std::is_same_v<T, S>) {
    return tile;
  } else {
    buffer.resize(kRows * kPanel);
    convert(tile, height * kPanel, buffer.data());
    return buffer.data();
  }
}

// dx [rows [first, last), columns [h0, h1)]; at: rows of dx. A block of sums is tiles of kRows x a
// slice, one behind the other.
template <typename T, typename S, typename W>
void hidden_gradients(const Panels<S>& dz, const Weight& shape, const W* weight, const float* factors,
                      const int64_t* at, int64_t first, int64_t last, int64_t h0, int64_t h1,
                      const Output& dx) {
  const int64_t slice = slice_width(), slices = (h1 - h0 + slice - 1) / slice, size = kRows * slice;
  std::vector<uint32_t> packed(packed_words<T>(kPanel, h1 - h0));
  std::vector<float> sums(round_up(last - first, kRows) / kRows * slices * size);
  std::vector<T> buffer;
  for (int64_t panel = 0; panel < shape.panels; ++panel) {
    const int64_t valid = shape.valid(panel), depth = round_up(valid, 32);
    pack<T>(weight + panel * kPanel * shape.hidden + h0, valid, shape.hidden, h1 - h0, depth,
            packed.data());
    float* c = sums.data();
    for (int64_t row = first; row < last; row += kRows) {
      const int64_t height = tile_height(row, last);
      prefetch(dz.row(panel, row + kRows), kRows, kPanel, kPanel);
      const T* a = as_operand<T>(dz.row(panel, row), height, buffer);
      for (int64_t n = 0; n < slices; ++n, c += size)
        multiply<T>(height, depth, a, kPanel, packed.data() + packed_words<T>(depth, n * slice), c,
                    slice, /*add=*/panel > 0);
    }
  }
  const float* c = sums.data();
  for (int64_t row = first; row < last; row += kRows)
    for (int64_t h = h0; h < h1; h += slice, c += size)
      for (int64_t i = row; i < std::min(row + kRows, last); ++i)
        dx.write(at[i], h, c + (i - row) * slice, factors[i], std::min(slice, h1 - h));
  release<T>();
}

// All of dx, its blocks over threads.
template <typename T, typename S, typename W>
void all_hidden_gradients(const Panels<S>& dz, int64_t rows, const Weight& shape, const W* weight,
                          const float* factors, const int64_t* at, const Output& dx) {
  const int64_t tiles = (rows + kRows - 1) / kRows, threads = at::get_num_threads();
  const int64_t slice = slice_width(), slices = (shape.hidden + slice - 1) / slice;
  const int64_t least = (shape.hidden + kSumColumns - 1) / kSumColumns;
  const int64_t across = std::min(slices, round_up(least, threads));  // even shares
  const int64_t down = std::min(tiles, std::max((rows + kSumRows - 1) / kSumRows,
                                                (threads + across - 1) / across));
  at::parallel_for(0, across * down, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t h = item / down, row = item % down;
      hidden_gradients<T>(dz, shape, weight, factors, at, row * tiles / down * kRows,
                          std::min(rows, (row + 1) * tiles / down * kRows),
                          h * slices / across * slice,
                          std::min(shape.hidden, (h + 1) * slices / across * slice), dx);
    }
  });
}

// Tiles [begin, end) of dw, kRows vocabulary rows each, from the packed x of all rows (padded).
template <typename T, typename S>
void weight_gradients(const Panels<S>& dz, int64_t padded, const Weight& shape, const uint32_t* x,
                      float factor, int64_t begin, int64_t end, const Output& dw) {
  const int64_t slice = slice_width(), depth = round_up(padded, kDepth<T>);
  const int64_t tile_size = kRows * depth;
  const int64_t most = std::clamp<int64_t>(kTransposed / (tile_size * sizeof(T)), 1, kTiles);
  std::vector<T> transposed(most * tile_size);
  std::vector<float> sums(kRows * slice);
  for (int64_t tile = begin, last; tile < end; tile = last) {
    last = std::min({end, tile + most, (tile / kTiles + 1) * kTiles});
    for (int64_t t = tile; t < last; ++t)
      for (int64_t k = 0; k < padded; k += kDepth<T>)
        transpose_tile(dz.row(t / kTiles, k) + t % kTiles * kRows, std::min(kDepth<T>, padded - k),
                       transposed.data() + (t - tile) * tile_size + k * kRows);
    for (int64_t h = 0; h < shape.hidden; h += slice)
      for (int64_t t = tile; t < last; ++t) {
        const int64_t stop = std::min((t + 1) * kRows, shape.vocab);
        const int64_t width = std::min(slice, shape.hidden - h);
        dw.prefetch(t * kRows, h, stop - t * kRows, width);
        for (int64_t k = 0; k < padded; k += kDepth<T>)
          multiply<T>(kRows, std::min(kDepth<T>, padded - k),
                      transposed.data() + (t - tile) * tile_size + k * kRows, kDepth<T>,
                      x + packed_words<T>(padded, h) + packed_words<T>(k, slice), sums.data(), slice,
                      /*add=*/k > 0);
        for (int64_t v = t * kRows; v < stop; ++v)
          dw.write(v, h, sums.data() + (v - t * kRows) * slice, factor, width);
      }
  }
  release<T>();
}

// All of dw. Numbers of rows become those times a power of two, exactly: their largest is then near 1,
// and a small upstream gradient does not leave the range of bf16.
template <typename T, typename S>
void all_weight_gradients(const Panels<S>& dz, int64_t rows, const Weight& shape, const T* x,
                          int64_t stride_x, const float* factors, const int64_t* at,
                          const Output& dw) {
  const int64_t padded = round_up(rows, kUnit), slice = slice_width();
  float largest = 0.0f;
  for (int64_t i = 0; i < rows; ++i) largest = std::max(largest, std::abs(factors[i]));
  const int exponent = largest > 0.0f && std::isfinite(largest) ? std::ilogb(largest) : 0;
  std::vector<float> scaled(rows);
  for (int64_t i = 0; i < rows; ++i) scaled[i] = std::ldexp(factors[i], -exponent);
  std::vector<uint32_t> packed(packed_words<T>(padded, shape.hidden));
  at::parallel_for(0, (shape.hidden + slice - 1) / slice, 1, [&](int64_t begin, int64_t end) {
    const int64_t h = begin * slice;
    pack_scaled(x + h, at, scaled.data(), rows, stride_x, std::min(end * slice, shape.hidden) - h,
                padded, packed.data() + packed_words<T>(padded, h));
  });
  at::parallel_for(0, (shape.vocab + kRows - 1) / kRows, 1, [&](int64_t begin, int64_t end) {
    weight_gradients<T>(dz, padded, shape, packed.data(), std::ldexp(1.0f, exponent), begin, end, dw);
  });
}

// dx [rows at[i]] = factor (dz @ weight).
void hidden_gradient(const at::Tensor& dz, const at::Tensor& weight, const at::Tensor& factors,
                     const at::Tensor& at, at::ScalarType product, const at::Tensor& dx, bool add) {
  const Weight shape(weight);
  const int64_t rows = factors.size(0);
  const Output out(dx, add);
  const auto run = [&](auto operand, const auto* panels, const auto* weight_data) {
    all_hidden_gradients<decltype(operand)>(Panels{panels, dz.stride(0)}, rows, shape, weight_data,
                                            factors.const_data_ptr<float>(),
                                            at.const_data_ptr<int64_t>(), out);
  };
  if (dz.scalar_type() == at::kFloat)
    return with_weight(weight, [&](const auto* data) { run(float(), dz.const_data_ptr<float>(), data); });
  const auto *panels = dz.const_data_ptr<at::BFloat16>(), *data = weight.const_data_ptr<at::BFloat16>();
  if (product == at::kBFloat16)
    run(at::BFloat16(), panels, data);
  else
    run(float(), panels, data);
}

// dw = dz^T @ (factor x [rows at[i]]), in the dtype of x.
void weight_gradient(const at::Tensor& dz, const at::Tensor& x, const at::Tensor& factors,
                     const at::Tensor& at, int64_t vocab, const at::Tensor& dw, bool add) {
  const Weight shape(vocab, dw.size(1));
  const int64_t rows = factors.size(0);
  const Output out(dw, add);
  const auto run = [&](const auto* panels, const auto* data) {
    all_weight_gradients(Panels{panels, dz.stride(0)}, rows, shape, data, x.size(1),
                         factors.const_data_ptr<float>(), at.const_data_ptr<int64_t>(), out);
  };
  if (x.scalar_type() == at::kBFloat16)
    run(dz.const_data_ptr<at::BFloat16>(), x.const_data_ptr<at::BFloat16>());
  else if (dz.scalar_type() == at::kBFloat16)
    run(dz.const_data_ptr<at::BFloat16>(), x.const_data_ptr<float>());
  else
    run(dz.const_data_ptr<float>(), x.const_data_ptr<float>());
}

}  // namespace
}  // namespace codistill

TORCH_LIBRARY_FRAGMENT(codistill_cpu, m) {
  using namespace codistill;
  // Shapes in kernels/codistill_kernels/_linear_cpu.py, the only caller.
  m.def(
      "finish_exponentials(Tensor(a!) held, Tensor powers, Tensor kept, Tensor token_ids, "
      "Tensor targets, Tensor temperature, Tensor c0, Tensor log_softmax, int vocab) -> Tensor",
      &finish_exponentials);
  m.def(
      "finish_raw(Tensor(a!) held, Tensor(a!) dz, Tensor kept, Tensor token_ids, "
      "Tensor temperature, float softcap, Tensor coefficients, Tensor log_softmax, int vocab, "
      "Tensor(b!)? db) -> ()",
      &finish_raw);
  m.def(
      "hidden_gradient(Tensor dz, Tensor weight, Tensor factors, Tensor at, ScalarType product, "
      "Tensor(a!) dx, bool add) -> ()",
      &hidden_gradient);
  m.def(
      "weight_gradient(Tensor dz, Tensor x, Tensor factors, Tensor at, int vocab, Tensor(a!) dw, "
      "bool add) -> ()",
      &weight_gradient);
}
