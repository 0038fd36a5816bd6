// The doors of `apply_temperature_`, `explain_rows` and `divergences`.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "explain.cuh"
#include "logits.h"

namespace whipstaff {

inline Temper temper(const Tensor& logits, const Tensor& temperature) {
  check_type(temperature, "temperature", ScalarType::Float);
  check_per_token(temperature, "temperature", logits.size(0));
  check_same_device(temperature, "temperature", "logits", logits);
  return {.logits = stream_of(logits, "logits", logits, "logits"),
          .vocab = logits.size(1),
          .temperature = static_cast<const float*>(temperature.data_ptr())};
}

using Explanation = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // entropy, divergence, tokens, deltas

inline Explain explain(const Tensor& final, const MaybeTensor& base, int64_t num_deltas, const Explanation& results) {
  const int64_t vocab = final.size(1), most = base ? std::min<int64_t>(vocab, MAX_DELTAS) : 0;
  STD_TORCH_CHECK(num_deltas >= 0 && num_deltas <= most, "num_deltas is ", num_deltas, "; it must be at most ", most,
                  base ? "" : " without base");
  if (base)
    STD_TORCH_CHECK(base->size(0) == final.size(0), "final has ", final.size(0), " rows, base has ", base->size(0));
  const auto& [entropy, divergence, tokens, deltas] = results;
  return {.final = stream_of(final, "final", final, "final"),
          .base = base ? stream_of(*base, "base", final, "final") : LogitStream{},
          .num_rows = final.size(0),
          .vocab = vocab,
          .entropy = static_cast<float*>(entropy.data_ptr()),
          .divergence = static_cast<float*>(divergence.data_ptr()),
          .tokens = static_cast<int64_t*>(tokens.data_ptr()),
          .deltas = static_cast<float*>(deltas.data_ptr()),
          .num_deltas = num_deltas};
}

inline Explanation new_explanation(const Tensor& final, int64_t num_deltas) {
  check_rows(final, "final");
  const int64_t rows = final.size(0), columns = std::max<int64_t>(num_deltas, 0);
  return {torch::stable::new_zeros(final, {rows}, ScalarType::Float),
          torch::stable::new_zeros(final, {rows}, ScalarType::Float),
          torch::stable::new_zeros(final, {rows, columns}, ScalarType::Long),
          torch::stable::new_zeros(final, {rows, columns}, ScalarType::Float)};
}

inline Divergences divergences(const Tensor& mature, const Tensor& early, const Tensor& owners, const Tensor& result) {
  check_type(owners, "owners", ScalarType::Long);
  check_per_token(owners, "owners", early.size(0));
  check_same_device(owners, "owners", "mature", mature);
  return {.mature = stream_of(mature, "mature", mature, "mature"),
          .early = stream_of(early, "early", mature, "mature"),
          .owners = static_cast<const int64_t*>(owners.data_ptr()),
          .num_early = early.size(0),
          .vocab = mature.size(1),
          .divergence = static_cast<float*>(result.data_ptr())};
}

inline Tensor new_divergences(const Tensor& mature, const Tensor& early) {
  check_rows(mature, "mature");
  check_rows(early, "early");
  return torch::stable::new_zeros(mature, {early.size(0)}, ScalarType::Float);
}

}  // namespace whipstaff
