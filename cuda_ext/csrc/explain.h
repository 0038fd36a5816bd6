// The doors of `apply_temperature_`, `explain_rows` and `divergences`.
#pragma once

#include <torch/csrc/stable/ops.h>

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

using Explanation = std::tuple<Tensor, Tensor>;  // entropy, divergence

inline Explain explain(const Tensor& final, const MaybeTensor& base, const Explanation& results) {
  if (base)
    STD_TORCH_CHECK(base->size(0) == final.size(0), "final has ", final.size(0), " rows, base has ", base->size(0));
  const auto& [entropy, divergence] = results;
  return {.final = stream_of(final, "final", final, "final"),
          .base = base ? stream_of(*base, "base", final, "final") : LogitStream{},
          .num_rows = final.size(0),
          .vocab = final.size(1),
          .entropy = static_cast<float*>(entropy.data_ptr()),
          .divergence = static_cast<float*>(divergence.data_ptr())};
}

inline Explanation new_explanation(const Tensor& final) {
  check_rows(final, "final");
  return {torch::stable::new_zeros(final, {final.size(0)}, ScalarType::Float),
          torch::stable::new_zeros(final, {final.size(0)}, ScalarType::Float)};
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
