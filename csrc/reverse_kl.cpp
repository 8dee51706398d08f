// KL(student || teacher) over the whole vocabulary, from the hidden states and heads of both.
//
// Each panel of the vocabulary has two products, of either hidden size, into two tiles; the states of
// both softmaxes come from the tiles while they are in cache. No logits are kept.

#include <cmath>

#include "linear.h"

namespace codistill {
namespace {

// How the raw logits of all rows of one model become logits.
struct Scales {
  const float* temperature;
  float softcap;

  Scales(const View& temperature, double softcap)
      : temperature(temperature.as<float>()), softcap(static_cast<float>(softcap)) {}

  // The first `valid` raw logits of one row, in place. In fp64 where there is a softcap, rounded
  // once: a low temperature magnifies each ulp.
  void apply(int64_t row, int64_t valid, float* raw) const {
    const float t = temperature[row];
    if (softcap != 0.0f) {
      const double cap = softcap, limit = cap / t;
      for (int64_t j = 0; j < valid; ++j)
        raw[j] = static_cast<float>(std::tanh(raw[j] / cap) * limit);
    } else if (t != 1.0f) {
      for (int64_t j = 0; j < valid; ++j) raw[j] /= t;
    }
  }
};

// Rows [first, last) of x times one panel of a weight, row tile by row tile.
template <typename T, typename W>
struct Factor {
  const T* x;
  int64_t stride_x;
  const W* weight;
  int64_t hidden;
  Scales scales;
  std::vector<uint32_t> packed;
  std::vector<float> tile;

  Factor(const T* x, int64_t stride_x, const W* weight, int64_t hidden, Scales scales)
      : x(x),
        stride_x(stride_x),
        weight(weight),
        hidden(hidden),
        scales(scales),
        packed(packed_words<T>(stride_x, kPanel)),
        tile(kRows * kPanel) {}

  void pack_panel(int64_t column, int64_t valid) {
    pack_transposed<T>(weight + column * hidden, valid, hidden, stride_x, packed.data());
  }

  void multiply_rows(int64_t row, int64_t height, int64_t valid) {
    multiply_panel<T>(height, stride_x, x + row * stride_x, packed.data(), valid, tile.data());
  }

  // Logits of row `row + i`, of the tile that starts at `row`; once.
  const float* logits(int64_t row, int64_t i, int64_t valid) {
    scales.apply(row + i, valid, tile.data() + i * kPanel);
    return tile.data() + i * kPanel;
  }
};

template <typename T, typename Ws, typename Wt>
void block_states(Factor<T, Ws> student, Factor<T, Wt> teacher, const Weight& shape, int64_t rows,
                  int64_t block, int64_t first, int64_t last, PairState* states) {
  const int64_t stop = std::min((block + 1) * kBlock, shape.panels);
  std::fill(states + first, states + last, empty_pair_state());
  for (int64_t panel = block * kBlock; panel < stop; ++panel) {
    const int64_t valid = shape.valid(panel);
    student.pack_panel(panel * kPanel, valid);
    teacher.pack_panel(panel * kPanel, valid);
    for (int64_t row = first; row < last; row += kRows) {
      student.multiply_rows(row, tile_height(row, rows), valid);
      teacher.multiply_rows(row, tile_height(row, rows), valid);
      const Scale none{0.0f, 1.0f};
      for (int64_t i = 0; i < std::min(kRows, last - row); ++i)
        states[row + i] =
            merge(states[row + i], row_pair_state(student.logits(row, i, valid),
                                                  teacher.logits(row, i, valid), valid, none));
    }
  }
  release<T>();
}

// out [N], nats. x_s and x_t have rows in multiples of kUnit, and one dtype; both weights have the same
// number of rows.
void reverse_kl(const View& x_s, const View& weight_s, const View& temperature_s, double softcap_s,
                const View& x_t, const View& weight_t, const View& temperature_t, double softcap_t,
                const View& out) {
  const int64_t rows = temperature_s.rows;
  if (rows == 0) return;
  const Weight shape(weight_s);
  const int64_t blocks = num_blocks(shape.panels);
  std::vector<PairState> states(blocks * rows);
  with_types(x_s, weight_s, [&](const auto* data_s, const auto* w_s) {
    with_types(x_t, weight_t, [&](const auto* data_t, const auto* w_t) {
      // The caller gives both the same dtype; the other pairs of types need no code.
      if constexpr (std::is_same_v<std::decay_t<decltype(*data_s)>, std::decay_t<decltype(*data_t)>>)
        for_blocks(shape, rows, [&](int64_t block, int64_t first, int64_t last) {
          block_states(
              Factor(data_s, x_s.columns, w_s, weight_s.columns, Scales(temperature_s, softcap_s)),
              Factor(data_t, x_t.columns, w_t, weight_t.columns, Scales(temperature_t, softcap_t)),
              shape, rows, block, first, last, states.data() + block * rows);
        });
    });
  });
  for (int64_t row = 0; row < rows; ++row) {
    PairState state = states[row];
    for (int64_t block = 1; block < blocks; ++block)
      state = merge(state, states[block * rows + row]);
    out.as<float>()[row] = divergence(state);
  }
}

}  // namespace

CODISTILL_EXPORT const char* codistill_reverse_kl(int64_t threads, const View& x_s,
                                                  const View& weight_s, const View& temperature_s,
                                                  double softcap_s, const View& x_t,
                                                  const View& weight_t, const View& temperature_t,
                                                  double softcap_t, const View& out) {
  return guarded(threads, [&] {
    reverse_kl(x_s, weight_s, temperature_s, softcap_s, x_t, weight_t, temperature_t, softcap_t, out);
  });
}

}  // namespace codistill
