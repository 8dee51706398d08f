// Softmax statistics of hidden_states @ lm_head_weight.T on the CPU, without the [N, V] logits.
//
//   vocab blocks over threads -> weight tile, packed once, reused by all rows
//     -> row tile: brgemm into a [kRows, kColumns] fp32 tile -> online softmax on it, in cache
//
// A block's states are kept apart and merged in block order at the end, and every brgemm call has
// the same shape: results depend neither on the number of threads nor on the other rows.

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <Python.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "softmax_state.h"

#if defined(__linux__) && !defined(_OPENMP)
#error "compile with -fopenmp: at::parallel_for would run on one thread"
#endif

namespace codistill {
namespace {

constexpr int64_t kRows = 64;            // rows of a tile
constexpr int64_t kSlice = 32;           // columns of a brgemm: 64 x 32 runs 1.4 times 64 x 64 (AVX2)
constexpr int64_t kColumns = 64;         // vocab rows of a tile, a few slices
constexpr int64_t kBlockColumns = 2048;  // vocab rows of a block, the unit of work

struct Problem {
  int64_t rows, hidden, vocab;
  const int64_t* token_ids;
  const float* temperature;
  const float* bias;  // or null
  float softcap;      // 0: none
};

// Element k of a row in 32 bits: a pair of bf16, or one number as fp32, which loses nothing.
template <typename T, typename W>
uint32_t word(const W* row, int64_t k) {
  uint32_t out;
  if constexpr (sizeof(T) == sizeof(uint32_t)) {
    const float value = static_cast<float>(row[k]);
    std::memcpy(&out, &value, sizeof(out));
  } else {
    std::memcpy(&out, row + 2 * k, sizeof(out));
  }
  return out;
}

// Weights of `columns` rows -> slices [kColumns / kSlice][depth, kSlice], of 32-bit elements. For fp32
// that is the layout brgemm wants of B; for pairs of bf16 it is its VNNI layout.
template <typename T, typename W>
void pack(const W* in, int64_t columns, int64_t hidden, uint32_t* out) {
  const int64_t depth = hidden * sizeof(T) / sizeof(uint32_t);
  constexpr int64_t kStep = 16;  // a cache line of every row at a time
  for (int64_t k0 = 0; k0 < depth; k0 += kStep)
    for (int64_t n = 0; n < kColumns; ++n) {
      uint32_t* slice = out + n / kSlice * depth * kSlice + n % kSlice;
      for (int64_t k = k0; k < std::min(k0 + kStep, depth); ++k)
        slice[k * kSlice] = n < columns ? word<T>(in + n * hidden, k) : 0;
    }
}

// Operands are multiplied as T: float, or BFloat16 where the CPU has instructions for it. The weight
// is converted tile by tile: a converted copy of it would be the largest thing in memory.
template <typename T, typename W>
void block_states(const Problem& p, const T* hidden, const W* weight, int64_t block,
                  int64_t first_row, int64_t last_row, State* states) {
  const int64_t per_word = sizeof(uint32_t) / sizeof(T);
  const int64_t depth = p.hidden / per_word;
  std::vector<uint32_t> packed(depth * kColumns);
  std::vector<T> edge(kRows * p.hidden);
  alignas(64) float tile[kRows * kColumns];
  float bias[kColumns] = {};
  const int64_t stop = std::min(p.vocab, (block + 1) * kBlockColumns);
  for (int64_t row = first_row; row < last_row; ++row)
    states[row] = State{kMinusInf, 0.0f, 0.0f, 0.0f};
  for (int64_t column = block * kBlockColumns; column < stop; column += kColumns) {
    const int64_t valid = std::min(kColumns, stop - column);
    pack<T>(weight + column * p.hidden, valid, p.hidden, packed.data());
    if (p.bias != nullptr) std::copy_n(p.bias + column, valid, bias);
    for (int64_t row = first_row; row < last_row; row += kRows) {
      const int64_t count = std::min(kRows, last_row - row);
      const T* a = hidden + row * p.hidden;
      if (count < kRows) {  // always a full tile: the same kernel, the same bits
        std::copy_n(a, count * p.hidden, edge.data());
        a = edge.data();
      }
      for (int64_t slice = 0; slice < valid; slice += kSlice)
        at::native::cpublas::brgemm(kRows, kSlice, p.hidden, p.hidden, kSlice, kColumns,
                                    /*add_C=*/false, a,
                                    reinterpret_cast<const T*>(packed.data() + slice * depth),
                                    tile + slice, /*is_vnni=*/per_word > 1);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t target = p.token_ids[row + i] - column;
        const State state = tile_state(
            tile + i * kColumns, kColumns, valid, p.bias != nullptr ? bias : nullptr, p.softcap,
            p.temperature[row + i], target >= 0 && target < valid ? target : -1);
        states[row + i] = merge(states[row + i], state);
      }
    }
  }
  at::native::cpublas::brgemm_release(per_word > 1);
}

template <typename T, typename W>
void run(const Problem& p, const T* hidden, const W* weight, float* out) {
  const int64_t blocks = (p.vocab + kBlockColumns - 1) / kBlockColumns;
  const int64_t tiles = (p.rows + kRows - 1) / kRows;
  // A small vocabulary has fewer blocks than there are threads: then cut the rows as well.
  const int64_t wanted = (at::get_num_threads() + blocks - 1) / blocks;
  const int64_t groups = std::max<int64_t>(1, std::min(tiles, wanted));
  const int64_t group_rows = (tiles + groups - 1) / groups * kRows;
  std::vector<State> states(blocks * p.rows);
  at::parallel_for(0, blocks * groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t block = item / groups, first = item % groups * group_rows;
      block_states(p, hidden, weight, block, std::min(first, p.rows),
                   std::min(first + group_rows, p.rows), states.data() + block * p.rows);
    }
  });
  for (int64_t row = 0; row < p.rows; ++row) {
    State state = states[row];
    for (int64_t block = 1; block < blocks; ++block)
      state = merge(state, states[block * p.rows + row]);
    const float parts[] = {state.max, state.rest, state.weighted, state.target};
    for (int64_t i = 0; i < 4; ++i) out[i * p.rows + row] = parts[i];
  }
}

}  // namespace

