// Softmax statistics and gradients of logits that are in memory.

#include "linear.h"

namespace codistill {
namespace {

// Call body(row, first column, valid, panel [kPanel] fp32) for every panel of every row, rows over
// threads.
template <typename L, typename Body>
void for_panels(const L* data, const View& logits, int64_t vocab, Body body) {
  const int64_t stride = logits.stride;
  parallel_for(0, logits.rows, 1, [&](int64_t begin, int64_t end) {
    alignas(64) float panel[kPanel] = {};
    for (int64_t row = begin; row < end; ++row)
      for (int64_t column = 0; column < vocab; column += kPanel) {
        const int64_t valid = std::min(kPanel, vocab - column);
        const L* from = data + row * stride + column;
        for (int64_t j = 0; j < valid; ++j) panel[j] = static_cast<float>(from[j]);
        body(row, column, valid, panel);
      }
  });
}

// out [4, N]: max, rest, weighted, target of the first `vocab` columns.
void logits_statistics(const View& logits, int64_t vocab, const View& token_ids,
                       const View& temperature, double softcap, const View& out) {
  const int64_t n = logits.rows;
  float* parts = out.as<float>();
  const Rows rows(token_ids, temperature, softcap);
  std::vector<State> states(n, empty_state());
  with_type(logits, [&](const auto* data) {
    for_panels(data, logits, vocab,
               [&](int64_t row, int64_t column, int64_t valid, const float* panel) {
                 const int64_t target = rows.target(row, column, valid);
                 states[row] = merge(states[row], row_state(panel, valid, rows.scale(row), target));
               });
  });
  for (int64_t row = 0; row < n; ++row) {
    const State& s = states[row];
    const float numbers[] = {s.sum.max, s.sum.rest, s.weighted, s.target};
    for (int64_t i = 0; i < 4; ++i) parts[i * n + row] = numbers[i];
  }
}

// out = d/d logits, in the logits' dtype; may be `logits` itself. Columns from `vocab` on become 0.
template <typename L>
void write_gradients(const L* logits, const View& shape, int64_t vocab, const Rows& rows,
                     const float* coefficients, const float* lse_parts, const View& out) {
  L* data = out.as<L>();
  const int64_t stride = out.stride, width = out.columns;
  for_panels(logits, shape, vocab, [&](int64_t row, int64_t column, int64_t valid, float* panel) {
    const Coefficients all = coefficients_of(coefficients, lse_parts, rows.count, row);
    const int64_t target = rows.target(row, column, valid);
    // A row without a gradient may hold NaN.
    if (all.c0 == 0.0f && all.c1 == 0.0f && all.c2 == 0.0f)
      std::fill_n(panel, valid, 0.0f);
    else
      row_gradient(panel, valid, rows.scale(row), target, all, panel);
    L* to = data + row * stride + column;
    for (int64_t j = 0; j < valid; ++j) to[j] = static_cast<L>(panel[j]);
    if (column + valid == vocab) std::fill(to + valid, to - column + width, L(0));
  });
}

}  // namespace

CODISTILL_EXPORT const char* codistill_logits_statistics(
    int64_t threads, const View& logits, int64_t vocab, const View& token_ids,
    const View& temperature, double softcap, const View& out) {
  return guarded(threads, [&] {
    logits_statistics(logits, vocab, token_ids, temperature, softcap, out);
  });
}

CODISTILL_EXPORT const char* codistill_logits_gradients(
    int64_t threads, const View& out, const View& logits, int64_t vocab, const View& token_ids,
    const View& temperature, double softcap, const View& coefficients, const View& lse_parts) {
  return guarded(threads, [&] {
    const Rows rows(token_ids, temperature, softcap);
    with_type(logits, [&](const auto* data) {
      write_gradients(data, logits, vocab, rows, coefficients.as<float>(), lse_parts.as<float>(), out);
    });
  });
}

}  // namespace codistill
