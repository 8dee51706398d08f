// Softmax statistics and gradients of logits that are in memory.

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "linear.h"

namespace codistill {
namespace {

// Call body(row, first column, valid, panel [kPanel] fp32) for every panel of every row, rows over
// threads.
template <typename L, typename Body>
void for_panels(const at::Tensor& logits, int64_t vocab, Body body) {
  const L* data = logits.const_data_ptr<L>();
  const int64_t stride = logits.stride(0);
  at::parallel_for(0, logits.size(0), 1, [&](int64_t begin, int64_t end) {
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

// [4, N]: max, rest, weighted, target of the first `vocab` columns.
at::Tensor logits_statistics(const at::Tensor& logits, int64_t vocab, const at::Tensor& token_ids,
                             const at::Tensor& temperature, double softcap) {
  const int64_t n = logits.size(0);
  const auto out = at::empty({4, n}, logits.options().dtype(at::kFloat));
  float* parts = out.data_ptr<float>();
  const Rows rows(token_ids, temperature, softcap);
  std::vector<State> states(n, empty_state());
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, logits.scalar_type(), "logits_statistics", [&] {
        for_panels<scalar_t>(
            logits, vocab, [&](int64_t row, int64_t column, int64_t valid, const float* panel) {
              const int64_t target = rows.target(row, column, valid);
              states[row] = merge(states[row], row_state(panel, valid, rows.scale(row), target));
            });
      });
  for (int64_t row = 0; row < n; ++row) {
    const State& s = states[row];
    parts[row] = s.sum.max, parts[n + row] = s.sum.rest;
    parts[2 * n + row] = s.weighted, parts[3 * n + row] = s.target;
  }
  return out;
}

// out = d/d logits, in the logits' dtype; may be `logits` itself. Columns from `vocab` on become 0.
void logits_gradients(const at::Tensor& out, const at::Tensor& logits, int64_t vocab,
                      const at::Tensor& token_ids, const at::Tensor& temperature, double softcap,
                      const at::Tensor& coefficients, const at::Tensor& log_softmax) {
  const int64_t n = logits.size(0);
  const Rows rows(token_ids, temperature, softcap);
  const float *c = coefficients.const_data_ptr<float>(), *s = log_softmax.const_data_ptr<float>();
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, logits.scalar_type(), "logits_gradients", [&] {
        scalar_t* data = out.data_ptr<scalar_t>();
        const int64_t stride = out.stride(0), width = out.size(1);
        for_panels<scalar_t>(
            logits, vocab, [&](int64_t row, int64_t column, int64_t valid, float* panel) {
              const Coefficients all{c[row], c[n + row], c[2 * n + row],
                                     s[row], s[n + row], s[2 * n + row]};
              const int64_t target = rows.target(row, column, valid);
              // A row without a gradient may hold NaN.
              if (all.c0 == 0.0f && all.c1 == 0.0f && all.c2 == 0.0f)
                std::fill_n(panel, valid, 0.0f);
              else
                row_gradient(panel, valid, rows.scale(row), target, all, panel);
              scalar_t* to = data + row * stride + column;
              for (int64_t j = 0; j < valid; ++j) to[j] = static_cast<scalar_t>(panel[j]);
              if (column + valid == vocab) std::fill(to + valid, to - column + width, scalar_t(0));
            });
      });
}

}  // namespace
}  // namespace codistill

TORCH_LIBRARY_FRAGMENT(codistill_cpu, m) {
  using namespace codistill;
  m.def(
      "logits_statistics(Tensor logits, int vocab, Tensor token_ids, Tensor temperature, "
      "float softcap) -> Tensor",
      &logits_statistics);
  m.def(
      "logits_gradients(Tensor(a!) out, Tensor logits, int vocab, Tensor token_ids, "
      "Tensor temperature, float softcap, Tensor coefficients, Tensor log_softmax) -> ()",
      &logits_gradients);
}
