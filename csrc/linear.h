// What the passes over a linear head share: its shape, its rows, and who works on what.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include "softmax.h"

namespace codistill {

constexpr int64_t kBlock = 4;  // panels of a block, the unit of work of the forward pass; even shares

struct Rows {
  int64_t count, padded;  // padded to a multiple of kRows
  const int64_t* token_ids;
  const float* temperature;
  float softcap;

  Rows(const at::Tensor& token_ids, const at::Tensor& temperature, double softcap)
      : count(token_ids.size(0)),
        padded(round_up(count, kRows)),
        token_ids(token_ids.const_data_ptr<int64_t>()),
        temperature(temperature.const_data_ptr<float>()),
        softcap(static_cast<float>(softcap)) {}

  Scale scale(int64_t row) const { return {softcap, temperature[row]}; }

  // Column of the row's token in [first, first + valid), counted from `first`, or -1.
  int64_t target(int64_t row, int64_t first, int64_t valid) const {
    const int64_t column = token_ids[row] - first;
    return column >= 0 && column < valid ? column : -1;
  }
};

struct Weight {
  int64_t vocab, hidden, panels;

  explicit Weight(const at::Tensor& weight)
      : vocab(weight.size(0)),
        hidden(weight.size(1)),
        panels((vocab + kPanel - 1) / kPanel) {}

  int64_t valid(int64_t panel) const { return std::min(kPanel, vocab - panel * kPanel); }
};

// c [kRows, kPanel] = a [kRows, depth] @ a packed panel.
template <typename T>
void multiply_panel(int64_t depth, const T* a, const uint32_t* packed, float* c) {
  const int64_t slice = slice_width(), slice_words = packed_words<T>(depth, slice);
  for (int64_t n = 0; n < kPanel / slice; ++n)
    multiply<T>(depth, a, depth, packed + n * slice_words, c + n * slice, kPanel, /*add=*/false);
}

inline int64_t num_blocks(int64_t panels) { return (panels + kBlock - 1) / kBlock; }

// Call body(block, first row, last row) for all blocks of panels and `rows` (whole tiles), in parallel.
template <typename Body>
void for_blocks(int64_t blocks, int64_t rows, Body body) {
  const int64_t tiles = rows / kRows;
  // A small vocabulary has fewer blocks than there are threads: then cut the rows as well.
  const int64_t wanted = (at::get_num_threads() + blocks - 1) / blocks;
  const int64_t groups = std::min(tiles, wanted);
  const int64_t group_rows = (tiles + groups - 1) / groups * kRows;
  at::parallel_for(0, blocks * groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item % groups * group_rows;
      if (first < rows) body(item / groups, first, std::min(first + group_rows, rows));
    }
  });
}

// Call body(const T* x, const W* weight) with the types that the two tensors have.
template <typename Body>
void with_types(const at::Tensor& x, const at::Tensor& weight, Body body) {
  if (x.scalar_type() == at::kBFloat16) {
    body(x.const_data_ptr<at::BFloat16>(), weight.const_data_ptr<at::BFloat16>());
    return;
  }
  const float* data = x.const_data_ptr<float>();
  switch (weight.scalar_type()) {
    case at::kBFloat16: return body(data, weight.const_data_ptr<at::BFloat16>());
    case at::kHalf: return body(data, weight.const_data_ptr<at::Half>());
    case at::kDouble: return body(data, weight.const_data_ptr<double>());
    default: return body(data, weight.const_data_ptr<float>());
  }
}

}  // namespace codistill
