// What the passes over a linear head share: its shape, its rows, and which thread works on what.
#pragma once

#include "interface.h"
#include "pack.h"
#include "softmax.h"

namespace codistill {

constexpr int64_t kBlock = 4;  // panels per block, which is the unit of work of the forward pass

// The rows (tokens) of a call: which token is each row's, and how its raw logits become logits.
struct Rows {
  int64_t count, padded;  // padded to a multiple of kUnit
  const int64_t* token_ids;
  const float* temperature;
  float softcap;

  Rows(const View& token_ids, const View& temperature, double softcap)
      : count(token_ids.rows),
        padded(round_up(count, kUnit)),
        token_ids(token_ids.as<int64_t>()),
        temperature(temperature.as<float>()),
        softcap(static_cast<float>(softcap)) {}

  Scale scale(int64_t row) const { return {softcap, temperature[row]}; }

  // Column of the row's token in [first, first + valid), counted from `first`, or -1.
  int64_t target(int64_t row, int64_t first, int64_t valid) const {
    const int64_t column = token_ids[row] - first;
    return column >= 0 && column < valid ? column : -1;
  }
};

// The shape of a weight, whose vocabulary rows are worked on in panels.
struct Weight {
  int64_t vocab, hidden, panels;

  explicit Weight(const View& weight) : Weight(weight.rows, weight.columns) {}
  Weight(int64_t vocab, int64_t hidden)
      : vocab(vocab), hidden(hidden), panels((vocab + kPanel - 1) / kPanel) {}

  int64_t valid(int64_t panel) const { return std::min(kPanel, vocab - panel * kPanel); }
};

// c [height, kPanel] = a [height, depth] @ a packed panel, in whole slices up to `valid` columns. Terms
// outermost: each part of `a` is then fetched once.
template <typename T>
void multiply_panel(int64_t height, int64_t depth, const T* a, const uint32_t* packed, int64_t valid,
                    float* c) {
  const int64_t slice = slice_width();
  for (int64_t k = 0; k < depth; k += kDepth<T>) {
    const int64_t part = std::min(kDepth<T>, depth - k), ahead = k + part;
    prefetch(a + ahead, height, depth, std::min(kDepth<T>, depth - ahead));
    for (int64_t n = 0; n < valid; n += slice)
      multiply<T>(height, part, a + k, depth,
                  packed + packed_words<T>(depth, n) + packed_words<T>(k, slice), c + n, kPanel,
                  /*add=*/k > 0);
  }
}

inline int64_t num_blocks(int64_t panels) { return (panels + kBlock - 1) / kBlock; }

// Call body(block, first row, last row) for all blocks of panels and tiles of rows, in parallel.
// Every thread gets the same number of (slice of columns, tile of rows): all are done at once,
// whatever the sizes are.
template <typename Body>
void for_blocks(const Weight& shape, int64_t rows, Body body) {
  const int64_t tiles = (rows + kRows - 1) / kRows, width = kBlock * kPanel;
  const int64_t slice = slice_width();
  const int64_t whole = shape.vocab / width, slices = width / slice;
  const int64_t last_slices = (shape.vocab % width + slice - 1) / slice;
  const auto tiles_of = [&](int64_t units) {  // block after block, tile after tile
    const int64_t in_whole = whole * tiles * slices;
    return units <= in_whole ? units / slices : whole * tiles + (units - in_whole) / last_slices;
  };
  parallel_for(0, tiles * (whole * slices + last_slices), 1, [&](int64_t begin, int64_t end) {
    const int64_t stop = tiles_of(end);
    for (int64_t tile = tiles_of(begin), last; tile < stop; tile = last) {
      const int64_t block = tile / tiles;
      last = std::min(stop, (block + 1) * tiles);
      body(block, (tile - block * tiles) * kRows, std::min(rows, (last - block * tiles) * kRows));
    }
  });
}

// Call body(const T* x, const W* weight) with the types that the two tensors have.
template <typename Body>
void with_types(const View& x, const View& weight, Body body) {
  if (x.dtype == DType::kBFloat16) return body(x.as<BFloat16>(), weight.as<BFloat16>());
  with_type(weight, [&](const auto* data) { body(x.as<float>(), data); });
}

inline float* data_or_null(const View* tensor) {
  return tensor == nullptr ? nullptr : tensor->as<float>();
}

}  // namespace codistill
