// Softmax statistics of hidden_states @ lm_head_weight.T, in tiles that stay in cache.
//
//   weight panel, packed once, reused by all rows -> tile of raw logits -> states, and what is held
//
// What is held for the gradients (gradients.cpp) is [panels][rows.padded][kPanel]: of exponentials in
// bf16, with one power of two per row and panel, or of raw logits in fp32.
//
// Panels are shared by the threads; the states of blocks of panels are merged in block order. Results
// depend neither on the threads nor on the other rows.

#include "linear.h"

namespace codistill {
namespace {

// What is multiplied: x [rows, stride_x], weight [vocab, hidden], and bias [vocab] or null.
template <typename T, typename W>
struct Operands {
  const T* x;
  int64_t stride_x;
  const W* weight;
  const float* bias;
};

// What is held, each null where it is not: raw logits, or exponentials and their powers.
struct Held {
  float* raw;              // [panels][rows.padded][kPanel]
  BFloat16* exponentials;  // [panels][rows.padded][kPanel]
  float* powers;           // [panels][rows]
};

// State of row `row` from its panel of raw logits; what is to be held of it is written.
State held_state(const float* raw, const Held& held, const Rows& rows, int64_t row, int64_t panel,
                 int64_t valid) {
  const int64_t target = rows.target(row, panel * kPanel, valid);
  if (held.exponentials == nullptr) return row_state(raw, valid, rows.scale(row), target);
  return row_exponentials(raw, valid, rows.scale(row), target,
                          held.exponentials + (panel * rows.padded + row) * kPanel,
                          held.powers + panel * rows.count + row);
}

// States of rows [first, last) over a block of panels.
template <typename T, typename W>
void block_states(const Rows& rows, const Weight& shape, const Operands<T, W>& operands, const Held& held,
                  int64_t block, int64_t first, int64_t last, State* states) {
  const auto [x, stride_x, weight, bias] = operands;
  std::vector<uint32_t> packed(packed_words<T>(stride_x, kPanel));
  std::vector<float> tile(held.raw == nullptr ? kRows * kPanel : 0);
  const int64_t stop = std::min((block + 1) * kBlock, shape.panels);
  std::fill(states + first, states + last, empty_state());
  for (int64_t panel = block * kBlock; panel < stop; ++panel) {
    const int64_t column = panel * kPanel, valid = shape.valid(panel);
    pack_transposed<T>(weight + column * shape.hidden, valid, shape.hidden, stride_x, packed.data());
    for (int64_t row = first; row < last; row += kRows) {
      float* c = held.raw == nullptr ? tile.data() : held.raw + (panel * rows.padded + row) * kPanel;
      if (held.exponentials != nullptr)
        prefetch<true>(held.exponentials + (panel * rows.padded + row) * kPanel, kRows, kPanel, kPanel);
      multiply_panel<T>(tile_height(row, rows.count), stride_x, x + row * stride_x, packed.data(),
                        valid, c);
      for (int64_t i = row; i < std::min(row + kRows, last); ++i, c += kPanel) {
        if (bias != nullptr)
          for (int64_t j = 0; j < valid; ++j) c[j] += bias[column + j];
        states[i] = merge(states[i], held_state(c, held, rows, i, panel, valid));
      }
    }
  }
  release<T>();
}

template <typename T, typename W>
void forward(const Rows& rows, const Weight& shape, const Operands<T, W>& operands, const Held& held,
             float* out) {
  const int64_t blocks = num_blocks(shape.panels);
  std::vector<State> states(blocks * rows.count);
  for_blocks(shape, rows.count, [&](int64_t block, int64_t first, int64_t last) {
    block_states(rows, shape, operands, held, block, first, last, states.data() + block * rows.count);
  });
  parallel_for(0, rows.count, kRows, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      State state = states[row];
      for (int64_t block = 1; block < blocks; ++block)
        state = merge(state, states[block * rows.count + row]);
      const float parts[] = {state.sum.max, state.sum.rest, state.weighted, state.target};
      for (int64_t i = 0; i < 4; ++i) out[i * rows.count + row] = parts[i];
    }
  });
}

// out [4, N]: max, rest, weighted and target of `State`. x: rows and columns in multiples of kUnit;
// beyond the rows and the hidden size it is zero.
void linear_forward(const View& x, const View& weight, const View* bias, const View& token_ids,
                    const View& temperature, double softcap, const View* held, const View* powers,
                    const View& out) {
  const Rows rows(token_ids, temperature, softcap);
  const Weight shape(weight);
  if (rows.count == 0) return;
  Held parts{};
  if (powers != nullptr) {
    parts.exponentials = held->as<BFloat16>();
    parts.powers = powers->as<float>();
  } else {
    parts.raw = data_or_null(held);
  }
  with_types(x, weight, [&](const auto* x_data, const auto* weight_data) {
    forward(rows, shape, Operands{x_data, x.columns, weight_data, data_or_null(bias)}, parts,
            out.as<float>());
  });
}

}  // namespace

// Shapes in kernels/codistill_kernels/_linear/cpu_backend.py.
CODISTILL_EXPORT const char* codistill_linear_forward(
    int64_t threads, const View& x, const View& weight, const View* bias, const View& token_ids,
    const View& temperature, double softcap, const View* held, const View* powers, const View& out) {
  return guarded(threads, [&] {
    linear_forward(x, weight, bias, token_ids, temperature, softcap, held, powers, out);
  });
}

CODISTILL_EXPORT int64_t codistill_tile_rows() { return kUnit; }
CODISTILL_EXPORT int64_t codistill_panel() { return kPanel; }

}  // namespace codistill
