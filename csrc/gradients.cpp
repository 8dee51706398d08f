// Gradients of a linear head from what linear.cpp holds of its logits.
//
//   finish   held panels -> dz in their place, or E = dz / f with one number f per row
//   dX       f (E @ weight): a block of it stays in cache while all panels go by
//   dW       E^T @ (f x): a tile of it stays in cache while all rows go by
//
// Each is summed in fp32, and rounded once as it is written. An element is summed in the same order
// whatever the blocks are: results do not depend on the threads.

#include <cmath>

#include "linear.h"

namespace codistill {
namespace {

// Size of a block of dX. Its sums, 1.5 MiB, go through the L2 one tile after another; smaller blocks,
// which stay there, took longer: the weight is packed once for every kSumRows rows, and dz is read
// once for every kSumColumns columns.
constexpr int64_t kSumRows = 1024, kSumColumns = 384;
constexpr int64_t kTransposed = 256 * 1024;  // bytes of E^T at once: they stay in the L2
constexpr int64_t kTiles = kPanel / kRows;   // of dW per panel

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
  double power;     // the power of two that all its panels are brought to
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
                  BFloat16* panel) {
  for (int64_t i = 0; i < rows.count; ++i) {
    const BFloat16* from = panel + kept[i] * kPanel;
    BFloat16* to = panel + i * kPanel;
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
  std::fill(panel + rows.count * kPanel, panel + rows.padded * kPanel, BFloat16(0));
}

// Kept rows, and what their gradients are made of.
struct KeptRows {
  Rows rows;
  const int64_t* kept;        // [K] their numbers among the rows held
  const float* coefficients;  // [3, K]
  const float* lse_parts;     // [3, K]
};

// One panel of raw logits becomes dz, as T, from the panel's start on: row i comes from raw row
// kept[i] >= i, so nothing is overwritten before it is read. db: [kPanel] sums, or null.
template <typename T>
void finish_panel(const KeptRows& all, int64_t column, int64_t valid, float* panel, float* db) {
  alignas(64) float dz[kPanel];
  T* out = reinterpret_cast<T*>(panel);
  const Rows& rows = all.rows;
  const int64_t n = rows.count;
  for (int64_t i = 0; i < n; ++i, out += kPanel) {
    const Coefficients c = coefficients_of(all.coefficients, all.lse_parts, n, i);
    row_gradient(panel + all.kept[i] * kPanel, valid, rows.scale(i), rows.target(i, column, valid), c,
                 dz);
    if (db != nullptr)
      for (int64_t j = 0; j < valid; ++j) db[j] += dz[j];
    for (int64_t j = 0; j < kPanel; ++j) out[j] = static_cast<T>(dz[j]);
  }
  std::fill(out, out + (rows.padded - n) * kPanel, T(0));
}

// Exponentials of all rows held become those of the kept rows. all.coefficients: [K] c0 alone.
// targets [K]: logits of the tokens; out [K]: the number f of each row.
void finish_exponentials(const View& held, const View& powers, const KeptRows& all,
                         const float* targets, int64_t vocab, float* out) {
  const Rows& rows = all.rows;
  const float *max = all.lse_parts, *log_sum = max + rows.count;
  std::vector<RowFactor> factors(rows.count);
  for (int64_t i = 0; i < rows.count; ++i) {
    factors[i] =
        row_factor(all.coefficients[i], max[i], log_sum[i], targets[i], rows.temperature[i]);
    out[i] = factors[i].factor;
  }
  parallel_for(0, held.rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel)
      finish_panel(rows, all.kept, powers.as<float>() + panel * powers.columns, factors,
                   panel * kPanel, std::min(kPanel, vocab - panel * kPanel),
                   held.as<BFloat16>() + panel * held.stride);
  });
}

// Raw logits of all rows held become the gradients of the kept rows, of the dtype of dz, which is the
// same memory. sums [vocab]: the gradient of a bias, or null.
void finish_raw(const View& held, DType dz, const KeptRows& all, int64_t vocab, float* sums) {
  const auto finish = dz == DType::kBFloat16 ? finish_panel<BFloat16> : finish_panel<float>;
  parallel_for(0, held.rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t column = panel * kPanel;
      finish(all, column, std::min(kPanel, vocab - column), held.as<float>() + panel * held.stride,
             sums == nullptr ? nullptr : sums + column);
    }
  });
}

// --- products -------------------------------------------------------------------------------------

// A gradient [rows, columns] of any float dtype, as it is written.
class Output {
 public:
  Output(const View& tensor, bool add) : tensor_(tensor), item_(item_size(tensor.dtype)), add_(add) {}

  // `height` rows of `width` columns will be written.
  void prefetch(int64_t row, int64_t column, int64_t height, int64_t width) const {
    const char* first = static_cast<char*>(tensor_.data) + (row * tensor_.stride + column) * item_;
    codistill::prefetch<true>(first, height, tensor_.stride * item_, width * item_);
  }

  void write(int64_t row, int64_t column, const float* sums, float factor, int64_t size) const {
    with_type(tensor_, [&](auto* data) {
      write_scaled(sums, factor, size, add_, data + row * tensor_.stride + column);
    });
  }