// [4, N]: max, rest, weighted, target of each row (softmax_state.h). Inputs are contiguous; tokens
// outside [0, vocab_size) have target 0.
at::Tensor linear_statistics(const at::Tensor& hidden_states, const at::Tensor& lm_head_weight,
                             const at::Tensor& token_ids, const at::Tensor& temperature,
                             const std::optional<at::Tensor>& bias, double softcap,
                             int64_t vocab_size) {
  const auto out = at::empty({4, hidden_states.size(0)}, hidden_states.options().dtype(at::kFloat));
  const auto bias32 = bias.has_value() ? bias->to(at::kFloat).contiguous() : at::Tensor();
  const Problem p{hidden_states.size(0),
                  hidden_states.size(1),
                  vocab_size,
                  token_ids.const_data_ptr<int64_t>(),
                  temperature.const_data_ptr<float>(),
                  bias.has_value() ? bias32.const_data_ptr<float>() : nullptr,
                  static_cast<float>(softcap)};
  if (p.rows == 0) return out;
  const bool halves = hidden_states.scalar_type() == at::kBFloat16 &&
                      lm_head_weight.scalar_type() == at::kBFloat16 && p.hidden % 2 == 0 &&
                      at::native::cpublas::could_pack(at::kBFloat16);
  if (halves) {
    run(p, hidden_states.const_data_ptr<at::BFloat16>(),
        lm_head_weight.const_data_ptr<at::BFloat16>(), out.data_ptr<float>());
    return out;
  }
  const auto hidden32 = hidden_states.to(at::kFloat);
  const float* hidden = hidden32.const_data_ptr<float>();
  float* result = out.data_ptr<float>();
  if (lm_head_weight.scalar_type() == at::kBFloat16)
    run(p, hidden, lm_head_weight.const_data_ptr<at::BFloat16>(), result);
  else if (lm_head_weight.scalar_type() == at::kHalf)
    run(p, hidden, lm_head_weight.const_data_ptr<at::Half>(), result);
  else if (lm_head_weight.scalar_type() == at::kFloat)
    run(p, hidden, lm_head_weight.const_data_ptr<float>(), result);
  else
    run(p, hidden, lm_head_weight.const_data_ptr<double>(), result);
  return out;
}

}  // namespace codistill

TORCH_LIBRARY(codistill_cpu, m) {
  m.def(
      "linear_statistics(Tensor hidden_states, Tensor lm_head_weight, Tensor token_ids, "
      "Tensor temperature, Tensor? bias, float softcap, int vocab_size) -> Tensor",
      &codistill::linear_statistics);
}

// An empty Python module: importing it is what loads the library above.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