 private:
  View tensor_;
  int64_t item_;
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

// What dX is made of.
template <typename S, typename W>
struct HiddenOperands {
  Panels<S> dz;
  const Weight& shape;
  const W* weight;       // [vocab, hidden]
  const float* factors;  // [K] f
  const int64_t* at;     // [K] rows of dx
};

// Rows [first, last) and columns [h0, h1) of dX.
struct Block {
  int64_t first, last, h0, h1;
};

// One block of dx. Its sums are tiles of kRows x a slice, one behind the other.
template <typename T, typename S, typename W>
void hidden_gradients(const HiddenOperands<S, W>& operands, const Block& block, const Output& dx) {
  const auto& [dz, shape, weight, factors, at] = operands;
  const auto [first, last, h0, h1] = block;
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
void all_hidden_gradients(const HiddenOperands<S, W>& operands, int64_t rows, const Output& dx) {
  const Weight& shape = operands.shape;
  const int64_t tiles = (rows + kRows - 1) / kRows, threads = num_threads();
  const int64_t slice = slice_width(), slices = (shape.hidden + slice - 1) / slice;
  const int64_t least = (shape.hidden + kSumColumns - 1) / kSumColumns;
  const int64_t across = std::min(slices, round_up(least, threads));  // even shares
  const int64_t down = std::min(tiles, std::max((rows + kSumRows - 1) / kSumRows,
                                                (threads + across - 1) / across));
  parallel_for(0, across * down, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t h = item / down, row = item % down;
      const Block block{row * tiles / down * kRows, std::min(rows, (row + 1) * tiles / down * kRows),
                        h * slices / across * slice,
                        std::min(shape.hidden, (h + 1) * slices / across * slice)};
      hidden_gradients<T>(operands, block, dx);
    }
  });
}

// Tiles [begin, end) of dw, kRows vocabulary rows each, from the packed x of all rows, of which there
// are `padded` with zeros.
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

// All of dw. The factors are multiplied by a power of two, exactly, that brings the largest near 1: a
// small upstream gradient then does not leave the range of bf16.
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
  parallel_for(0, (shape.hidden + slice - 1) / slice, 1, [&](int64_t begin, int64_t end) {
    const int64_t h = begin * slice;
    pack_scaled(x + h, at, scaled.data(), rows, stride_x, std::min(end * slice, shape.hidden) - h,
                padded, packed.data() + packed_words<T>(padded, h));
  });
  parallel_for(0, (shape.vocab + kRows - 1) / kRows, 1, [&](int64_t begin, int64_t end) {
    weight_gradients<T>(dz, padded, shape, packed.data(), std::ldexp(1.0f, exponent), begin, end, dw);
  });
}

// dx [rows at[i]] = factor (dz @ weight).
void hidden_gradient(const View& dz, const View& weight, const View& factors, const View& at,
                     DType product, const View& dx, bool add) {
  const Weight shape(weight);
  const int64_t rows = factors.rows;
  const Output out(dx, add);
  const auto run = [&](auto operand, const auto* panels, const auto* weight_data) {
    const HiddenOperands operands{Panels{panels, dz.stride}, shape, weight_data,
                                  factors.as<float>(), at.as<int64_t>()};
    all_hidden_gradients<decltype(operand)>(operands, rows, out);
  };
  if (dz.dtype == DType::kFloat)
    return with_type(weight, [&](const auto* data) { run(float(), dz.as<float>(), data); });
  const auto *panels = dz.as<BFloat16>(), *data = weight.as<BFloat16>();
  if (product == DType::kBFloat16)
    run(BFloat16(), panels, data);
  else
    run(float(), panels, data);
}

// dw = dz^T @ (factor x [rows at[i]]), in the dtype of x.
void weight_gradient(const View& dz, const View& x, const View& factors, const View& at,
                     int64_t vocab, const View& dw, bool add) {
  const Weight shape(vocab, dw.columns);
  const int64_t rows = factors.rows;
  const Output out(dw, add);
  const auto run = [&](const auto* panels, const auto* data) {
    all_weight_gradients(Panels{panels, dz.stride}, rows, shape, data, x.columns,
                         factors.as<float>(), at.as<int64_t>(), out);
  };
  if (x.dtype == DType::kBFloat16)
    run(dz.as<BFloat16>(), x.as<BFloat16>());
  else if (dz.dtype == DType::kBFloat16)
    run(dz.as<BFloat16>(), x.as<float>());
  else
    run(dz.as<float>(), x.as<float>());
}

}  // namespace

// Shapes in kernels/codistill_kernels/_linear/cpu_backend.py.
CODISTILL_EXPORT const char* codistill_finish_exponentials(
    int64_t threads, const View& held, const View& powers, const View& kept, const View& token_ids,
    const View& targets, const View& temperature, const View& c0, const View& lse_parts,
    int64_t vocab, const View& out) {
  return guarded(threads, [&] {
    const KeptRows all{Rows(token_ids, temperature, 0.0), kept.as<int64_t>(), c0.as<float>(),
                       lse_parts.as<float>()};
    finish_exponentials(held, powers, all, targets.as<float>(), vocab, out.as<float>());
  });
}

CODISTILL_EXPORT const char* codistill_finish_raw(
    int64_t threads, const View& held, const View& dz, const View& kept, const View& token_ids,
    const View& temperature, double softcap, const View& coefficients, const View& lse_parts,
    int64_t vocab, const View* db) {
  return guarded(threads, [&] {
    const KeptRows all{Rows(token_ids, temperature, softcap), kept.as<int64_t>(),
                       coefficients.as<float>(), lse_parts.as<float>()};
    finish_raw(held, dz.dtype, all, vocab, data_or_null(db));
  });
}

CODISTILL_EXPORT const char* codistill_hidden_gradient(
    int64_t threads, const View& dz, const View& weight, const View& factors, const View& at,
    DType product, const View& dx, bool add) {
  return guarded(threads, [&] { hidden_gradient(dz, weight, factors, at, product, dx, add); });
}

CODISTILL_EXPORT const char* codistill_weight_gradient(
    int64_t threads, const View& dz, const View& x, const View& factors, const View& at,
    int64_t vocab, const View& dw, bool add) {
  return guarded(threads, [&] { weight_gradient(dz, x, factors, at, vocab, dw, add); });
}

}  // namespace codistill
